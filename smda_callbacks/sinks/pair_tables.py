"""The tables of pairs, in tidy long form; only runs that attribute their change to pairs have them.

Shares and effects (see :class:`~smda_callbacks.records.PairBook`) are in the functional's units: those of the policy's
target for behaviours, coefficients for features. In an audit totals are means over a pair's repeats, and a step is one
pair and repeat from the same start.

``pairs``, one row per pair that was seen
    ``pair`` (its number in the run), ``rows`` (list of row numbers in the user's data set), ``level`` (what the rows
    mean, see :class:`~smda_callbacks.records.Pair`), ``tokens``, ``column_<name>`` (columns of the data set),
    ``windows`` (attributed windows in which it was trained on), ``intended`` (list of SAE indices), ``interference``
    (null where not known), ``flagged``, ``text`` (null where the configuration keeps it out).

``pair_totals``, one row per attributed pair and functional
    ``pair``, ``functional``, ``share``, ``effect`` (both over the run, later parts included), ``floor`` (noise floor of
    the effect; null if not measured), ``above_floor`` (effect larger than twice its floor), ``spread`` (standard
    deviation over the repeats of an audit, else null), ``windows``.

``pair_steps``, one row per attributed window, pair and functional
    ``step`` (last one of the window), ``pair``, ``functional``, ``share``, ``effect`` (null where the pair was not in
    the window), ``later_share``, ``later_effect`` (of its gradients in earlier windows; null where none is kept).

``ledger``, one row per attributed window and functional
    ``step``, ``functional``, ``measured``, ``pairs`` (sum of shares), ``later`` (sum of later shares), ``momentum``,
    ``decay``, ``unexplained``; the last five sum to ``measured``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import LINES, Array, Pair, PairBook, RunStart, WindowRecord
from smda_callbacks.sinks.pair_table import PairTable, pair_table

_FUNCTIONAL = pa.dictionary(pa.int32(), pa.string())


def _pairs(start: RunStart, windows: Sequence[WindowRecord]) -> pa.Table:
    table = pair_table(start, windows)
    pairs: Sequence[Pair] = () if table is None else table.pairs
    names = dict.fromkeys(name for pair in pairs for name in pair.columns)
    columns = {
        "pair": pa.array([pair.id for pair in pairs], pa.int64()),
        "rows": pa.array([pair.rows for pair in pairs], pa.list_(pa.int64())),
        "level": pa.array([pair.level for pair in pairs], pa.string()),
        "tokens": pa.array([pair.tokens for pair in pairs], pa.int64()),
        **{f"column_{name}": pa.array([pair.columns.get(name) for pair in pairs], pa.string()) for name in names},
        "windows": pa.array([] if table is None else table.windows, pa.int64()),
        "intended": pa.array([] if table is None else _named(table, start), pa.list_(pa.int64())),
        "interference": _numbers([] if table is None else table.interference),
        "flagged": pa.array([] if table is None else table.flagged, pa.bool_()),
        "text": pa.array([pair.text for pair in pairs], pa.string()),
    }
    return pa.table(columns)


def _pair_totals(start: RunStart, windows: Sequence[WindowRecord]) -> pa.Table:
    table, names = pair_table(start, windows), _names(start)
    known = np.zeros(0, dtype=np.int64) if table is None else np.flatnonzero(table.known)
    share, effect = (np.zeros((0, len(names))),) * 2 if table is None else (table.share[known], table.effect[known])
    floor = None if table is None or table.floor is None else table.floor[known]
    spread = None if table is None or table.spread is None else table.spread[known]
    size = share.size
    above = pa.nulls(size, pa.bool_())
    if floor is not None:
        above = pa.array(above_floor(effect, floor).ravel(), mask=np.isnan(floor).ravel())
    return pa.table(
        {
            "pair": _repeated([] if table is None else [table.pairs[row].id for row in known], len(names)),
            "functional": _functionals(names, len(known)),
            "share": _numbers(share),
            "effect": _numbers(effect),
            "floor": pa.nulls(size, pa.float64()) if floor is None else _numbers(floor),
            "above_floor": above,
            "spread": pa.nulls(size, pa.float64()) if spread is None else _numbers(spread),
            "windows": _repeated([] if table is None else table.windows[known], len(names)),
        }
    )


def _pair_steps(start: RunStart, windows: Sequence[WindowRecord]) -> pa.Table:
    names = _names(start)
    blocks = [_step_rows(names, step, book) for step, book in _books(windows)]
    schema = pa.schema(
        [("step", pa.int64()), ("pair", pa.int64()), ("functional", _FUNCTIONAL)]
        + [(name, pa.float64()) for name in ("share", "effect", "later_share", "later_effect")]
    )
    return pa.concat_tables([schema.empty_table(), *(block.cast(schema) for block in blocks)])


def _step_rows(names: Sequence[str], step: int, book: PairBook) -> pa.Table:
    ids = np.union1d(book.ids, book.later_ids)

    def spread(some: NDArray[np.int64], values: Array) -> Array:
        found = np.full((len(ids), len(names)), np.nan)
        found[np.searchsorted(ids, some)] = values
        return found

    return pa.table(
        {
            "step": pa.array(np.full(len(ids) * len(names), step), pa.int64()),
            "pair": _repeated(ids, len(names)),
            "functional": _functionals(names, len(ids)),
            "share": _numbers(spread(book.ids, book.share)),
            "effect": _numbers(spread(book.ids, book.effect)),
            "later_share": _numbers(spread(book.later_ids, book.later_share)),
            "later_effect": _numbers(spread(book.later_ids, book.later_effect)),
        }
    )


def _ledger(start: RunStart, windows: Sequence[WindowRecord]) -> pa.Table:
    names, books = _names(start), _books(windows)
    terms: Mapping[str, Callable[[PairBook], Array]] = {
        "measured": lambda book: book.lines["measured"],
        "pairs": lambda book: book.share.sum(axis=0),
        "later": lambda book: book.later_share.sum(axis=0),
        **{line: lambda book, line=line: book.lines[line] for line in LINES},  # type: ignore[misc]
    }
    columns: dict[str, Any] = {
        "step": _repeated([step for step, _ in books], len(names)),
        "functional": _functionals(names, len(books)),
    }
    for name, term in terms.items():
        columns[name] = pa.array(np.concatenate([np.zeros(0), *(term(book) for _, book in books)]), pa.float64())
    return pa.table(columns)


#: The tables by name: from what a run was opened with and all of its windows.
PAIR_TABLES: Mapping[str, Callable[[RunStart, Sequence[WindowRecord]], pa.Table]] = {
    "pairs": _pairs,
    "pair_totals": _pair_totals,
    "pair_steps": _pair_steps,
    "ledger": _ledger,
}


def _books(windows: Sequence[WindowRecord]) -> list[tuple[int, PairBook]]:
    return [(window.step, window.pairs) for window in windows if window.status == "ok" and window.pairs is not None]


def _names(start: RunStart) -> tuple[str, ...]:
    return tuple(start.manifest["attribution"]["functionals"])


def _named(table: PairTable, start: RunStart) -> list[list[int]]:
    """SAE indices of what each pair intends."""
    return [[int(start.policy.features[place]) for place in places if place >= 0] for places in table.intended]


def _functionals(names: Sequence[str], times: int) -> pa.DictionaryArray:
    places = np.tile(np.arange(len(names), dtype=np.int32), times)
    return pa.DictionaryArray.from_arrays(pa.array(places), pa.array(list(names), pa.string()))


def _repeated(values: Any, times: int) -> pa.Array:
    return pa.array(np.repeat(np.asarray(values, dtype=np.int64), times))


def _numbers(values: Any) -> pa.Array:
    """Numbers in the order of memory; NaN, which stands for what is not known, as null."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    return pa.array(flat, mask=np.isnan(flat))
