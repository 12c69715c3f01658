"""The metrics of a run to TensorBoard, MLflow or trackio: what fits in one number, under the names of metrics.py.

Tables of pairs and plots stay in the run store and its report. A run that the trainer's own integration opened is used
and left open. A tracker that fails costs one warning and nothing in training: :class:`TrackerSink` guards every call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord
from smda_callbacks.sinks.metric_values import Progress, progress_of
from smda_callbacks.sinks.metrics import STEP, rows_of_window, summary_of_progress
from smda_callbacks.sinks.past import Past

logger = logging.getLogger("smda_callbacks")

TrackerName = Literal["tensorboard", "mlflow", "trackio"]


@dataclass(frozen=True)
class Client:
    """What is needed of a tracker. ``log`` takes a row and its step, ``alert`` a step and a text."""

    log: Callable[[Mapping[str, float], int], object]
    alert: Callable[[int, str], object]
    close: Callable[[], object]


class TrackerSink:
    """Logs the rows that W&B would get.

    Args:
        name: see :data:`TRACKERS`.
        folder: where a tracker that writes files puts them.
        project: of a run of our own, where the trainer opened none.
        past: the earlier part of a run that goes on from a checkpoint.
    """

    def __init__(self, name: TrackerName, folder: Path, *, project: str = "smda", past: Past | None = None) -> None:
        if name not in TRACKERS:
            raise ValueError(
                f"there is no tracker {name!r}. Available: {', '.join(TRACKERS)}; W&B has a sink of its own."
            )
        self.name, self.folder, self.project, self._past = name, folder, project, past
        self.failures = 0  # calls that raised
        self._client: Client | None = None
        self._closed = False

    def open(self, start: RunStart) -> None:
        """The client itself is opened at the first row: only then has the trainer opened its own run.

        Raises ValueError where the tracker is not installed.
        """
        package = TRACKERS[self.name].package
        if find_spec(package) is None:
            raise ValueError(
                f"the tracker {self.name} is not installed. Next step: pip install {package}, or leave it out of "
                "trackers."
            )
        self._start = start
        self._progress = progress_of(start, () if self._past is None else self._past.windows())
        self._fresh = self._past is None

    def write(self, window: WindowRecord) -> None:
        """Log the metrics of a window, and its alerts."""
        if self._fresh:
            self._fresh = False
            self._log_start(self._start)
        self._progress = self._progress.after(window)
        self._log(lambda: rows_of_window(window, self._start, self._progress), window.step)
        for alert in window.alerts:
            self.alert(alert)

    def _log_start(self, start: RunStart) -> None:
        before = Progress.at(start)
        self._log(lambda: rows_of_window(start.baseline, start, before), start.baseline.step)

    def alert(self, alert: Alert) -> None:
        """Log an alert, as text where the tracker has a place for it."""
        self._guard(lambda client: client.alert(alert.step, f"step {alert.step}: {alert.message}"))

    def close(self, end: RunEnd) -> None:
        """Log the summary as a last row; close a run of our own."""
        if self._closed:
            return
        self._closed = True
        self._log(lambda: summary_of_progress(self._start, self._progress), end.step)
        self._guard(lambda client: client.close())

    def _log(self, build: Callable[[], Mapping[str, float]], step: int) -> None:
        self._guard(lambda client: client.log({**build(), STEP: float(step)}, step))

    def _guard(self, call: Callable[[Client], object]) -> None:
        try:
            if self._client is None:
                self._client = TRACKERS[self.name].open(self._start, self.folder, self.project)
            call(self._client)
        except Exception as error:  # a view, like W&B: whatever it raises, training goes on
            self.failures += 1
            if self.failures == 1:
                logger.warning(
                    "%s failed (%s: %s). Training goes on and the run store has everything; further failures are "
                    "counted in silence.",
                    self.name,
                    type(error).__name__,
                    error,
                )


@dataclass(frozen=True)
class _Tracker:
    package: str
    open: Callable[[RunStart, Path, str], Client]


def _tensorboard(start: RunStart, folder: Path, project: str) -> Client:
    """Event files of our own beside the trainer's: ``tensorboard --logdir`` shows both."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))

    def add(summary: Any, step: int) -> None:
        writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def log(row: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != STEP]
        add(Summary(value=values), step)

    return Client(log, lambda step, text: add(text_pb("smda/alerts", text), step), writer.close)


def _mlflow(start: RunStart, folder: Path, project: str) -> Client:
    """The active run, else one of our own. MLflow has no alerts: they are counted in ``smda/alerts/count``."""
    import mlflow

    run = mlflow.active_run()
    own = run is None
    run = run or mlflow.start_run(run_name=start.manifest["run_id"])

    def log(row: Mapping[str, float], step: int) -> None:
        values = {name: value for name, value in row.items() if name != STEP}
        # By its id: the trainer's integration ends its run before the last row is here, and a new one would be opened.
        mlflow.log_metrics(values, step=step, synchronous=False, run_id=run.info.run_id)

    return Client(log, lambda step, text: None, mlflow.end_run if own else mlflow.flush_async_logging)


def _trackio(start: RunStart, folder: Path, project: str) -> Client:
    """The run that is open, else one of our own. Its own x axis counts rows, so every row carries the step."""
    import trackio

    run = trackio.context_vars.current_run.get()
    own = run is None
    if run is None:
        run = trackio.init(project=project, name=start.manifest["run_id"])

    def alert(step: int, text: str) -> None:
        run.alert(title="SMDA", text=text, level=trackio.AlertLevel.WARN)

    return Client(lambda row, step: run.log(dict(row), step=step), alert, run.finish if own else lambda: None)


#: Name -> the package to install, and how its client is opened.
TRACKERS: Mapping[TrackerName, _Tracker] = {
    "tensorboard": _Tracker("tensorboard", _tensorboard),
    "mlflow": _Tracker("mlflow", _mlflow),
    "trackio": _Tracker("trackio", _trackio),
}
