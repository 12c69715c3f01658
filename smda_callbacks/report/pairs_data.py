"""The arrays behind the report's views of training pairs: names, rankings, ledger, cumulative shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.functionals import FeatureShift, GroupMean
from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import LINES, PATHWAYS, Array, Pair, PairBook
from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.sinks.attribution import functionals_of
from smda_callbacks.sinks.pair_table import SUFFIXES, PairTable

#: Features in the report's choices and heat maps, those that pairs moved most.
MOST_FEATURES = 40

#: Bars of a ledger and points of a curve; windows beyond are summed into groups of neighbours.
MOST_BARS = 120

#: Terms of a ledger; they sum to ``measured``.
TERMS = ("pairs", "later", *LINES)


@dataclass(frozen=True)
class PairData:
    """A run's pairs with what its functionals mean.

    ``means`` and ``shifts``: the attributed functionals of groups and of coefficients, in the order of the manifest.
    """

    table: PairTable
    means: tuple[GroupMean, ...]
    shifts: tuple[FeatureShift, ...]

    def place(self, name: str) -> int:
        """Position of a functional."""
        return self.table.functionals.index(name)

    def groups(self, behaviour: int) -> list[GroupMean]:
        """Functionals of groups of probes for one behaviour, in the policy's unit."""
        return [each for each in self.means if each.behaviour == behaviour and not each.converted]

    def category(self, behaviour: int, category: str) -> int | None:
        """Position of a category's functional in the policy's unit; None where it is not attributed."""
        found = [each.name for each in self.groups(behaviour) if each.is_category and each.group == category]
        return self.place(found[0]) if found else None

    def parts(self, behaviour: int, values: Array) -> dict[str, Array]:
        """``values`` ``[pair, functional]`` by part of PATHWAYS: ``[pair, feature]``; parts not attributed left out."""
        found = {}
        for part in PATHWAYS:
            named = {
                each.feature: self.place(each.name)
                for each in self.shifts
                if each.behaviour == behaviour and each.pathway == SUFFIXES[part]
            }
            columns = [named.get(int(feature), -1) for feature in self.table.features]
            if columns and -1 not in columns:
                found[part] = values[:, columns]
        return found


def pair_data(data: RunData) -> PairData | None:
    """The pairs of a run; None where no window was attributed."""
    table, functionals = data.pairs, functionals_of(data.store.start)
    if table is None or functionals is None:
        return None
    known, whole = set(table.functionals), functionals.whole
    means = tuple(each for each in whole.means if each.name in known)
    return PairData(table, means, tuple(each for each in whole.shifts if each.name in known))


def need_pairs(data: RunData) -> PairData:
    """The pairs of a run. Raises ValueError where no window was attributed."""
    found = pair_data(data)
    if found is None:
        raise ValueError("no window of the run was attributed to pairs. Next step: ask has_pairs first.")
    return found


def has_pairs(data: RunData) -> bool:
    """Whether some window was attributed."""
    return data.pairs is not None


def pair_name(pair: Pair) -> str:
    """A pair in a word or two: its rows in the user's data set, or as much as is known. No two share a name."""
    if not pair.rows:
        return f"{pair.level} {pair.id}"
    first = pair.rows if len(pair.rows) <= 3 else pair.rows[:2]
    more = f" and {len(pair.rows) - 2} more" if len(pair.rows) > 3 else ""
    shown = ", ".join(map(str, first)) + more
    noun = "row" if len(pair.rows) == 1 else "rows"
    return f"{noun} {shown}" if pair.level == "row" else f"{noun} {shown}, {pair.level} {pair.id}"


def data_columns(table: PairTable) -> list[str]:
    """Columns of the data set that some pair has: ``kind`` and ``category`` first, then by name of first appearance."""
    found = dict.fromkeys(name for pair in table.pairs for name in pair.columns)
    return sorted(found, key=lambda name: {"kind": 0, "category": 1}.get(name, 2))


def above_noise(table: PairTable) -> NDArray[np.bool_] | None:
    """Effects beyond the limit of their noise floor, ``[pair, functional]``; None where it was not measured."""
    if table.floor is None:
        return None
    return above_floor(table.effect, np.where(np.isnan(table.floor), np.inf, table.floor), TIMES)


def moved_features(pairs: PairData, behaviour: int, most: int = MOST_FEATURES) -> NDArray[np.int64]:
    """Places in the attributed features of those that the pairs moved most, in the policy's order."""
    parts = pairs.parts(behaviour, pairs.table.effect)
    size = np.sum([np.abs(each).sum(axis=0) for each in parts.values()], axis=0) if parts else np.zeros(0)
    return np.sort(np.argsort(-size, kind="stable")[:most])


@dataclass(frozen=True)
class Ranking:
    """Pairs by the size of a quantity of one functional: ``rows`` of the table, ``left`` more, up to ``largest``."""

    name: str
    rows: tuple[int, ...]
    left: int
    largest: float


def rankings(
    table: PairTable, values: Array, names: Sequence[str], first: Sequence[str], *, per: int, most: int
) -> list[Ranking]:
    """The pairs with the largest ``values`` ``[pair, functional]`` for each of the functionals ``names``.

    ``per`` of each at most, and so many that no more than ``most`` pairs occur in all: those ``first`` get all theirs,
    the others the same depth each, at least one.
    """
    known = np.flatnonzero(table.known)
    orders = {}
    for name in names:
        sizes = np.abs(values[known, table.functionals.index(name)])
        orders[name] = known[np.argsort(-sizes, kind="stable")]
    used = {int(row) for name in first for row in orders[name][:per]}
    depth = 0
    while depth < per:
        used |= {int(order[depth]) for order in orders.values() if depth < len(order)}
        if depth and len(used) > most:
            break
        depth += 1
    return [
        _ranking(name, orders[name], values[:, table.functionals.index(name)], per if name in first else depth)
        for name in names
    ]


def _ranking(name: str, order: NDArray[np.int64], values: Array, depth: int) -> Ranking:
    rest = order[depth:]
    return Ranking(name, tuple(order[:depth].tolist()), len(rest), float(abs(values[rest[0]])) if len(rest) else 0.0)


@dataclass(frozen=True)
class Ledger:
    """Terms of TERMS and ``measured`` -> ``[window, functional]``, over the attributed windows."""

    steps: tuple[int, ...]
    terms: Mapping[str, Array]


def ledger(data: RunData) -> Ledger:
    """The books of all attributed windows, closed: TERMS sum to ``measured``. Raises ValueError without any."""
    need_pairs(data)
    books = [(window.step, window.pairs) for window in data.ok if window.pairs is not None]
    terms = {
        "measured": [book.lines["measured"] for _, book in books],
        "pairs": [book.share.sum(axis=0) for _, book in books],
        "later": [book.later_share.sum(axis=0) for _, book in books],
        **{line: [book.lines[line] for _, book in books] for line in LINES},
    }
    return Ledger(tuple(step for step, _ in books), {name: np.array(rows) for name, rows in terms.items()})


def thinned(found: Ledger, most: int = MOST_BARS) -> Ledger:
    """The same with neighbouring windows summed, so that there are at most ``most``; steps are the last of each."""
    size = -(-len(found.steps) // most)
    if size <= 1:
        return found
    starts = np.arange(0, len(found.steps), size)
    ends = np.minimum(starts + size, len(found.steps)) - 1
    terms = {name: np.add.reduceat(rows, starts, axis=0) for name, rows in found.terms.items()}
    return Ledger(tuple(found.steps[end] for end in ends), terms)


def cumulative_shares(data: RunData, rows: Sequence[int], place: int) -> tuple[list[int], Array]:
    """Steps, from the start, and the summed shares of pairs up to each, ``[pair, step]``: own and later.

    ``rows``: of the table. Windows that were not attributed add nothing. Thinned as ledgers are.
    """
    table = need_pairs(data).table
    wanted = {table.pairs[row].id: number for number, row in enumerate(rows)}
    gained = np.zeros((len(rows), len(data.ok) + 1))
    for at, window in enumerate(data.ok, start=1):
        if window.pairs is not None:
            for number, value in _shares_of(window.pairs, wanted, place):
                gained[number, at] += value
    keep = np.unique(np.linspace(0, len(data.ok), min(len(data.ok) + 1, MOST_BARS)).round().astype(int))
    return [data.steps[each] for each in keep], np.cumsum(gained, axis=1)[:, keep]


def _shares_of(book: PairBook, wanted: Mapping[int, int], place: int) -> list[tuple[int, float]]:
    found = []
    for ids, share in ((book.ids, book.share), (book.later_ids, book.later_share)):
        found += [(wanted[each], float(share[at, place])) for at, each in enumerate(ids.tolist()) if each in wanted]
    return found
