"""When to measure so that watching takes no more than a set share of the run's wall time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Budget:
    """Says whether a measurement is due: every ``every`` optimizer steps, and later where ``share`` would be exceeded.

    ``share``: of the wall time since training began, start-up excluded, that measurements may take; None: any. What
    the next measurement costs is taken from the last five. The clock counts seconds.
    """

    every: int
    share: float | None = None
    clock: Callable[[], float] = time.perf_counter
    spent: float = 0.0  # seconds of all measurements so far
    _began: float | None = None
    _elapsed: float = 0.0  # before this training: of the one that it goes on with
    _last: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    def begin(self) -> None:
        """Training starts now, or goes on."""
        self._began = self.clock() - self._elapsed

    def state(self) -> dict[str, Any]:
        """What :meth:`go_on` needs, as JSON."""
        elapsed = 0.0 if self._began is None else self.clock() - self._began
        return {"spent": self.spent, "elapsed": elapsed, "last": list(self._last)}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Go on where another training was when it gave ``state``; empty: from nothing. Call before ``begin``."""
        self.spent, self._elapsed = float(state.get("spent", 0.0)), float(state.get("elapsed", 0.0))
        self._last.extend(float(each) for each in state.get("last", ()))

    def note(self, seconds: float) -> None:
        """A measurement took so long."""
        self.spent += seconds
        self._last.append(seconds)

    def is_due(self, steps: int) -> bool:
        """Whether to measure now, ``steps`` optimizer steps after the last measurement."""
        if steps < self.every:
            return False
        if self.share is None or self._began is None or not self._last:
            return True
        # What the next one takes belongs to the time that it may take a share of.
        next_one = median(self._last)
        return self.spent + next_one <= self.share * (self.clock() - self._began + next_one)

    @property
    def taken(self) -> float | None:
        """The share of the wall time that measurements took so far; None before training."""
        if self._began is None:
            return None
        elapsed = self.clock() - self._began
        return self.spent / elapsed if elapsed > 0 else 0.0
