"""What every sink can do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord


@runtime_checkable
class Sink(Protocol):
    """Receives the records of one run, in the order in which things happen: one sink object, one run.

    ``open`` is the place to refuse: it is called before the first optimizer step, and whatever is wrong with the
    destination must raise there and not later. After ``open`` come ``write`` and ``alert`` in any number, then
    ``close``. ``close`` may be called twice, and after a failure of any other method, and must leave behind what was
    written so far.
    """

    def open(self, start: RunStart) -> None:
        """Take what is known before the first optimizer step. Raises ValueError where this run cannot be recorded."""

    def write(self, window: WindowRecord) -> None:
        """Take the record of one window of optimizer steps; the alerts inside it are not sent again."""

    def alert(self, alert: Alert) -> None:
        """Take an alert that belongs to no window."""

    def close(self, end: RunEnd) -> None:
        """Take how the run ended and let go of every resource. A second call does nothing."""
