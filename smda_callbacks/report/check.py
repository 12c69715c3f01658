"""The outcome of a check, how the largest error is kept, and the checks as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from smda_callbacks.records import Array

#: Largest allowed error of a recomputed number, relative to the largest number of its kind: rounding, amplified by the
#: condition of the fit, stays far below.
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    ``largest_error``: relative to the largest number of its kind, at most ``tolerance`` where ``ok``; a count of faults
    where ``tolerance`` is 0. ``detail``: what was looked at, or the first place where it went wrong.
    """

    name: str
    largest_error: float
    tolerance: float
    ok: bool
    detail: str


def format_checks(checks: Iterable[Check]) -> str:
    """The checks as a text table, one line each, and a last line that sums up."""
    checks = list(checks)
    width = max((len(check.name) for check in checks), default=0)
    lines = [
        f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  error {check.largest_error:8.2g}"
        f"  allowed {check.tolerance:6.0g}  {check.detail}"
        for check in checks
    ]
    failed = [check.name for check in checks if not check.ok]
    summary = f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}" if failed else "all checks passed"
    return "\n".join([*lines, summary])


class Errors:
    """Keeps the largest of many relative errors, and where it was."""

    def __init__(self) -> None:
        self.largest, self.place = 0.0, ""

    def note(self, place: str, stored: ArrayLike | None, expected: Array, size: float) -> None:
        """Compare ``stored`` with ``expected``, relative to ``size``; a wrong shape or NaN is an infinite error."""
        values = np.asarray(np.nan if stored is None else stored, dtype=np.float64)
        same = values.shape == expected.shape
        error = float(np.max(np.abs(values - expected), initial=0.0)) / (size or 1.0) if same else float("inf")
        error = float("inf") if np.isnan(error) else error
        if error > self.largest:
            self.largest, self.place = error, place

    def check(self, name: str, detail: str) -> Check:
        ok = self.largest <= TOLERANCE
        return Check(name, self.largest, TOLERANCE, ok, detail if ok else f"largest error at: {self.place}")


def counted(name: str, faults: list[str], detail: str) -> Check:
    """A check that counts faults: none is allowed."""
    shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
    return Check(name, float(len(faults)), 0.0, not faults, shown if faults else detail)
