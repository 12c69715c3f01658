"""Keep a run's records in memory: for tests, notebooks and short runs."""

from __future__ import annotations

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord


class MemorySink:
    """Holds the very objects it was handed, nothing copied.

    ``start`` and ``end`` are None until the run has opened and closed. ``windows`` are in order, without the baseline
    (which is ``start.baseline``). ``alerts`` are those outside a window.
    """

    def __init__(self) -> None:
        self.start: RunStart | None = None
        self.windows: list[WindowRecord] = []
        self.alerts: list[Alert] = []
        self.end: RunEnd | None = None

    def open(self, start: RunStart) -> None:
        """Keep ``start``. Raises ValueError if this object already holds a run."""
        if self.start is not None:
            raise ValueError(
                f"this MemorySink already holds run {self.start.manifest.get('run_id')!r}; it takes one run. "
                "Make a new MemorySink for every run."
            )
        self.start = start

    def write(self, window: WindowRecord) -> None:
        """Append ``window``."""
        self.windows.append(window)

    def alert(self, alert: Alert) -> None:
        """Append ``alert``."""
        self.alerts.append(alert)

    def close(self, end: RunEnd) -> None:
        """Keep the first ``end``."""
        if self.end is None:
            self.end = end
