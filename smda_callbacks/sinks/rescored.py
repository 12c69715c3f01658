"""Influence of every pair on the end of a run, as ``smda rescore`` found it: the record, and its file in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.records import Array
from smda_callbacks.sinks import files
from smda_callbacks.sinks.trajectory import TrajectoryError

FOLDER = "rescore"
RESULT, PARTIAL = "rescored.safetensors", "partial.safetensors"


@dataclass(frozen=True)
class Verified:
    """How the recorded run was gone through again.

    ``steps``: that were made again. ``exact``: all bits were those recorded. ``worst``: largest distance of the weights
    over how far the steps moved them, after step ``worst_step``. ``gradient_error``: largest relative distance of the
    plain loss's gradient from the trainer's.
    """

    steps: tuple[int, ...]
    exact: bool
    worst: float
    worst_step: int | None
    gradient_error: float


@dataclass(frozen=True)
class Rescored:
    """Influences on a run's final state: what came out with the pair minus what would have come out without it.

    First order in leaving the pair out of the loss (its weight there goes from 1 to 0, all else stays as it was), exact
    in what follows from that. ``measured`` is the exact change of every target from the start of the run to its end:
    the influences of all pairs do not sum to it, for a training without any pair is far from first order. What they sum
    to is the derivative by the size of the loss. Clipping, where it is active in every step, and Adam, but for its eps
    and second moments that are still filling, take the size out: there the sum is nearly zero, as it should be.
    """

    run_id: str
    targets: tuple[str, ...]
    ids: NDArray[np.int64]  # [pair] numbers of records.Pair, ascending
    influence: Array  # [pair, target] in the target's units
    exposures: NDArray[np.int64]  # [pair] how often it went through a step
    measured: Array  # [target]
    first_step: int  # the state that the trajectory begins with; steps before are in nobody's influence
    last_step: int
    seconds: float  # wall time of the passes backward; check and reading are not in it
    train_seconds: float  # wall time of the recorded steps in training
    verified: Verified
    versions: Mapping[str, Any]

    @property
    def total(self) -> Array:
        """Sum over the pairs, ``[target]``."""
        found: Array = self.influence.sum(axis=0)
        return found


def result_file(run: Path) -> Path:
    """Where the result lies in the run store ``run``."""
    return run / FOLDER / RESULT


def write_rescored(run: Path, record: Rescored) -> None:
    """Write the result, whole or not at all, in place of an earlier one."""
    result_file(run).parent.mkdir(exist_ok=True)
    files.write_record(result_file(run), record)


def find_rescored(run: Path) -> Rescored | None:
    """The result in the run store ``run``; None where it was not rescored. Raises StoreError where it is damaged."""
    return read_rescored(run) if result_file(run).exists() else None


def read_rescored(run: str | Path) -> Rescored:
    """The result in the run store ``run``.

    Raises:
        TrajectoryError: there is none. StoreError: it is damaged.
    """
    path = result_file(Path(run))
    if not path.exists():
        raise TrajectoryError(f"{run} has not been rescored. Next step: smda rescore {run}.")
    record: Rescored = files.read_record(path, Rescored)
    return record
