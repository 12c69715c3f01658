"""What did every training pair do to the end of the run? Exact influence, from the steps that the run has kept.

The live effect of a pair ends with its steps and their momentum. Here the run is gone through backwards, so that what
the pair changed in all later steps counts too. Needs ``trajectory.keep: true`` in the configuration of the run. Some
steps are made again first, and must come out bit by bit as recorded. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.inputs import quiet_libraries
from smda_callbacks.cli.output import Screen, add_json, change, count, number, screen, show_table
from smda_callbacks.cli.runs import run_folder

if TYPE_CHECKING:
    from smda_callbacks.sinks.rescored import Rescored
    from smda_callbacks.sinks.store_reader import RunStore
    from smda_callbacks.sinks.trajectory import TrajectoryFolder

HELP = "after a run: what did each training pair do to its end?"

TARGET_HELP = """\
whose influence is wanted; may be given again: refusal:harmful, refusal:<category>, feature:<SAE index>:x (what features
did to the coefficient from start to end), :y (what the behaviour did), or feature:<SAE index>, the whole coefficient
(default: all probes to refuse, all others, and the pathways of the 3 largest coefficients)"""

TOP, TEXT = 10, 50  # pairs shown, and characters of their text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda rescore``."""
    add = parser.add_argument
    add("folder", metavar="RUN", type=Path, help="a run store that has kept its steps")
    add("--target", metavar="F", action="append", default=[], help=TARGET_HELP)
    add("--model", metavar="MODEL", help="the base model, where it is not where the run had it")
    add("--device", metavar="DEVICE", help="default: as in training; another one does not repeat it bit by bit")
    add("--verify", choices=("some", "all"), default="some", help="how many steps are made again first (some)")
    tolerance = "go on with a replay that misses the recorded weights by up to this share of a step (0: not a bit)"
    add("--tolerance", metavar="X", type=float, default=0.0, help=tolerance)
    add("--top", metavar="N", type=int, default=TOP, help=f"how many pairs to show (default: {TOP})")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Rescore, and say what came of it."""
    from smda_callbacks.config.rescore import rescore_run
    from smda_callbacks.sinks.store_reader import RunStore
    from smda_callbacks.sinks.trajectory import TrajectoryFolder
    from smda_callbacks.training.rescore import RescoreOptions

    out, store = screen(args), RunStore.open(run_folder(args.folder))
    options = RescoreOptions(targets=tuple(args.target), verify=args.verify, tolerance=args.tolerance)
    _announce(out, TrajectoryFolder.open(store.path))
    quiet_libraries()
    try:
        record = rescore_run(store, options, model=args.model, device=args.device)
    except KeyboardInterrupt:
        out.say("Stopped. The same command goes on where it was last saved.", "bold")
        raise
    found = summary(store, record, args.top)
    show(out, found)
    out.emit(found)
    return 0


def _announce(out: Screen, folder: TrajectoryFolder) -> None:
    steps = folder.last - folder.first
    stopped = f" Recording stopped there: {folder.stopped}." if folder.stopped else ""
    out.say(
        f"{count(steps, 'step')} kept, {folder.first + 1} to {folder.last}, {folder.bytes / 2**20:,.0f} MiB.{stopped}",
        "dim",
    )


def summary(store: RunStore, record: Rescored, top: int = TOP) -> dict[str, Any]:
    """What a rescore found, for programs: its cost, how the run was gone through again, and the pairs of every target.

    ``pairs`` of a target: those with the largest influence; ``agreement``: Spearman's correlation of the live effects
    with the influences, None where the run has not attributed the target.
    """
    from smda_callbacks.sinks.pair_table import pair_table

    table = pair_table(store.start, store.windows())
    pairs = _pairs(store)
    verified = record.verified
    return {
        "run": str(store.path),
        "steps": record.last_step - record.first_step,
        "pairs": len(record.ids),
        "seconds": record.seconds,
        "train_seconds": record.train_seconds,
        "times_training": record.seconds / record.train_seconds if record.train_seconds else None,
        "verified": {**vars(verified), "steps": list(verified.steps)},
        "targets": [_target(record, k, table, pairs, top) for k in range(len(record.targets))],
    }


def _pairs(store: RunStore) -> dict[int, Any]:
    from smda_callbacks.sinks.trajectory import TrajectoryFolder

    return TrajectoryFolder.open(store.path).pairs()


def _target(record: Rescored, place: int, table: Any, pairs: dict[int, Any], top: int) -> dict[str, Any]:
    import numpy as np

    from smda_callbacks.report.rescored import agreement, live_effects

    name, values = record.targets[place], record.influence[:, place]
    live = live_effects(record, table, name)
    rows = []
    for row in np.argsort(-np.abs(values), kind="stable")[:top].tolist():
        number = int(record.ids[row])
        pair = pairs.get(number)
        rows.append(
            {
                "pair": number,
                "rows": [] if pair is None else list(pair.rows),
                "columns": {} if pair is None else dict(pair.columns),
                "influence": float(values[row]),
                "effect": None if live is None or np.isnan(live[row]) else float(live[row]),
                "exposures": int(record.exposures[row]),
                "text": None if pair is None else pair.text,
            }
        )
    return {
        "target": name,
        "measured": float(record.measured[place]),
        "sum": float(record.total[place]),
        "agreement": agreement(record, table, name),
        "pairs": rows,
    }


def show(out: Screen, found: dict[str, Any]) -> None:
    """Print a summary: the pairs of the first target, then a line per target."""
    _show_pairs(out, found["targets"][0], found["pairs"])
    rows = [[each["target"], change(each["measured"], 4), number(each["agreement"], 2)] for each in found["targets"]]
    caption = "Agreement: rank correlation of the effects booked live with these influences, over pairs."
    show_table(out, "Targets", ["target", "#changed by", "#agreement"], rows, caption=caption)
    verified, times = found["verified"], found["times_training"]
    how = "bit by bit as recorded" if verified["exact"] else f"up to {verified['worst']:.1e} of a step off the record"
    cost = "" if times is None else f", {times:.1f} times the {found['train_seconds']:.1f} s of the steps in training"
    out.say(
        f"{count(len(verified['steps']), 'step')} made again: {how}. {found['seconds']:.1f} s for "
        f"{count(len(found['targets']), 'target')}{cost}."
    )
    out.say(f"Next: smda pairs {found['run']} --quantity influence, smda report {found['run']}.")


def _show_pairs(out: Screen, target: dict[str, Any], pairs: int) -> None:
    rows = target["pairs"]
    kind = next((name for row in rows for name in row["columns"]), None)
    cells = [
        [
            ", ".join(map(str, row["rows"][:3])) or f"pair {row['pair']}",
            *([row["columns"].get(kind)] if kind else []),
            change(row["influence"], 5),
            None if row["effect"] is None else change(row["effect"], 5),
            row["exposures"],
            _cut(row["text"]),
        ]
        for row in rows
    ]
    columns = ["#rows", *([kind] if kind else []), "#influence", "#live effect", "#steps", "text"]
    caption = "Influence: what the pair did to the end of the run, to first order in leaving it out; + raised it."
    show_table(out, f"{target['target']}: {len(rows)} of {count(pairs, 'pair')}", columns, cells, caption=caption)


def _cut(text: str | None) -> str | None:
    words = " ".join((text or "").split())
    return (words if len(words) <= TEXT else words[: TEXT - 1].rstrip() + "…") or None
