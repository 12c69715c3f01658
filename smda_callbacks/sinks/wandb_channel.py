"""The way to a W&B run: opened without waiting, used in order, closed within a bounded time.

Opening a run waits for the server, and so do tables, plots, artifacts, alerts and the end of a run of our own: one
thread does these. Rows and the summary never wait (wandb 0.31) and go out directly, but not before the run is open:
until then they are kept, and sent first of all, in their order.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from smda_callbacks.sinks import wandb_server
from smda_callbacks.sinks.wandb_server import ANSWERS_WITHIN, Pulse, ServerGoneError
from smda_callbacks.sinks.wandb_worker import Task, Worker

logger = logging.getLogger("smda_callbacks")

#: Calls that are kept while a run is being opened; a row has some hundred numbers.
MOST_KEPT = 1000

#: Seconds of silence after which a closing channel asks whether the server is there at all.
QUICK = 2.0

#: Seconds that asking the server at last, and letting go of the run, may take.
RESERVE = ANSWERS_WITHIN + 1.0

#: Seconds that the end of the process may take where a server answers but is slow.
SLOW = 60.0


@dataclass(frozen=True)
class Opening:
    """How a run is found. ``here``: the run that is open, never waits; ``start``: a run of our own; ``introduce(run,
    own)``: what it is told first."""

    here: Callable[[], Any]
    start: Callable[[], Any]
    introduce: Callable[[Any, bool], object]


class Channel:
    """Hands calls to one W&B run; ``on_error(what, error)`` is told of every one that raises."""

    def __init__(self, opening: Opening, on_error: Callable[[str, Exception], None], queue_size: int) -> None:
        self.run: Any = None
        self.own = self.opened = False
        self.failed = False  # no run could be had
        self.let_go = False  # of a run of our own, because the server was gone
        self._opening, self._told = opening, on_error
        self._worker = Worker(self._on_error, queue_size)
        self._pulse = Pulse(lambda: wandb_server.server_of(self.run))
        self._lock = threading.RLock()
        self._kept: list[tuple[str, Task]] | None = None  # None: calls go out directly
        self._too_many = 0
        self._finished = self._ending = False

    @property
    def dropped(self) -> int:
        """Calls that found the queue full, or too many kept before them."""
        return self._worker.dropped + self._too_many

    def direct(self, what: str, call: Task) -> None:
        """Make a call that never waits, now or as soon as there is a run."""
        self._open()
        with self._lock:
            if self._kept is not None:
                if len(self._kept) < MOST_KEPT:
                    self._kept.append((what, call))
                else:
                    self._too_many += 1
                return
        if self.run is not None:
            self._guard(what, call)

    def submit(self, what: str, call: Task, *, always: bool = False) -> bool:
        """Queue a call that may wait; False where it was dropped. It fails at once while the server is gone."""
        self._open()
        return self._worker.submit(what, lambda: self._blocking(call), always=always)

    def close(self, exit_code: int, patience: float) -> bool:
        """Finish a run of our own and wait, ``patience`` seconds at most; False where something was left undone.

        A run of our own whose server is gone is let go of, for the process would not end otherwise. With a server that
        is only slow it goes on in the background, and the end of the process waits for it, a minute at most.
        """
        if not self.opened:
            return True
        until = monotonic() + patience
        if self.own:
            self._worker.submit("finishing the run", lambda: self._finish(exit_code), always=True)
        done = self._worker.close(min(QUICK, patience))
        if not done and self._pulse.beats():
            done = self._worker.close(max(until - monotonic() - RESERVE, 0.0))
        if not done and self._pulse.beats():
            done = self._worker.close(max(until - monotonic(), 0.0))
        if self.own and not self._finished and not self._pulse.beats():
            self._let_go()
        return done and not self.let_go

    def _open(self) -> None:
        """Look for a run or begin to start one, once."""
        if self.opened:
            return
        self.opened = True
        try:
            self.run = self._opening.here()
        except Exception as error:
            self.failed = True
            self._on_error("starting the run", error)
            return
        if self.run is not None:
            self._guard("introducing the run", lambda: self._opening.introduce(self.run, False))
            return
        self.own, self._kept = True, []
        atexit.register(self._at_exit)
        self._worker.submit("starting the run", self._start, always=True)

    def _start(self) -> None:
        """In the worker: open a run of our own and send it what was kept."""
        try:
            self.run = self._opening.start()
            atexit.unregister(self._at_exit)
            atexit.register(self._at_exit)  # behind W&B's own, so that it runs before
            self._guard("introducing the run", lambda: self._opening.introduce(self.run, True))
        finally:
            with self._lock:
                for what, call in self._kept or () if self.run is not None else ():
                    self._guard(what, call)
                self._kept = None
                self.failed = self.run is None

    def _blocking(self, call: Task) -> None:
        if self.run is None:
            return
        if not self._pulse.beats():
            raise ServerGoneError("the W&B server does not answer")
        call()

    def _finish(self, exit_code: int) -> None:
        def finish() -> None:
            self.run.finish(exit_code=exit_code)
            self._finished = True
            atexit.unregister(self._at_exit)

        if self.failed:  # nothing was started
            self._finished = True
            atexit.unregister(self._at_exit)
        self._blocking(finish)

    def _let_go(self) -> None:
        self._ending = True  # calls that this breaks off are no news
        self.let_go = wandb_server.let_go(self.run)
        self._finished = True
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        """Runs before W&B's own end, which waits without a bound."""
        if self._finished:
            return
        self._worker.submit("finishing the run", lambda: self._finish(1), always=True)
        self._worker.close(SLOW if self._pulse.beats() else 0.0)
        if not self._finished:
            self._let_go()

    def _on_error(self, what: str, error: Exception) -> None:
        if not self._ending:
            self._told(what, error)

    def _guard(self, what: str, call: Task) -> None:
        try:
            call()
        except Exception as error:  # W&B is a view: whatever it raises, training goes on
            self._on_error(what, error)
