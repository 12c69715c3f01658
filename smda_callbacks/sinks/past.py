"""What a run store holds up to the step of a checkpoint: what a training that goes on from there starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from smda_callbacks.records import Alert, Pair, WindowRecord
from smda_callbacks.sinks import files
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.store_reader import RunStore


@dataclass(frozen=True)
class Past:
    """The run in ``store`` up to ``step``; what it has of later steps is passed over.

    ``last``: the last ok record, the baseline if there is none: the next window's shift leads from its snapshot.
    ``booked``: last step of the last window of any status; the next window's steps begin after it.
    ``windows_so_far``: their number; ``measured``: that of the ok ones. ``seconds``: wall time of all windows.
    ``told``: alerts so far. ``pairs``: those described so far, by number.
    """

    store: RunStore
    step: int
    last: WindowRecord
    booked: int
    windows_so_far: int
    measured: int
    seconds: float
    told: tuple[Alert, ...]
    pairs: Mapping[int, Pair]

    def windows(self) -> Iterator[WindowRecord]:
        """The windows up to ``step``, in order and of any status, read one after another."""
        return _windows(self.store, self.step)


def read_past(folder: str | Path, step: int) -> Past:
    """The past of the run in ``folder``, as a training that goes on at ``step`` finds it.

    Raises StoreError where the folder cannot be read, or its run starts after ``step``.
    """
    store = RunStore.open(folder)
    if step < store.baseline.step:
        raise StoreError(f"{folder} starts at step {store.baseline.step}, after the step {step} to go on from.")
    last, booked, count, measured, seconds = store.baseline, store.baseline.step, 0, 0, 0.0
    pairs: dict[int, Pair] = {}
    for window in _windows(store, step):
        booked, count, seconds = window.step, count + 1, seconds + window.seconds
        pairs |= {pair.id: pair for pair in window.pairs_seen}
        if window.status == "ok":
            last, measured = window, measured + 1
    told = tuple(alert for alert in store.alerts() if alert.step <= step)
    return Past(store, step, last, booked, count, measured, seconds, told, pairs)


def _windows(store: RunStore, step: int) -> Iterator[WindowRecord]:
    for each in files.list_steps(store.path):
        if store.baseline.step < each <= step:
            yield store.window(each)
