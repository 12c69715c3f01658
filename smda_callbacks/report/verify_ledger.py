"""The check of the ledger: are the books of the pairs about what was measured, and do they close?

Per attributed window and functional: ``measured`` as recomputed from the two snapshots that the window leads between,
and pairs, later, momentum, decay and unexplained sum to it. In an audit also: share and effect of the one pair are all
that was measured. Over the run: the pairs' totals and the lines sum to all that was measured in attributed windows.

``momentum`` and ``decay`` come from weights, which a store does not hold: they are checked in the sum only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from smda_callbacks.maths.ledger import balance_error
from smda_callbacks.records import LINES, Array, PairBook, WindowRecord
from smda_callbacks.report.check import Check
from smda_callbacks.sinks.attribution import Functionals, chained, functionals_of, is_audit, state_of, undescribed
from smda_callbacks.sinks.pair_table import pair_table
from smda_callbacks.sinks.store_reader import RunStore

#: Largest allowed error, relative to the size of the terms.
LEDGER_TOLERANCE = 1e-9


@dataclass
class _Errors:
    """The largest error of every line, and where the largest of all was."""

    functionals: Functionals
    size: Array  # [functional] size of the numbers that a functional is a difference of
    largest: dict[str, float] = field(default_factory=dict)
    worst: float = 0.0
    place: str = ""

    def note(self, line: str, error: float, place: str) -> None:
        """An error that is relative already; NaN is infinite."""
        error = float("inf") if np.isnan(error) else error
        self.largest[line] = max(error, self.largest.get(line, 0.0))
        if error > self.worst:
            self.worst, self.place = error, f"{line}, {place}"

    def compare(self, line: str, stored: Array, expected: Array, place: str, size: Array | None = None) -> None:
        """Compare ``[functional]``, relative to ``size`` where that is larger than the functionals' own."""
        errors = np.abs(stored - expected) / (self.size if size is None else np.maximum(size, self.size))
        worst = int(np.argmax(np.where(np.isnan(errors), np.inf, errors)))
        self.note(line, float(errors[worst]), f"{self.functionals.names[worst]}, {place}")


def check_ledger(store: RunStore, records: list[WindowRecord]) -> Check:
    """The check ``ledger``; ``records``: the baseline and all windows. The detail names the largest error of each line.

    A run that attributes nothing passes, and the detail says so. Raises ValueError where the manifest's functionals are
    not those of the run.
    """
    functionals, windows = functionals_of(store.start), records[1:]
    fault = _fault(store, windows, functionals)
    if fault or functionals is None:
        return _check(float("inf") if fault else 0.0, fault or "pairs are not attributed")
    errors = _Errors(functionals, _sizes(store, functionals))
    chain = list(chained(store.start, windows))
    total, attributed = np.zeros(len(functionals.names)), 0
    for before, window in chain:
        if window.pairs is not None:
            moved = functionals.moved(before, window)
            _check_book(window.pairs, moved, f"step {window.step}", errors, alone=is_audit(store.manifest))
            total, attributed = total + moved, attributed + 1
    if not is_audit(store.manifest):
        _check_run(store, windows, total, errors)
    if errors.worst > LEDGER_TOLERANCE:
        return _check(errors.worst, f"largest error at: {errors.place}")
    return _check(errors.worst, _said(store, attributed, len(chain), errors))


def _fault(store: RunStore, windows: list[WindowRecord], functionals: Functionals | None) -> str:
    """What is wrong with the books before any number is looked at; empty if nothing is."""
    booked = [window for window in windows if window.pairs is not None]
    if booked and functionals is None:
        return f"the manifest attributes nothing, but the window of step {booked[0].step} has a book"
    for window in booked:
        if window.status != "ok":
            return f"the window of step {window.step} is {window.status} but has a book"
        if functionals is not None and not _has_shape(window.pairs, len(functionals.names)):
            return f"the book of step {window.step} is not on the manifest's {len(functionals.names)} functionals"
    lost = undescribed(windows)
    return f"pair {lost[0]} is in a book but described by no window ({len(lost)} such pairs)" if lost else ""


def _has_shape(book: PairBook | None, functionals: int) -> bool:
    if book is None or any(name not in book.lines for name in (*LINES, "measured")):
        return False
    own, later = (len(book.ids), functionals), (len(book.later_ids), functionals)
    found = [book.share.shape, book.effect.shape, book.later_share.shape, book.later_effect.shape]
    return found == [own, own, later, later] and all(line.shape == own[1:] for line in book.lines.values())


def _check_book(book: PairBook, moved: Array, place: str, errors: _Errors, *, alone: bool) -> None:
    """Note the errors of one window's book, where ``moved`` ``[functional]`` was measured."""
    errors.compare("measured", book.lines["measured"], moved, place)
    terms = [*book.share, *book.later_share, book.lines["momentum"], book.lines["decay"]]
    size = np.abs([*terms, book.lines["unexplained"]]).sum(axis=0)
    errors.compare("unexplained", book.lines["unexplained"], moved - np.sum(terms, axis=0), place, size)
    errors.note("balance", balance_error(book.lines, book.share, book.later_share), place)
    if alone:
        errors.compare("share", book.share.sum(axis=0), moved, place)
        errors.compare("effect", book.effect.sum(axis=0), moved, place)


def _check_run(store: RunStore, windows: list[WindowRecord], total: Array, errors: _Errors) -> None:
    """Note the error of the run's totals against all that was measured in attributed windows."""
    table = pair_table(store.start, windows)
    if table is not None:
        terms = [*table.share, *(table.lines[line] for line in LINES)]
        size: Array = np.abs(terms).sum(axis=0)
        errors.compare("totals", np.sum(terms, axis=0), total, "the whole run", size)


def _sizes(store: RunStore, functionals: Functionals) -> Array:
    """``[functional]``: the largest coefficient, or the largest behaviour, at least 1."""
    coef = float(np.max(np.abs(store.policy.coef), initial=0.0)) or 1.0
    behaviour = max(1.0, float(np.max(np.abs(state_of(store.baseline).y), initial=0.0)))
    return np.array([coef if name.startswith("feature:") else behaviour for name in functionals.names])


def _said(store: RunStore, attributed: int, booked: int, errors: _Errors) -> str:
    engine, names = store.manifest["attribution"]["engine"], len(errors.functionals.names)
    found = ", ".join(f"{line} {error:.1e}" for line, error in errors.largest.items())
    detail = f"{attributed} of {booked} windows attributed ({engine}), {names} functionals"
    detail += f"; the change of the other {booked - attributed} is in no account" if attributed < booked else ""
    return detail + (f"; largest error of {found}" if found else "")


def _check(error: float, detail: str) -> Check:
    return Check("ledger", error, LEDGER_TOLERANCE, error <= LEDGER_TOLERANCE, detail)
