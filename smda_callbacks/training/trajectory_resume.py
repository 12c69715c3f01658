"""Going on with a trajectory that an earlier training of the same run began, or beginning it anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smda_callbacks.sinks import files, rescored
from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.training.trajectory_read import read_pairs


def goes_on(known: Mapping[str, Any], now: Mapping[str, Any], folder: Path, step: int) -> bool:
    """Whether a trajectory that was begun earlier can be gone on with at ``step``."""
    same = all(
        known.get(name) == json.loads(dumps(now[name]))
        for name in ("version", "trainer", "model", "weights", "optimizer")
    )
    there = layout.numbers(folder, "step")
    states = layout.numbers(folder, "state")
    return same and bool(states) and step > 0 and set(range(states[0] + 1, step + 1)) <= set(there)


def cut(folder: Path, step: int) -> set[int]:
    """Drop what was recorded after ``step``, pairs that came later among it. Returns the numbers of those that stay."""
    layout.cut_after(folder, step)
    seen = {pair for number in layout.numbers(folder, "step") for pair in read_pairs(folder, number)[0]}
    kept = {row["id"]: row for row in files.read_rows(folder / layout.PAIRS) if row["id"] in seen}
    text = "".join(dumps(row) + "\n" for row in kept.values())
    files.write_atomic(folder / layout.PAIRS, text.encode())
    return set(kept)


def remove(folder: Path) -> None:
    """Drop a trajectory that cannot be gone on with."""
    for kind, path_of in (("state", layout.state_file), ("step", layout.step_file)):
        for number in layout.numbers(folder, kind):
            path_of(folder, number).unlink()
    for name in (layout.META, layout.PAIRS, layout.STOPPED):
        (folder / name).unlink(missing_ok=True)


def set_aside_rescored(run: Path) -> None:
    """A run that goes on gets another end: a result for the earlier end is renamed, a half-made one is dropped."""
    folder = run / rescored.FOLDER
    (folder / rescored.PARTIAL).unlink(missing_ok=True)
    result = rescored.result_file(run)
    if result.exists():
        number = 1 + len(list(folder.glob(f"superseded-*-{rescored.RESULT}")))
        result.rename(folder / f"superseded-{number}-{rescored.RESULT}")
