"""The trajectory of a run, in the folder ``trajectory`` of its store: what is needed to go through the run again.

==============================  =================================================================
``meta.json``                   what the trainer was: class, arguments, model, versions, threads
``adapter/``, ``tokenizer/``    as PEFT and transformers save them
``pairs.jsonl``                 the training pairs, each at first sight (not sent anywhere)
``state-000000012.safetensors``  trained weights and the optimizer's state after 12 steps
``step-000000012.safetensors``  what the model was given in step 12: tensors of every micro-batch, random state, and
                                as JSON in the metadata the optimizer's settings and whose the examples are
``stopped.json``                why recording stopped before the run did; absent where it did not
==============================  =================================================================

This file knows names and sizes; what is in the tensors is known by who writes and reads them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smda_callbacks.records import Pair
from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import decode, encode
from smda_callbacks.sinks.files import StoreError

FOLDER = "trajectory"
META, PAIRS, STOPPED = "meta.json", "pairs.jsonl", "stopped.json"
ADAPTER, TOKENIZER = "adapter", "tokenizer"
VERSION = 1

_NAMES = {kind: re.compile(rf"{kind}-(\d{{9,}})\.safetensors") for kind in ("state", "step")}


class TrajectoryError(StoreError):
    """A trajectory that is not there, or cannot be used as asked."""


def state_file(folder: Path, step: int) -> Path:
    """Where the state after ``step`` steps lies."""
    return folder / f"state-{step:09d}.safetensors"


def step_file(folder: Path, step: int) -> Path:
    """Where the inputs of ``step`` lie."""
    return folder / f"step-{step:09d}.safetensors"


def numbers(folder: Path, kind: str) -> tuple[int, ...]:
    """Steps of which there is a file of ``kind``, ``state`` or ``step``, ascending."""
    found = (_NAMES[kind].fullmatch(path.name) for path in folder.glob(f"{kind}-*.safetensors"))
    return tuple(sorted(int(match[1]) for match in found if match))


@dataclass(frozen=True)
class TrajectoryFolder:
    """A recorded trajectory, opened for reading.

    ``states``: steps after which the state is there; ``steps``: steps whose inputs are. Steps from ``first`` + 1 to
    ``last`` can be gone through again.
    """

    path: Path
    meta: Mapping[str, Any]
    states: tuple[int, ...]
    steps: tuple[int, ...]
    stopped: str | None

    @property
    def first(self) -> int:
        """The state that it begins with."""
        return self.states[0]

    @property
    def last(self) -> int:
        """The last state."""
        return self.states[-1]

    @classmethod
    def open(cls, run: str | Path) -> TrajectoryFolder:
        """Open the trajectory of the run store ``run``.

        Raises:
            TrajectoryError: the run has none, or files are missing; says what to do.
        """
        path = Path(run) / FOLDER
        if not (path / META).exists():
            raise TrajectoryError(
                f"{run} has no trajectory: the run did not record its steps. Next step: train with trajectory.keep: "
                "true in the configuration."
            )
        meta = files.read_json(path / META)
        if meta.get("version") != VERSION:
            raise TrajectoryError(f"{path} has version {meta.get('version')!r}; this library reads {VERSION}.")
        states, steps = numbers(path, "state"), numbers(path, "step")
        stopped = files.read_json(path / STOPPED)["why"] if (path / STOPPED).exists() else None
        if len(states) < 2:
            why = f" Recording stopped: {stopped}." if stopped else ""
            raise TrajectoryError(f"{path} holds {len(states)} states; two are needed, before and after a step.{why}")
        missing = sorted(set(range(states[0] + 1, states[-1] + 1)) - set(steps))
        if missing:
            raise TrajectoryError(
                f"{step_file(path, missing[0]).name} ({len(missing)} in all) is missing from {path}, so that the run "
                "cannot be gone through. Restore the folder from a copy."
            )
        return cls(path, meta, states, tuple(each for each in steps if each <= states[-1]), stopped)

    def pairs(self) -> dict[int, Pair]:
        """The training pairs by number."""
        rows = files.read_rows(self.path / PAIRS)
        return {row["id"]: decode(Pair, row) for row in rows}

    @property
    def bytes(self) -> int:
        """Room that it takes on disk."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())


def append_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """Add pairs that are seen for the first time."""
    for pair in pairs:
        files.append_row(folder / PAIRS, encode(pair)[0])


def check_room(folder: Path, needed: int, max_gib: float) -> None:
    """Refuse a trajectory that will not fit. ``needed``: bytes, as estimated.

    Raises:
        TrajectoryError: says by how much, and what to set.
    """
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(nearest).free
    for limit, what in ((max_gib * 2**30, f"the {max_gib:g} GiB of trajectory.max_gib"), (free, "what the disk has")):
        if needed > limit:
            raise TrajectoryError(
                f"the trajectory would take about {needed / 2**30:.3g} GiB, more than {what}. Next step: set "
                "trajectory.every higher (states in between are computed again), raise the limit, or "
                "trajectory.keep: false."
            )


def cut_after(folder: Path, step: int) -> None:
    """Drop what was recorded after ``step``: a training that goes on from a checkpoint there makes it anew."""
    for kind, path_of in (("state", state_file), ("step", step_file)):
        for number in numbers(folder, kind):
            if number > step:
                path_of(folder, number).unlink()
    (folder / STOPPED).unlink(missing_ok=True)
