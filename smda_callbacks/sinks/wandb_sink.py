"""Send a run to Weights & Biases: a view of the run store, never its replacement.

Rules, each for a measured reason (wandb 0.31):

* Scalars go out directly, they never wait. Tables, plots, artifacts, alerts and the start and end of a run of our own
  wait for the server, so one daemon thread does them, behind a queue that drops what it cannot take. What is logged
  before the run is open is sent once it is. See :mod:`smda_callbacks.sinks.wandb_channel`.
* A server that is gone costs a run ``finish_timeout`` seconds, start, end and the end of the process together. A run of
  somebody else's ends as it was set up to; the sink does not wait for that.
* Every call is wrapped: a W&B that fails costs one warning, then silence, and nothing in training.
* Rows carry ``train/global_step`` and no ``step=``; metrics are defined by their exact names.
* A run that somebody else opened is used and left open; a run of our own is finished.
* Texts of probes and training pairs stay here unless ``log_text`` says otherwise.
* Alerts go out offline, and online only straight after a call that the server answered: see
  :func:`smda_callbacks.sinks.wandb_run.send_alert`. They are counted in ``smda/alerts/count`` in any case.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord
from smda_callbacks.sinks import files, wandb_media, wandb_run, wandb_tables
from smda_callbacks.sinks.metric_values import Progress, progress_of
from smda_callbacks.sinks.metrics import ALERTS, STEP, rows_of_window, summary_of_progress
from smda_callbacks.sinks.past import Past
from smda_callbacks.sinks.wandb_channel import Channel
from smda_callbacks.sinks.wandb_opening import Opener
from smda_callbacks.sinks.wandb_policy import log_policy
from smda_callbacks.sinks.wandb_private import LogText
from smda_callbacks.sinks.wandb_sent import Into, Sent
from smda_callbacks.sinks.wandb_tables import Table

logger = logging.getLogger("smda_callbacks")


class WandbSink:
    """Logs into the run that is open at the first write (Hugging Face's own, for example), else into a new one.

    Args:
        project, mode: of a run of our own; the environment (``WANDB_PROJECT``, ``WANDB_MODE``) and W&B's settings file
            go before them. Without any, the project is ``smda`` and the mode W&B's default.
        tables_every: tables and plots at every so many windows, and at the start and the end.
        log_text: what is sent of the text of probes and pairs: ``none``, ``hash`` (16 hex digits of SHA-256), ``full``.
        store_path: run store to send as artifacts, the policy at the start and the whole at the end; None sends none.
        logged_path: file to which everything handed to W&B is appended, as ``{"step", "row"}`` or
            ``{"step", "summary"}``; default: ``logged.jsonl`` in the run store, if there is one.
        past: the earlier part of the run, where it goes on from a checkpoint: in the same W&B run where W&B can, else
            in one whose configuration names the earlier one as ``smda_continues``.
        into: the run of W&B's to send to, and what it has already: a stored run is sent afterwards.
        alerts: whether alerts may be raised in W&B.
        finish_timeout: seconds that ``close`` may wait for what is still on its way, all that training waits for W&B.
        queue_size: tables, plots, alerts and artifacts that may wait; more are dropped.
    """

    def __init__(
        self,
        project: str | None = None,
        mode: str | None = None,
        *,
        tables_every: int = 10,
        log_text: LogText = "none",
        store_path: Path | None = None,
        logged_path: Path | None = None,
        past: Past | None = None,
        into: Into | None = None,
        alerts: bool = True,
        finish_timeout: float = 9.0,
        queue_size: int = 32,
    ) -> None:
        wandb_run.check_options(mode, tables_every, log_text, finish_timeout, queue_size)
        self.project, self.mode, self.tables_every, self.log_text = project, mode, tables_every, log_text
        self.store_path, self.alerts, self.finish_timeout = store_path, alerts, finish_timeout
        self.logged_path = logged_path or (store_path / files.LOGGED if store_path else None)
        self._past, self._into, self._sent = past, into, into.sent if into else Sent()
        self.failures, self.first_failure = 0, ""  # calls that raised
        self._lock = threading.Lock()  # of the count of failures
        self._log_lock = threading.Lock()  # the worker writes to logged.jsonl too
        self._start: RunStart | None = None
        self._opener = Opener(project, mode, past, into, self._guard)
        self._channel = Channel(self._opener.opening, self._failed, queue_size)
        self._begun = self._closed = False
        self._alerts_sent = Counter(self._sent.alerts)
        self._windows = 0
        self._tables_at: int | None = None  # step of the last tables that were queued

    @property
    def dropped(self) -> int:
        """Tables, plots, alerts and artifacts that found the queue full; rows that waited too long for a run."""
        return self._channel.dropped

    @property
    def run(self) -> Any:
        """W&B's run; None before there is one."""
        return self._channel.run

    def open(self, start: RunStart) -> None:
        """Check the names of the metrics; W&B is not touched before the first write.

        Raises ValueError where two metrics would get one name, and for a second run in one sink.
        """
        if self._start is not None:
            raise ValueError("this WandbSink was opened before; it takes one run. Make a new one for every run.")
        past = self._past
        start = start if past is None else past.store.start
        self._opener.take(start, self.logged_path)
        self._progress = progress_of(start, () if past is None else past.windows())
        self._windows = 0 if past is None else past.windows_so_far
        self._start = start

    def write(self, window: WindowRecord) -> None:
        """Send the metrics of a window and its alerts, and the tables when they are due."""
        start = self._opened()
        self._progress = self._progress.after(window)
        self._windows += 1
        if not self._reaches(start):
            return
        self._log(lambda: rows_of_window(window, start, self._progress), window.step)
        if self._windows % self.tables_every == 0:
            self._submit_tables(start, self._progress)
        for alert in window.alerts:
            self._submit_alert(start, alert)

    def alert(self, alert: Alert) -> None:
        """Count and send an alert that belongs to no window."""
        start = self._opened()
        if self._reaches(start):
            if self._alerts_sent[alert.step] > 0:
                self._alerts_sent[alert.step] -= 1
            else:
                self._send_row({ALERTS: 1.0, STEP: alert.step}, alert.step)
            self._submit_alert(start, alert)

    def close(self, end: RunEnd) -> None:
        """Send the summary, the last tables and the store; finish the run if it is our own; wait, but not for long."""
        if self._closed or self._start is None:
            return
        self._closed = True
        if self._begun:
            self._guard("sending the summary", lambda: self._send_summary(end.step))
            self._submit_end(self._start, end)
        if not self._channel.close(0 if end.status == "finished" else 1, self.finish_timeout):
            gone = "the W&B server is gone, and the run was given up there"
            slow = f"not everything was sent within {self.finish_timeout:g} s; it goes on in the background"
            self._failed("closing", TimeoutError(gone if self._channel.let_go else slow))
        logger.debug("W&B: %d calls failed, %d were dropped", self.failures, self.dropped)

    def _opened(self) -> RunStart:
        if self._start is None or self._closed:
            state = "closed" if self._closed else "not open"
            raise ValueError(
                f"this WandbSink is {state}; records go in between open and close. Call open(start) first."
            )
        return self._start

    def _reaches(self, start: RunStart) -> bool:
        """Whether there may be a run to send to; begins to look for one, once, and sends what is known at the start."""
        if not self._begun:
            self._begun = True
            self._guard("reading wandb.json", self._opener.look_back)
            if not self._opener.before:
                self._send_start(start)
        return not self._channel.failed

    def _send_start(self, start: RunStart) -> None:
        """What is known before the first step."""
        before = Progress.at(start)
        self._log(lambda: rows_of_window(start.baseline, start, before), start.baseline.step)
        self._submit_tables(start, before)
        self._submit_gaps(start.gaps, start.baseline.step)
        store = self.store_path
        if store is not None and wandb_run.kind_of("policy") not in self._sent.artifacts:
            self._channel.submit("sending the policy", lambda: log_policy(self.run, store, start))

    def _log(self, build: Callable[[], Mapping[str, float]], step: int) -> None:
        if step not in self._sent.rows:
            self._guard("computing metrics", lambda: self._send_row({**build(), STEP: step}, step))

    def _send_row(self, row: Mapping[str, float], step: int) -> None:
        def send() -> None:
            self._note(step, "row", row)
            self.run.log(row)

        self._channel.direct("logging metrics", send)

    def _send_summary(self, step: int) -> None:
        assert self._start is not None
        values = summary_of_progress(self._start, self._progress)

        def send() -> None:
            self._note(step, "summary", values)
            self.run.summary.update(values)

        if not self._sent.has_summary(values):
            self._channel.direct("sending the summary", send)

    def _submit_tables(self, start: RunStart, done: Progress, *, always: bool = False) -> None:
        step = done.last.step
        if step == self._tables_at:
            return
        queued = []
        for medium in wandb_media.media_of(start):
            build = partial(medium.build, start, done, self.log_text)
            send = wandb_run.log_bars if medium.is_plot else wandb_run.log_table
            if (medium.history_key, step) not in self._sent.tables:
                queued.append(self._submit_table(medium.key, build, step, send, always=always))
        self._tables_at = step if all(queued) else None

    def _submit_table(
        self,
        key: str,
        build: Callable[[], Table],
        step: int,
        send: Callable[[Any, str, Table, int], None] = wandb_run.log_table,
        *,
        always: bool = False,
    ) -> bool:
        return self._channel.submit(f"sending {key}", lambda: self._send_table(key, build(), step, send), always=always)

    def _submit_gaps(self, gaps: Sequence[Mapping[str, Any]], step: int, *, always: bool = False) -> None:
        if gaps and (wandb_media.GAPS, step) not in self._sent.tables:
            self._submit_table(wandb_media.GAPS, lambda: wandb_tables.gaps_table(gaps), step, always=always)

    def _send_table(self, key: str, table: Table, step: int, send: Callable[[Any, str, Table, int], None]) -> None:
        self._note(step, "row", {key: vars(table), STEP: step})
        send(self.run, key, table, step)

    def _submit_alert(self, start: RunStart, alert: Alert) -> None:
        if not self.alerts:
            return
        done = self._progress

        def reach_server() -> None:
            table = wandb_tables.categories_table(start, done)
            self._send_table(wandb_media.CATEGORIES, table, done.last.step, wandb_run.log_table)

        self._channel.submit("sending an alert", lambda: wandb_run.send_alert(self.run, alert, reach_server))

    def _submit_end(self, start: RunStart, end: RunEnd) -> None:
        self._submit_tables(start, self._progress, always=True)
        self._submit_gaps(end.gaps, end.step, always=True)
        store = self.store_path
        has_it = wandb_run.kind_of("store") in self._sent.artifacts and not self._channel.opened
        if store is not None and not has_it:  # a store that anything else is missing of has grown since
            send = lambda: wandb_run.log_store(self.run, store, start, self.log_text)  # noqa: E731
            self._channel.submit("sending the run store", send, always=True)

    def _note(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append what is about to be handed to W&B to ``logged.jsonl``; a full disk does not keep it from W&B."""
        path = self.logged_path
        if path is not None:
            with self._log_lock:
                self._guard(f"writing {path}", lambda: files.append_row(path, {"step": step, kind: values}))

    def _guard(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # W&B is a view: whatever it raises, training goes on
            self._failed(what, error)

    def _failed(self, what: str, error: Exception) -> None:
        with self._lock:
            self.failures += 1
            self.first_failure = self.first_failure or f"{what} failed ({type(error).__name__}: {error})"
        if self.failures == 1 and self._into is None:
            logger.warning(
                "W&B: %s. Training goes on and the run store has everything; further failures are counted in silence. "
                "Once W&B answers: smda wandb sync %s",
                self.first_failure,
                self.logged_path.parent if self.logged_path else "RUN",
            )
