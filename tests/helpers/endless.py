"""A writer that goes on until it is killed: ``python -m tests.helpers.endless FOLDER``."""

from __future__ import annotations

import itertools
import sys

import numpy as np

from smda_callbacks.records import PATHWAYS, Alert, Snapshot, WindowRecord
from smda_callbacks.sinks.store import StoreSink
from tests.helpers.runs import make_run


def numbered_window(step: int) -> WindowRecord:
    """A window whose numbers follow from ``step`` alone, large enough that writing it takes a while."""
    rng = np.random.default_rng(step)
    pre = rng.normal(size=(200, 50))
    return WindowRecord(
        step=step, first_step=step, skipped=(), status="ok", seconds=float(rng.uniform()),
        snapshot=Snapshot(step, pre, (pre > 0).astype(float), rng.uniform(size=(200, 1))),
        coef=rng.normal(size=(50, 1)), shift={part: rng.normal(size=(50, 1)) for part in PATHWAYS},
        trainer={"loss": float("nan") if step % 3 == 0 else float(rng.uniform())},
    )  # fmt: skip


def numbered_alert(step: int) -> Alert:
    """An alert whose text follows from ``step`` alone."""
    return Alert(step, "made_up", f"alert of step {step} " + "x" * (step % 50))


def main(folder: str) -> None:
    """Open a store, say so, and write one window and one alert per step for ever."""
    sink = StoreSink(folder)
    sink.open(make_run(windows=0).start)
    print("open", flush=True)
    for step in itertools.count(1):
        sink.alert(numbered_alert(step))
        sink.write(numbered_window(step))


if __name__ == "__main__":
    main(sys.argv[1])
