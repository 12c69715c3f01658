"""What watching a run costs: TRL's training watched in every way over the same training unwatched, beside what one
would write by hand and beside peers; how it grows; and a model of the cost, checked against all of it.

    python recipes/evidence/overhead.py --json recipes/evidence/results/overhead.json
    python recipes/evidence/overhead.py --json found.json --only scaling --only model     # measures these parts again
    python recipes/evidence/overhead.py --json found.json --quick                         # tiny: does it run?

Parts, each written to the file when it is done:

* ``quickstart``, ``llama-512``, ``llama-1536``: trainings in one process that make a step each in turn, in processor
  time: of blocks of steps, the time watched over the time not watched. ``step`` attributes nothing to pairs; ``ghost``
  and ``exact`` are the engines; ``_every_10`` measures at every tenth step; ``capture`` only captures the gradients of
  pairs; ``by_hand`` is a callback without the library. ``llama`` is a Llama of random weights (width 256, 6 layers, 8
  pairs of 78 tokens a step, LoRA of rank 8 on all linear layers) with about 512 or 1536 tokens of probes.
  ``over_forward``: one measurement over one bare forward pass of the probes' tokens. That all trainings come to the
  same losses and weights, bit for bit, is checked at every step.
* ``memory``: the most memory that each training takes, in a process of its own.
* ``scaling``: see recipes/evidence/overhead_scaling.py. ``model``: see recipes/evidence/cost_check.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.benchmark_maths import Figure
from recipes.benchmark_training import be_silent
from recipes.evidence.cost_check import check_model
from recipes.evidence.overhead_memory import peaks
from recipes.evidence.overhead_modes import OURS, Mode, make_trainer, peers
from recipes.evidence.overhead_scaling import measure_axes, measure_case, table
from recipes.evidence.overhead_setups import Case, Setup, quickstart, random_setup
from recipes.evidence.overhead_turns import FEW, STEPS, Racer, race, ratios, unlike
from smda_callbacks import __version__
from smda_callbacks.config.schema import MeasureConfig

PACKAGES = ("torch", "transformers", "trl", "peft", "sae-lens", "numpy", "scikit-learn", "bergson", "dattri-llm")
TRAININGS = ("quickstart", "llama-512", "llama-1536")
PARTS = (*TRAININGS, "memory", "scaling", "model")

#: What --quick measures where nothing is asked for: one training is as good as another when all are tiny.
QUICK = ("llama-512", "memory", "scaling", "model")

#: As recipes/evidence/overhead_turns.py has it, tiny.
QUICK_STEPS = (2, 1, 1)

#: Left out of the quickstart: a window of 80 pairs and 426 probes takes minutes. Of --quick: it has no ten steps.
TOO_LONG = ("exact_every_10",)
NOT_QUICK = ("step_every_10", "ghost_every_10", "exact_every_10")


def setup_of(name: str, folder: Path, args: argparse.Namespace) -> Setup:
    """The set-up of a part."""
    if args.quick:
        tiny = Case(width=32, layers=2, adapted=2, probes=16, prompt=12, answer=12, features=64, support=4, pairs=2)
        return random_setup("model", tiny, folder, args.device)
    if name == "quickstart":
        return quickstart(args.device)
    # A row of a probe has 12 tokens of its prompt and 12 of the openings' tree.
    case = Case(width=256, layers=6, adapted=6, probes=21 if name == "llama-512" else 64, prompt=12)
    return random_setup("model", case, folder, args.device)


def trainings(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rows of one set-up, in turns; and one measurement over a bare pass.

    Raises:
        RuntimeError: a training of ours fails, or does not come to the plain training's losses and weights.
    """
    plan = {each: QUICK_STEPS if args.quick else FEW.get(each, STEPS) for each in (*OURS, *peers())}
    left_out = NOT_QUICK if args.quick else TOO_LONG if name == "quickstart" else ()
    rows = [Mode(each) for each in OURS if each not in left_out] + list(peers().values())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        setup = setup_of(name, folder / "setup", args)
        missing: dict[str, str] = {}
        racers = [Racer(each.name, make_trainer(setup, each, folder, plan[each.name][0]), each.around) for each in rows]
        with tqdm(total=plan["plain"][0], desc=name, unit="step", disable=None) as bar:
            race(racers, bar.update)
        ran = _that_ran(racers, missing)
        different = unlike(ran, racers[0])
        if set(different) & set(OURS):
            raise RuntimeError(f"{', '.join(different)} changed the training: losses or weights differ from plain's.")
        figures = {
            racer.name: {
                **Figure(racer.name, ratios(racer, racers[0], *plan[racer.name][1:])).as_json(),
                "milliseconds": 1e3 * sum(racer.seconds[1:]) / len(racer.seconds[1:]),
                "steps": len(racer.seconds),
                "start_seconds": racer.start,
                "same_losses_and_weights": racer.name not in different,
            }
            for racer in ran
        }
        parts = measure_case(setup, {"setup": name}, quick=args.quick)
    measured = parts["seconds"]["measure"]["value"] / parts["seconds"]["forward"]["value"]
    return {
        "rows": figures,
        "missing": missing,
        "losses": racers[0].losses,
        "default": {"every": MeasureConfig().every, "engine": parts["default_engine"]},
        "over_forward": measured,
        "parts": parts,
    }


def _that_ran(racers: Sequence[Racer], missing: dict[str, str]) -> list[Racer]:
    """Those that ended well; of peers that did not, why. Raises RuntimeError for one of ours."""
    for racer in racers:
        if racer.error is not None:
            if racer.name in OURS:
                raise RuntimeError(f"the training {racer.name!r} failed: {racer.error}") from racer.error
            missing[racer.name] = f"{type(racer.error).__name__}: {racer.error}"
    return [racer for racer in racers if racer.error is None]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the part was measured with, and when."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "smda-callbacks": __version__, **versions},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "quick": args.quick,
        "seeds": {"model": 0, "adapters": 0, "order": 42},
    }


def processor() -> str:
    """Name of the processor's model."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def measure(name: str, found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One part."""
    if name in TRAININGS:
        return trainings(name, args)
    if name == "memory":
        setups = QUICK[:1] if args.quick else ("quickstart", "llama-1536")
        return {"mib": {each: peaks(each, args, setup_of) for each in setups}}
    if name == "scaling":
        with tqdm(desc="scaling", unit="case", disable=None) as bar:
            return {
                "axes": measure_axes(args.quick, args.device, lambda text: (bar.set_postfix_str(text), bar.update()))
            }
    return check_model(found)


def show(name: str, part: dict[str, Any]) -> None:
    """The part as a table of text."""
    print(f"\n== {name}")
    for row, figure in part.get("rows", {}).items():
        span = f"{figure['value']:>8.3f} ({figure['min']:.3f} to {figure['max']:.3f})"
        print(f"{row:<28}{span:<34}{figure['milliseconds']:>10.1f} ms a step")
    for row, why in part.get("missing", {}).items():
        print(f"{row:<28}left out: {why}")
    if "over_forward" in part:
        print(f"{'measurement over bare pass':<28}{part['over_forward']:>8.3f}")
    for line in table(part.get("axes", {})):
        print(line)
    for line in part.get("lines", []):
        print(line)
    for setup, peak in part.get("mib", {}).items():
        print(f"{setup:<14}" + ", ".join(f"{row} {mib:.0f} MiB" for row, mib in peak.items()))


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for; the file is written after every part."""
    found: dict[str, Any] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.is_file() else {}
    wanted = args.only or (QUICK if args.quick else PARTS)
    for name in [each for each in PARTS if each in wanted]:
        began = time.perf_counter()
        found[name] = measure(name, found, args)
        found[name]["environment"] = environment(args) | {"took_seconds": round(time.perf_counter() - began, 1)}
        show(name, found[name])
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for into the file, beside what it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, required=True, help="the file; parts not asked for stay")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, few steps and sizes, no peers' memory: does it run?"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(argv)
    be_silent()
    log = logging.getLogger("smda_callbacks")
    before, log.propagate = log.propagate, False  # a peer may bring a handler that prints all that is logged
    try:
        run(args)
    finally:
        log.propagate = before
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
