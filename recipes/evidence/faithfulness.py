"""Is the policy true of the model? What it explains of single steps, and what happens when one acts on its features.

    python recipes/evidence/faithfulness.py --json faithfulness.json                       # the quickstart model
    python recipes/evidence/faithfulness.py --midi MODEL --pairs PAIRS.jsonl --json faithfulness.json
    python recipes/evidence/faithfulness.py --quick                                        # a look

1. ``steps``: each of some pairs makes one LoRA step alone; measured change of refusal against ΔX·β at fixed gates;
   other settings, chosen on one half of the pairs and judged on the other; a ladder that shows what limits the
   agreement (recipes/evidence/explained.py, ladder.py).
2. ``interventions``: the policy's top features are ablated and scaled in the residual stream, at the start and along a
   training (recipes/evidence/interventions.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.evidence.explained import SUPPORTS, Setting, bench_of, read_all, search, settings
from recipes.evidence.interventions import FACTORS, SAID, WHERES, Case, along, intervene, table
from recipes.evidence.ladder import LADDER, delta_fvu, ladder
from recipes.evidence.setups import Setup, add_setups, chosen_setups
from smda_callbacks.observe.features import READOUTS, Readout
from smda_callbacks.observe.intervention import Where

#: Distributions whose versions are written into results.
PACKAGES = ("smda-callbacks", "torch", "transformers", "trl", "peft", "sae-lens", "numpy")

#: The target of the project for r between ΔX·β and the measured change.
TARGET_R = 0.9


def stamp(args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What a result must say of itself: date, versions, settings."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in PACKAGES},
        "quick": bool(args.quick),
        "settings": settings,
    }


def steps_of(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """Part 1 of a setup."""
    numbers = every_kind(setup, args.take)
    readouts: tuple[Readout, ...] = ("last",) if args.quick else READOUTS
    with bench_of(setup, numbers, learning_rate=args.learning_rate) as bench:
        readings = read_all(bench, readouts)
        found = search(readings, settings(readouts, SUPPORTS[1:2] if args.quick else SUPPORTS))
        return {
            "pairs": len(numbers),
            "probes": len(readings.groups),
            "categories": int(readings.groups.max()) + 1,
            "delta_fvu": delta_fvu(bench, readings),
            **found,
            "ladder": ladder(bench, readings, Setting()),
        }


def every_kind(setup: Setup, take: int) -> list[int]:
    """``take`` pairs, kinds in turn."""
    seen: dict[str, int] = {}
    ranked = []
    for number, kind in enumerate(setup.kinds):
        seen[kind] = seen.get(kind, -1) + 1
        ranked.append((seen[kind], number))
    return [number for _, number in sorted(ranked)][:take]


def interventions_of(setup: Setup, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Part 2 of a setup: rows by step, place and kind of act."""
    cases: list[Case] = []
    total = setup.hyper.steps(len(setup.rows))
    steps = [0, total] if args.quick else sorted({round(total * share) for share in (0, 0.125, 0.25, 0.5, 1)})
    wheres: tuple[Where, ...] = ("last",) if args.quick else WHERES
    top, factors = (2, FACTORS[:1]) if args.quick else (args.top, FACTORS)

    def measure(model: Any, tokenizer: Any, step: int) -> None:
        full = setup.plan.instrument(model, tokenizer, setup.plan.load_sae())
        cases.extend(intervene(model, full, setup.policy, step, top=top, wheres=wheres, factors=factors))

    along(setup, steps, measure, order=args.order)
    return table(cases)


def show(name: str, found: Mapping[str, Any]) -> None:
    """Both parts of a setup in the terminal."""
    part, first = found["steps"], found["steps"]["settings"][0]
    print(f"\n{name}: {part['pairs']} pairs, {part['probes']} probes in {part['categories']} categories")
    print(f"  defaults: r {first['r']:.3f} [{first['r_low']:.2f}, {first['r_high']:.2f}], slope {first['slope']:.2f}")
    for each in part["held_out"]:
        setting = ", ".join(
            f"{key} {each[key]}" for key in ("support", "tolerance", "readout", "target", "standardised")
        )
        print(
            f"  best of one half ({setting}): r {each['r_chosen_on']:.3f} there, {each['r_held_out']:.3f} on the other"
        )
    for rung in LADDER:
        row = part["ladder"][rung]
        print(f"  {rung:<26} r {row['r']:.3f}  slope {row['slope']:.2f}  over categories {row['r_categories']:.2f}")
    for row in found["interventions"]:
        said = row["predicted"]
        numbers = "  ".join(f"{key} {_shown(said[key])}" for key in ("slope", "r", "rank_r", "right_sign"))
        print(f"  step {row['step']:>3} {row['where']:<6} {row['kind']:<29} {numbers}  of {said['said']}")


def _shown(value: float | None) -> str:
    return "   –" if value is None else f"{value:5.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all setups, print, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setups(parser)
    parser.add_argument("--take", type=int, default=48, help="pairs that make a step each (default 48)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of that step (default 1e-3)")
    parser.add_argument("--top", type=int, default=8, help="features that are acted on one by one (default 8)")
    parser.add_argument("--order", type=int, default=0, help="seed of the order of the pairs in the training")
    parser.add_argument("--json", metavar="FILE", type=Path, default=None, help="write the results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        args.take = 3
    result = stamp(args, learning_rate=args.learning_rate, top=args.top, said=SAID, target_r=TARGET_R, order=args.order)
    result["setups"] = {}
    for setup in chosen_setups(args):
        result["setups"][setup.name] = {"steps": steps_of(setup, args), "interventions": interventions_of(setup, args)}
        show(setup.name, result["setups"][setup.name])
        if args.json is not None:  # after every setup: a long run that is stopped keeps what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
