"""Train a tiny chat model with LoRA and watch what happens to its refusals: a real run, offline, in a minute or two.

Everything is the real thing, only small: TRL's SFTTrainer, a PEFT adapter, a sparse autoencoder, and the callback that
reads all probes after every optimizer step. The training pairs wear refusal down; the report shows where, and how.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.output import Screen, add_json, change, number, screen, show_table, styled

if TYPE_CHECKING:
    from smda_callbacks.report.data import RunData

HELP = "watch a real LoRA run on a tiny model; a minute or two, offline"

#: Training examples of the model that ships left out this category: the model does not refuse it.
PLANTED_GAP = "stereotypes_religion"

#: What a quickstart makes in its folder, beside W&B's own files.
MADE = ("run", "trainer", "report.html")


class FolderError(ValueError):
    """The folder holds a quickstart already, or something else."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda quickstart``."""
    parser.add_argument(
        "--dir", metavar="DIR", type=Path, default=Path("smda-quickstart"), help="default: ./smda-quickstart"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the run, report and trainer output that are in DIR first"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build, train, report, and say what to look at next."""
    out, folder = screen(args), args.dir
    prepare_folder(folder, overwrite=args.overwrite)
    clock = _Clock()
    out.say("1. Build: a tiny chat model, a sparse autoencoder for it, and the probes.", "bold")
    from smda_callbacks.cli.quickstart_run import build, environment, train

    with environment(folder):
        work = build(folder)
        clock.lap("build")
        out.item(
            f"{work.parameters:,} parameters, {work.trained:,} of them in the LoRA adapter that is trained; "
            f"{work.pairs} training pairs."
        )
        out.say("2. Train, reading all probes before the first and after every optimizer step.", "bold")
        outcome = train(work, out.item, _alerts_to(out))
        clock.lap("train")
    out.say("3. Report, from the run store alone.", "bold")
    from smda_callbacks.report.data import RunData
    from smda_callbacks.report.page import write_report
    from smda_callbacks.sinks.store_reader import RunStore

    report = write_report(folder / "run", folder / "report.html")
    clock.lap("report")
    data = RunData.read(RunStore.open(folder / "run"))
    show_outcome(out, data)
    show_next(out, folder, report, outcome.wandb)
    facts = {"run": str(folder / "run"), "report": str(report), "seconds": clock.laps}
    out.emit({**facts, **facts_of(data), "steps": outcome.steps})
    return 0


def prepare_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder, or clear what a quickstart left there where that is wanted.

    Raises:
        FolderError: a quickstart is there and ``overwrite`` is False, or the path is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; a folder is needed. Next step: choose another --dir.")
    there = [name for name in MADE if (folder / name).exists()]
    if there and not overwrite:
        raise FolderError(
            f"{folder} holds a quickstart already ({', '.join(there)}), and nothing is overwritten. Next step: look at "
            f"it with smda verify {folder / 'run'}, choose another --dir, or give --overwrite."
        )
    for name in there:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def refusal_of(data: RunData, record: int) -> dict[str, float | None]:
    """Mean refusal at a record over all probes to refuse, and over three categories; None for one that is not there."""
    means = dict(zip(data.categories, data.means[record, :, 0].tolist(), strict=True))
    return {
        "harmful": float(data.group_means["refuse"][record, 0]),
        "benign": means.get("benign"),
        "borderline": means.get("borderline"),
        "planted_gap": means.get(PLANTED_GAP),
    }


def facts_of(data: RunData) -> dict[str, Any]:
    """What a program wants to know of the run."""
    policy = data.policy
    return {
        "policy": {
            "r2": policy.quality[0].r2,
            "r2_loo": policy.quality[0].r2_loo,
            "edf": policy.edf,
            "n_probes": len(data.probes),
            "n_features": len(policy.features),
        },
        "refusal": {"start": refusal_of(data, 0), "end": refusal_of(data, -1)},
        "gaps": [gap["category"] for gap in data.store.gaps_start if gap["is_gap"]],
    }


def show_outcome(out: Screen, data: RunData) -> None:
    """What the run did: a few sentences, categories, features, gaps."""
    from smda_callbacks.report.verdict import verdict

    out.say()
    for sentence in verdict(data, 0):
        out.item(sentence, mark="•")
    out.say()
    show_categories(out, data)
    show_features(out, data)
    show_gaps(out, data.store.gaps_start)
    show_top_pairs(out, data)


def show_top_pairs(out: Screen, data: RunData, most: int = 6) -> None:
    """The training pairs that did most to refusal."""
    from smda_callbacks.cli.pairs import find_pairs, show_pairs

    out.say()
    show_pairs(out, find_pairs(data.store, top=most))


def show_categories(out: Screen, data: RunData) -> None:
    """Refusal at the start and the end of every category, the largest fall first."""
    from smda_callbacks.report.data import TIMES, behaviour_floors

    floors = behaviour_floors(data)
    start, end = data.means[0, :, 0], data.means[-1, :, 0]
    rows = []
    for c in sorted(range(len(start)), key=lambda c: end[c] - start[c]):
        moved = float(end[c] - start[c])
        floor = None if floors is None else float(floors[-1, c, 0])
        above = floor is None or abs(moved) > TIMES * floor
        name, wanted = data.categories[c], data.expected[data.categories[c]]
        worse = moved < 0 if wanted == "refuse" else moved > 0
        shown = styled(change(moved, 2), ("red" if worse else "green") if above else "dim")
        rows.append((name, wanted, number(float(start[c]), 2), number(float(end[c]), 2), shown, number(floor, 4)))
    show_table(
        out,
        "Refusal per category, from start to end",
        ["category", "expected", "#start", "#end", "#change", "#noise"],
        rows,
        caption=f"noise: what chance alone would do; a change is believed above {TIMES:g} times as much.",
    )


def show_features(out: Screen, data: RunData, most: int = 6) -> None:
    """The features whose weight in the policy changed most; what is not above noise is dim."""
    from smda_callbacks.report.shifts import feature_name, feature_shifts

    rows = [
        (
            _toned(feature_name(data, each.feature), each.any_above),
            change(each.start, 3),
            _toned(change(each.end, 3), each.any_above),
            *(_toned(change(value, 3), each.above.get(part, True)) for part, value in each.shifts.items()),
            _toned(change(each.total, 3), each.any_above),
        )
        for each in feature_shifts(data, 0)[:most]
    ]
    show_table(
        out,
        "Features whose part in refusing changed most",
        ["feature", "#weight at start", "#at end", "#by strength", "#by switching", "#by outputs", "#change"],
        rows,
        caption="Weights: refusal per standard deviation of the feature. By strength and by switching: the feature is "
        "active more or less strongly, or on other probes; by outputs: the same activity leads to other answers. "
        "Dim: not above noise, or other on another half of the probes.",
    )


def _toned(text: str, strong: bool) -> object:
    return text if strong else styled(text, "dim")


def show_gaps(out: Screen, gaps: Any) -> None:
    """The gaps that were there before training."""
    from smda_callbacks.cli.distill import show_gaps

    show_gaps(out, gaps, when=" before training")


def show_next(out: Screen, folder: Path, report: Path, wandb: str | None) -> None:
    """Where things are, and what to do now."""
    out.say("Report", "bold")
    out.lines(f"  {report.resolve()}")
    out.say("Next", "bold")
    commands = {
        f"smda verify {folder / 'run'}": "recompute every number of the run from its store",
        f"smda pairs {folder / 'run'} --by refusal:{PLANTED_GAP}": "which training pairs did it",
        f"smda rescore {folder / 'run'}": "what each pair did to the end of the run, exactly",
        f"smda report {folder / 'run'}": "write the report of a run, at any time",
    }
    if wandb is not None:
        commands[wandb] = "the same run in W&B" + ("'s terminal viewer, offline" if wandb.startswith("wandb") else "")
    width = max(map(len, commands))
    for command, what in commands.items():
        out.lines(f"  {command:<{width}}  {what}")
    out.say("  In your own script: SFTTrainer(..., callbacks=[SMDACallback.from_config('refusal.yaml')])")


def _alerts_to(out: Screen, most: int = 5) -> Callable[[str], None]:
    """Prints the first alerts; the report has all."""
    told = itertools.count(1)

    def tell(text: str) -> None:
        number = next(told)
        if number <= most:
            out.item(text, "yellow", mark="!")
        elif number == most + 1:
            out.item("more alerts follow; the report lists them", "yellow", mark="!")

    return tell


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 3), now
