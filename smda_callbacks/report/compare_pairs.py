"""Which training pairs act in one run and not in another, and how much the runs agree on the others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import Pair
from smda_callbacks.report.compare_runs import ComparedRun, value_at
from smda_callbacks.report.data import TIMES
from smda_callbacks.report.ranking import unit_of
from smda_callbacks.sinks.pair_table import PairTable, column
from smda_callbacks.sinks.wandb_private import HASH_DIGITS

State = Literal["acts", "below noise", "not attributed", "absent"]
By = Literal["id", "text", "row"]

_HASH = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}")


@dataclass(frozen=True)
class PairIn:
    """What a pair did in one run.

    ``state``: ``acts`` (its effect is above twice its noise floor; where that was not measured, other than 0), ``below
    noise``, ``not attributed`` (trained on in windows that were not attributed only), ``absent`` (not trained on).
    """

    state: State
    effect: float | None = None
    floor: float | None = None
    windows: int = 0


@dataclass(frozen=True)
class PairApart:
    """A pair in all runs. ``rows``: run -> its row numbers there, empty where it was not trained on."""

    text: str | None
    columns: Mapping[str, str]
    rows: Mapping[str, tuple[int, ...]]
    runs: Mapping[str, PairIn]

    @property
    def acts_in(self) -> tuple[str, ...]:
        return tuple(name for name, each in self.runs.items() if each.state == "acts")

    @property
    def differs(self) -> bool:
        """Acts in some run, and is known not to in another."""
        states = {each.state for each in self.runs.values()}
        return "acts" in states and bool(states & {"below noise", "absent"})

    @property
    def size(self) -> float:
        """Its largest effect where it acts."""
        return max((abs(each.effect or 0.0) for each in self.runs.values() if each.state == "acts"), default=0.0)


@dataclass(frozen=True)
class PairComparison:
    """``differing``: pairs that act in one run and not in another, largest effect first.

    ``matched_by``: an ``id`` column, ``text``, or ``row`` number; ``warning``: what speaks against the match.
    ``trained``, ``unmatched``: run -> pairs, and those that nothing could be matched by. ``shared``: pairs that all
    runs attributed. ``correlation``: run -> of its effects on those with the reference's; None where it cannot be told.
    """

    functional: str
    unit: str
    matched_by: By
    warning: str | None
    differing: tuple[PairApart, ...]
    trained: Mapping[str, int]
    unmatched: Mapping[str, int]
    shared: int
    correlation: Mapping[str, float | None]

    @property
    def only(self) -> dict[str, int]:
        """Run -> pairs that act in it and not in all others."""
        return {name: sum(name in each.acts_in for each in self.differing) for name in self.trained}


def compare_pairs(runs: Sequence[ComparedRun], by: str | None = None) -> PairComparison | str:
    """What the runs' pairs did to the functional ``by``, the first of all that the runs share if None.

    A sentence on why not where a run has no attributed pairs, or the runs share no functional. Raises ValueError where
    a run does not attribute ``by``; it names the nearest.
    """
    tables = {run.name: run.data.pairs for run in runs if run.data is not None}
    found = {name: table for name, table in tables.items() if table is not None}
    if len(found) < len(runs):
        without = ", ".join(run.name for run in runs if run.name not in found)
        return f"no window of run {without} was attributed to pairs, so pairs are not compared"
    shared = [each for each in found[runs[0].name].functionals if all(each in t.functionals for t in found.values())]
    if by is None and not shared:
        return "the runs attribute different quantities to their pairs, so pairs are not compared"
    name = by or shared[0]
    places = {run: column(table, name) for run, table in found.items()}
    matched_by, key = _matcher(runs, found)
    pairs = _matched(runs, found, places, key)
    known = [each for each in pairs if all(one.state in ("acts", "below noise") for one in each.runs.values())]
    data = runs[0].data
    assert data is not None
    return PairComparison(
        functional=name,
        unit=unit_of(found[runs[0].name], data.policy, name),
        matched_by=matched_by,
        warning=_warning(runs, pairs, found) if matched_by == "row" else None,
        differing=tuple(sorted((each for each in pairs if each.differs), key=lambda each: -each.size)),
        trained={run: len(table.pairs) for run, table in found.items()},
        unmatched={run: sum(key(run, pair) is None for pair in table.pairs) for run, table in found.items()},
        shared=len(known),
        correlation={run.name: _correlation(known, runs[0].name, run.name) for run in runs[1:]},
    )


Key = Callable[[str, Pair], Hashable]


def _matcher(runs: Sequence[ComparedRun], tables: Mapping[str, PairTable]) -> tuple[By, Key]:
    """By what pairs are the same: an id column that all have, else their texts, else their row numbers."""
    columns = {value_at(run.manifest, "config.attribution.id_column") for run in runs}
    name = next(iter(columns))
    pairs = [pair for table in tables.values() for pair in table.pairs]
    if len(columns) == 1 and name and all(name in pair.columns for pair in pairs):
        return "id", lambda run, pair: pair.columns[name]
    if all(pair.text is not None for pair in pairs):
        hashed = {
            run.name for run in runs if run.source.shown and value_at(run.manifest, "config.wandb.log_text") == "hash"
        }
        return "text", lambda run, pair: _text_key(pair, run in hashed, bool(hashed))
    return "row", lambda run, pair: pair.rows or None


def _text_key(pair: Pair, hashed: bool, some_hashed: bool) -> Hashable:
    """The hash of a pair's text; a text that was cut is told apart by its length in tokens, where texts are known."""
    text = pair.text or ""
    if hashed and _HASH.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
    return digest if some_hashed or not text.endswith("…") else (digest, pair.tokens)


def _matched(
    runs: Sequence[ComparedRun], tables: Mapping[str, PairTable], places: Mapping[str, int], key: Key
) -> list[PairApart]:
    """All pairs of all runs. Several pairs of a run that are the same count as one, their effects together."""
    found: dict[Hashable, dict[str, list[int]]] = {}
    for name, table in tables.items():
        for row, pair in enumerate(table.pairs):
            same = key(name, pair)
            if same is not None:
                found.setdefault(same, {}).setdefault(name, []).append(row)
    result = []
    for members in found.values():
        some = [tables[name].pairs[row] for name, rows in members.items() for row in rows]
        text = next((pair.text for pair in some if pair.text and not _HASH.fullmatch(pair.text)), some[0].text)
        numbers = {
            run.name: tuple(n for row in members.get(run.name, ()) for n in tables[run.name].pairs[row].rows)
            for run in runs
        }
        states = {run.name: _in_run(tables[run.name], members.get(run.name), places[run.name]) for run in runs}
        result.append(PairApart(text, some[0].columns, numbers, states))
    return result


def _in_run(table: PairTable, rows: Sequence[int] | None, place: int) -> PairIn:
    if not rows:
        return PairIn("absent")
    known = [row for row in rows if table.known[row]]
    if not known:
        return PairIn("not attributed")
    effect, windows = float(table.effect[known, place].sum()), int(table.windows[known].sum())
    if table.floor is None:
        return PairIn("acts" if effect else "below noise", effect, None, windows)
    floors = table.floor[known, place]
    if np.isnan(floors).all():  # only its momentum was seen, in windows that it was not trained on in
        return PairIn("not attributed")
    floor = float(np.sqrt(np.nansum(np.square(floors))))
    return PairIn("acts" if above_floor(effect, floor, TIMES) else "below noise", effect, floor, windows)


def _warning(runs: Sequence[ComparedRun], pairs: Sequence[PairApart], tables: Mapping[str, PairTable]) -> str:
    """What must be said of a match by row number: whether the same rows look like the same pairs."""
    described = {
        run.name: {pair.rows: (pair.tokens, tuple(sorted(pair.columns.items()))) for pair in tables[run.name].pairs}
        for run in runs
    }
    shared = set.intersection(*(set(each) for each in described.values())) - {()}
    differ = sum(len({each[rows] for each in described.values()}) > 1 for rows in shared)
    head = "Pairs were matched by row number, because a store without their texts was given."
    sizes = len({len(table.pairs) for table in tables.values()}) > 1
    if differ or sizes:
        why = f"{differ} of {len(shared)} rows that all runs have differ in length or columns" if differ else ""
        other = "the runs were trained on different numbers of pairs" if sizes else ""
        said = " and ".join(filter(None, (why, other)))
        return f"{head} The data sets differ ({said}): the same number need not be the same pair."
    return f"{head} Nothing that is known of the {len(shared)} shared rows speaks against it."


def _correlation(pairs: Sequence[PairApart], first: str, second: str) -> float | None:
    values = np.array([[each.runs[name].effect for name in (first, second)] for each in pairs], dtype=float)
    if len(values) < 3 or not (values.std(axis=0) > 0).all():
        return None
    return float(np.corrcoef(values.T)[0, 1])
