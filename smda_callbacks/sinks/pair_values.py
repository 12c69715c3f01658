"""How the metrics of pairs are computed; like :mod:`smda_callbacks.sinks.metric_values`, for runs that attribute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from smda_callbacks.records import LINES, Array, PairBook, RunStart
from smda_callbacks.sinks.attribution import is_attributed
from smda_callbacks.sinks.metric_values import Reading
from smda_callbacks.sinks.pair_table import PairTable, table_of
from smda_callbacks.sinks.pair_totals import PairTotals

#: A window's ledger as it is logged; all but the last sum to the last.
LEDGER = ("pairs", "later", *LINES, "measured")


def harmful(behaviour: str) -> str:
    """The functional that is logged: mean over all probes to refuse."""
    return f"{behaviour}:harmful"


def attributes(start: RunStart) -> bool:
    """Whether the run attributes anything to pairs."""
    return is_attributed(start.manifest)


def has_ledger(start: RunStart) -> bool:
    """Whether the change of the probes to refuse is attributed to pairs."""
    return attributes(start) and any(harmful(each) in _functionals(start) for each in start.policy.behaviours)


def ledger(r: Reading) -> Array | None:
    """``[behaviour, line]`` of :data:`LEDGER`, for the probes to refuse; NaN where that is not attributed"""
    book = r.window.pairs
    if book is None:
        return None
    terms = {"pairs": book.share.sum(axis=0), "later": book.later_share.sum(axis=0), **book.lines}
    lines: Array = np.array([terms[name] for name in LEDGER])
    return np.array([_at(lines, _functionals(r.start), behaviour) for behaviour in r.start.policy.behaviours])


def _at(lines: Array, names: list[str], behaviour: str) -> Array:
    name = harmful(behaviour)
    return lines[:, names.index(name)] if name in names else np.full(len(lines), np.nan)


def of_book(compute: Callable[[PairBook], float]) -> Callable[[Reading], float | None]:
    """A number of the window's book; None where the window was not attributed."""
    return lambda r: None if r.window.pairs is None else compute(r.window.pairs)


def flagged(r: Reading) -> float | None:
    """Pairs of the window whose largest effect on a coefficient in it is unintended, and above the noise floor."""
    totals = PairTotals.at(r.start)
    table = None if totals is None else table_of(replace(totals, noise=r.noise).after(r.window))
    return None if table is None else float(table.flagged.sum())


def of_run(compute: Callable[[PairTable], float | None]) -> Callable[[Reading], float | None]:
    """A number of the run's pairs; None before the first attributed window."""
    return lambda r: None if r.pairs is None else compute(r.pairs)


def attributed_windows(r: Reading) -> float:
    """Windows of the run that were attributed to pairs."""
    return 0.0 if r.pairs is None else float(r.pairs.attributed)


def unexplained(r: Reading) -> Array | None:
    """``[behaviour]``: net unexplained change over net measured change of the probes to refuse, attributed windows"""
    table = r.pairs
    if table is None:
        return None
    lines, names = np.array([table.lines["unexplained"], table.lines["measured"]]), list(table.functionals)
    left, moved = np.abs([_at(lines, names, behaviour) for behaviour in r.start.policy.behaviours]).T
    return np.divide(left, moved, out=np.full_like(left, np.nan), where=moved != 0)


def top_interfering(table: PairTable) -> float | None:
    """Row number of the flagged pair with the largest interference; its first row where it has several."""
    rows = [row for row in np.flatnonzero(table.flagged) if table.pairs[row].rows]
    best = max(rows, key=lambda row: table.interference[row], default=None)
    return None if best is None else float(table.pairs[best].rows[0])


def _functionals(start: RunStart) -> list[str]:
    return list(start.manifest["attribution"]["functionals"])
