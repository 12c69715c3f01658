"""What the pairs of a run did, summed over its windows: the one source of the tables, the tracker, the report and
``smda pairs``.

Shares and effects (see :class:`~smda_callbacks.records.PairBook`) are summed apart and never combined.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.interference import interference
from smda_callbacks.records import Array, Pair, RunStart, WindowRecord
from smda_callbacks.sinks.attribution import Functionals, attributed_features, chained, functionals_of, is_audit
from smda_callbacks.sinks.pair_totals import PairTotal, PairTotals, totals_of

#: Part of PATHWAYS -> last part of the name of its functional, ``feature:<SAE index>:<suffix>``.
SUFFIXES = {"shift_x_magnitude": "x", "shift_x_gating": "gating", "shift_y": "y"}

#: Fields of PairTotal that are arrays over functionals.
_SUMMED = ("share", "effect", "squares")


@dataclass(frozen=True)
class PairTable:
    """Totals of a run over its attributed windows, in the functionals' units.

    In an audit, where every window is one pair from the same start, ``share`` and ``effect`` are means over the pair's
    repeats, and lines other than ``measured`` are zero. ``lines``: each of LINES, ``measured`` (the pairs' shares and
    LINES sum to it) and ``unattributed`` (measured in ok windows that were not attributed, in no pair's account).
    """

    pairs: tuple[Pair, ...]  # all that were seen, by id, attributed or not
    functionals: tuple[str, ...]
    features: NDArray[np.int64]  # [feature] SAE indices of the attributed features
    share: Array  # [pair, functional], later shares included
    effect: Array  # [pair, functional], later effects included
    floor: Array | None  # [pair, functional] noise floor of the effect; NaN for pairs without a window of their own
    spread: Array | None  # [pair, functional] standard deviation over the repeats of an audit; NaN with only one
    windows: NDArray[np.int64]  # [pair] attributed windows in which the pair was trained on; repeats in an audit
    intended: NDArray[np.int64]  # [pair, k] positions in the policy's features when first attributed, -1 where fewer
    lines: Mapping[str, Array]  # [functional]
    interference: Array  # [pair] share of the effect on attributed features that is unintended; NaN where not known
    flagged: NDArray[np.bool_]  # [pair] the largest effect is unintended, and above its floor where there is one
    attributed: int  # attributed windows
    booked: int  # ok windows, attributed or not
    influence: Array | None = None  # [pair, functional] on the end of the run, of smda rescore; NaN where not asked

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which pairs have an account, ``[pair]``: the others were seen in windows that were not attributed only."""
        some: NDArray[np.bool_] = (self.windows > 0) | (self.share != 0).any(axis=1) | (self.effect != 0).any(axis=1)
        return some


def pair_table(start: RunStart, windows: Iterable[WindowRecord]) -> PairTable | None:
    """Sum the books of ``windows``, in order; None where no window was attributed.

    The noise floor of a pair's effect is that of random updates of the size of the pair's own, of the model as it was
    when the floor in force was measured, with the rounding of a reading where effects were read (engine ``exact``);
    windows are independent. Interference is judged on a pair's
    total effect on the coefficients of the attributed features, first behaviour. Raises ValueError where the manifest's
    functionals are not those of the run's policy and probes.
    """
    records = list(windows)
    functionals, totals = functionals_of(start), totals_of(start, records)
    table = None if totals is None else table_of(totals)
    if table is None or functionals is None:
        return None
    return replace(table, lines={**table.lines, "unattributed": _unattributed(chained(start, records), functionals)})


def table_of(totals: PairTotals) -> PairTable | None:
    """The same from running sums, but without the line ``unattributed``, for which all windows are needed."""
    if not totals.attributed:
        return None
    found = [totals.pairs[each] for each in sorted(totals.pairs)]
    share, effect, squares = (np.array([getattr(each, name) for each in found]) for name in _SUMMED)
    counts = np.array([each.windows for each in found], dtype=np.int64)
    squares[counts == 0] = np.nan
    lines, spread = dict(totals.lines), None
    known = totals.noise is not None and totals.noise.functional_random is not None
    floor = np.sqrt(squares) if known else None
    if is_audit(totals.start.manifest):
        share, effect, floor = _over_repeats(share, effect, floor, counts)
        spread = _spread(found, effect, counts)
        lines["measured"] = share.sum(axis=0)
    table = PairTable(
        pairs=tuple(each.pair for each in found),
        functionals=totals.functionals,
        features=attributed_features(totals.functionals, totals.start.policy.features),
        share=share,
        effect=effect,
        floor=floor,
        spread=spread,
        windows=counts,
        intended=_intended(found),
        lines=lines,
        interference=np.full(len(found), np.nan),
        flagged=np.zeros(len(found), dtype=bool),
        attributed=totals.attributed,
        booked=totals.booked,
    )
    share_unintended, flagged = _interference(table, totals.start.policy.features)
    return replace(table, interference=share_unintended, flagged=flagged)


def column(table: PairTable, name: str) -> int:
    """Position of the functional ``name``. Raises ValueError, which names the nearest ones."""
    if name in table.functionals:
        return table.functionals.index(name)
    near = _other_features(table, name) or get_close_matches(name, table.functionals, n=3, cutoff=0.4)
    near = near or list(table.functionals[:3])
    raise ValueError(
        f"the run attributes no {name!r} to its pairs; nearest: {', '.join(near)}. Next step: take one of those, or "
        f"any of the manifest's attribution.functionals ({len(table.functionals)} in all)."
    )


def _other_features(table: PairTable, name: str) -> list[str]:
    """For ``feature:<number>:...``, the same of the attributed features with the nearest numbers."""
    found = re.fullmatch(r"feature:(\d+)(:.+)", name)
    if found is None:
        return []
    numbers = sorted(table.features.tolist(), key=lambda feature: abs(feature - int(found[1])))
    names = [f"feature:{feature}{found[2]}" for feature in numbers]
    return [each for each in names if each in table.functionals][:3]


def by_feature(table: PairTable, values: Array, behaviour: str = "") -> dict[str, Array]:
    """``values`` ``[pair, functional]`` of the features' functionals, by part of PATHWAYS: ``[pair, feature]``.

    ``behaviour``: empty for the first. A part that was not attributed for all of ``table.features`` (gating, with the
    engine ``ghost``) is left out.
    """
    tail = f":{behaviour}" if behaviour else ""
    places = {name: place for place, name in enumerate(table.functionals)}
    columns = {
        part: [places.get(f"feature:{feature}:{suffix}{tail}", -1) for feature in table.features]
        for part, suffix in SUFFIXES.items()
    }
    return {part: values[:, found] for part, found in columns.items() if found and -1 not in found}


def _over_repeats(
    share: Array, effect: Array, floor: Array | None, counts: NDArray[np.int64]
) -> tuple[Array, Array, Array | None]:
    """Sums over the repeats of an audit as means."""
    n = np.maximum(counts, 1)[:, None]
    return share / n, effect / n, None if floor is None else floor / n  # repeats differ in their adapter: independent


def _spread(found: Sequence[PairTotal], effect: Array, counts: NDArray[np.int64]) -> Array | None:
    """Standard deviation of every pair's effects over its repeats, ``[pair, functional]``; None without repeats."""
    if counts.max() < 2:
        return None
    spread = np.full_like(effect, np.nan)
    for row in np.flatnonzero(counts > 1).tolist():
        spread[row] = np.std(found[row].repeats, axis=0, ddof=1)
    return spread


def _unattributed(chain: Iterable[tuple[WindowRecord, WindowRecord]], functionals: Functionals) -> Array:
    """What was measured in ok windows without a book, ``[functional]``."""
    left = [functionals.moved(before, window) for before, window in chain if window.pairs is None]
    total: Array = np.sum([np.zeros(len(functionals.names)), *left], axis=0)
    return total


def _intended(found: Sequence[PairTotal]) -> NDArray[np.int64]:
    """What each pair intended when it was first attributed, ``[pair, k]``; -1 where fewer."""
    known = {row: each.intended for row, each in enumerate(found) if each.intended is not None}
    places = np.full((len(found), max(len(each) for each in known.values())), -1, dtype=np.int64)
    for row, each in known.items():
        places[row, : len(each)] = each
    return places


def _interference(table: PairTable, features: NDArray[np.int64]) -> tuple[Array, NDArray[np.bool_]]:
    """Interference and its flag for every pair; ``features``: all of the policy's."""
    if not len(table.features):
        return np.full(len(table.pairs), np.nan), np.zeros(len(table.pairs), dtype=bool)
    moved = moved_coefficients(table, features)
    found = interference(moved.shift, moved.intended, moved.floor)
    return found.share, found.flagged


@dataclass(frozen=True)
class Moved:
    """What pairs did to coefficients, as interference is judged: without gates that switch, which mostly jitter."""

    shift: Array  # [pair, feature] effect by magnitude and by outputs
    floor: Array | None  # [pair, feature] inf where not known
    intended: NDArray[np.int64]  # [pair, k] positions in the attributed features, -1 where fewer


def moved_coefficients(table: PairTable, features: NDArray[np.int64]) -> Moved:
    """What every pair did to the coefficients of the first behaviour; ``features``: all of the policy's."""

    def steady(values: Array) -> list[Array]:
        return [part for name, part in by_feature(table, values).items() if name != "shift_x_gating"]

    floor: Array | None = None
    if table.floor is not None:
        # Parts of one update are not independent; the root sum square is the floor of their sum as if they were.
        floor = np.sqrt(np.sum(np.square(steady(table.floor)), axis=0))
        floor = np.where(np.isnan(floor), np.inf, floor)
    attributed = {int(feature): place for place, feature in enumerate(table.features)}
    place = np.array([attributed.get(int(feature), -1) for feature in features] + [-1], dtype=np.int64)
    return Moved(np.sum(steady(table.effect), axis=0), floor, place[table.intended])
