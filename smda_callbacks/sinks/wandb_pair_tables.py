"""Tables of the pairs that moved refusal of what ought to be refused most, ready for a tracker.

By effect and by share apart, since the two are never mixed (see :class:`~smda_callbacks.records.PairBook`). Noise and
interference are judged on a pair's effects, in both.
"""

from __future__ import annotations

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import Array, RunStart
from smda_callbacks.sinks.metric_values import Progress
from smda_callbacks.sinks.pair_table import PairTable
from smda_callbacks.sinks.pair_values import harmful
from smda_callbacks.sinks.wandb_private import LogText, shown_pair
from smda_callbacks.sinks.wandb_tables import MAX_BARS, TEXT_COLUMN, Table, finite

#: Rows of a table of pairs; the run store has them all.
MAX_PAIRS = 100

_HEAD = ("pair", "rows", "level", "tokens")
_TAIL = ("above_noise", "interference", "flagged", "windows")


def effects_table(start: RunStart, progress: Progress, log_text: LogText) -> Table:
    """The pairs with the largest effects on harmful refusal over the run so far, first behaviour.

    ``effect`` and its noise floor ``floor`` in the unit of the policy's target; ``rows`` are row numbers in the user's
    data set. See :func:`~smda_callbacks.sinks.wandb_private.shown_pair` for what there is of columns and text.
    """
    return _table(start, progress, "effect", log_text)


def shares_table(start: RunStart, progress: Progress, log_text: LogText) -> Table:
    """The pairs with the largest shares of its measured change, likewise; a last row sums up the rest, if any."""
    return _table(start, progress, "share", log_text)


def effect_bars(start: RunStart, progress: Progress) -> Table:
    """The largest effects on harmful refusal, by row number; by the pair's own number where no row is known.

    Those that are not above noise are left out; all are shown where the noise was not measured.
    """
    found = _ranked(start, progress, "effect", None)
    if found is None:
        return Table(("pair", "effect"), ())
    table, place, order = found
    if table.floor is not None:  # where a pair's floor is not known, its effect is not known to be above
        order = [row for row in order if _judged(table, row, place)[0]]
    order = order[:MAX_BARS]
    values = [(table.pairs[row], finite(table.effect[row, place])) for row in order]
    return Table(
        ("pair", "effect"),
        tuple((f"row {pair.rows[0]}" if pair.rows else f"pair {pair.id}", value) for pair, value in values),
    )


def _table(start: RunStart, progress: Progress, quantity: str, log_text: LogText) -> Table:
    numbers = ("effect", "floor") if quantity == "effect" else ("share",)
    found = _ranked(start, progress, quantity, None)
    if found is None:
        return Table((*_HEAD, *numbers, *_TAIL, *TEXT_COLUMN[log_text]), ())
    table, place, order = found
    rest = order[MAX_PAIRS:]
    pairs = {row: shown_pair(table.pairs[row], log_text) for row in order[:MAX_PAIRS]}
    names = tuple(dict.fromkeys(name for pair in pairs.values() for name in pair.columns))
    rows = []
    for row, pair in pairs.items():
        values = [_at(getattr(table, name), row, place) for name in numbers]
        known = (pair.id, ", ".join(map(str, pair.rows)), pair.level, pair.tokens)
        text = (pair.text,) if TEXT_COLUMN[log_text] else ()
        rows.append((*known, *map(pair.columns.get, names), *values, *_judged(table, row, place), *text))
    if rest and quantity == "share":  # effects of pairs do not add up
        head = (None, "", f"rest: {len(rest)} pairs", None, *(None for _ in names))
        tail = (None,) * (len(_TAIL) + len(TEXT_COLUMN[log_text]))
        rows.append((*head, finite(table.share[rest, place].sum()), *tail))
    columns = (f"column_{name}" for name in names)
    return Table((*_HEAD, *columns, *numbers, *_TAIL, *TEXT_COLUMN[log_text]), tuple(rows))


def _ranked(
    start: RunStart, progress: Progress, quantity: str, most: int | None
) -> tuple[PairTable, int, list[int]] | None:
    """The run's pairs, the position of the functional, and rows by the size of ``quantity``, largest first."""
    table, name = progress.pair_table, harmful(start.policy.behaviours[0])
    if table is None or name not in table.functionals:
        return None
    place = table.functionals.index(name)
    order = np.argsort(-np.abs(getattr(table, quantity)[:, place]), kind="stable")
    return table, place, [int(row) for row in order if table.known[row]][:most]


def _judged(table: PairTable, row: int, place: int) -> tuple[bool | None, float | None, bool, int]:
    """Columns of ``_TAIL``."""
    floor = _at(table.floor, row, place)
    above = None if floor is None else bool(above_floor(table.effect[row, place], floor))
    return above, finite(table.interference[row]), bool(table.flagged[row]), int(table.windows[row])


def _at(values: Array | None, row: int, place: int) -> float | None:
    return None if values is None else finite(values[row, place])
