"""Interference: how much of what a pair moves falls on features that its own prompt does not call for.

A pair *intends* the features that are strongest on its own prompt. Its interference is the share of its absolute shift
that falls on all other features (SMDA, arXiv 2606.29171).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.maths.uncertainty import above_floor, times_for

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Interference:
    """What every pair did beside what it intends."""

    share: Array  # [pair] of its absolute shift that is unintended, 0 to 1; NaN where it moves or intends nothing
    largest: Index  # [pair] feature of its largest absolute shift; -1 where it moves nothing
    flagged: NDArray[np.bool_]  # [pair] that feature is unintended, and its shift above the noise floor


def interference(
    shift: ArrayLike, intended: ArrayLike, floor: ArrayLike | None = None, times: float = 2.0
) -> Interference:
    """Interference of every pair, and whether to look at it.

    ``shift`` ``[pair, feature]``: shift of each coefficient by the pair, in any one unit. ``intended`` ``[pair, k]``:
    positions of the features that it intends, -1 where fewer than k are known. ``floor`` ``[pair, feature]``: noise
    floor of the shifts, inf where it is not known; None for no noise. A pair is flagged when its largest shift is
    unintended and above the floor: beyond ``times`` of it for one feature, and more for several, of which the largest
    was picked (:func:`~smda_callbacks.maths.uncertainty.times_for`); never when what it intends is not known. Of shifts
    of exactly equal size an intended one counts as the largest.

    Raises ValueError for shapes that do not match, shifts that are not finite, unknown positions, a negative or NaN
    floor, or ``times`` that is not positive. TypeError for positions that are not whole numbers.
    """
    values, mask = _checked(shift, intended)
    noise = np.zeros_like(values) if floor is None else np.asarray(floor, dtype=np.float64)
    if np.isnan(noise).any():
        raise ValueError("floor holds NaN; it needs numbers of at least 0. Pass inf where the floor is not known.")
    above = above_floor(values, noise, times_for(max(values.shape[1], 1), times))
    known = mask.any(axis=1)
    sizes = np.abs(values)
    # Both sums run in the same order, so that rounding takes the share neither above 1 nor off 0 and 1 themselves.
    whole, beside = sizes.sum(axis=1), np.where(mask, 0.0, sizes).sum(axis=1)
    share = np.divide(beside, whole, out=np.full_like(whole, np.nan), where=known & (whole > 0))
    largest = _largest(values, mask)
    flagged = np.zeros(len(values), dtype=bool)
    rows = np.flatnonzero(known & (largest >= 0))
    flagged[rows] = (above & ~mask)[rows, largest[rows]]
    return Interference(share, largest, flagged)


@dataclass(frozen=True)
class AgainstSwaps:
    """Median interference of some pairs, the same if they swap what they intend, and a one-sided p of being so low."""

    median: float
    swapped: float
    p: float


def against_swaps(
    shift: ArrayLike, intended: ArrayLike, *, swaps: int = 999, fewest: int = 5, seed: int = 0
) -> AgainstSwaps | None:
    """Whether pairs move what they intend more than chance would: a permutation test over the pairs' intentions.

    With k intended of d features, 1 - k/d of the shift is unintended for pairs that know nothing of features; the swaps
    say what it is for these. Arguments as in :func:`interference`. None for fewer than ``fewest`` pairs.
    """
    values, positions = np.asarray(shift, dtype=np.float64), np.asarray(intended)
    if len(values) < fewest:
        return None
    rng = np.random.default_rng(seed)
    usual = _median_share(values, positions)
    drawn = np.array([_median_share(values, rng.permutation(positions)) for _ in range(swaps)])
    return AgainstSwaps(usual, float(np.median(drawn)), float((1 + np.sum(drawn <= usual)) / (1 + swaps)))


def _median_share(shift: Array, intended: Index) -> float:
    share = interference(shift, intended).share
    known = share[~np.isnan(share)]
    return float(np.median(known)) if len(known) else float("nan")


def interference_matrix(shift: ArrayLike, intended: ArrayLike) -> Array:
    """Where the shift of pairs that intend a feature goes, ``[feature, feature]``: intended feature, shifted feature.

    Mean, over the pairs that intend the row's feature and move anything, of the share of their absolute shift that
    falls on the column's; a pair counts in every row that it intends. Rows sum to 1; NaN where no such pair is known.
    Arguments and errors as in :func:`interference`.
    """
    values, mask = _checked(shift, intended)
    moving = values.any(axis=1)
    weights = mask[moving].astype(np.float64)  # [pair, feature]
    counts = weights.sum(axis=0)[:, None]
    sums = weights.T @ _shares(values[moving])
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _shares(values: Array) -> Array:
    """Absolute values as shares of their row's sum, ``[pair, feature]``; NaN where the row is all zero."""
    sizes = np.abs(values)
    whole = sizes.sum(axis=1, keepdims=True)
    return np.divide(sizes, whole, out=np.full_like(sizes, np.nan), where=whole > 0)


def _largest(values: Array, mask: NDArray[np.bool_]) -> Index:
    sizes = np.abs(values)
    if not sizes.shape[1]:
        return np.full(len(sizes), -1, dtype=np.int64)
    ties = sizes == sizes.max(axis=1, keepdims=True)
    wanted = ties & mask
    first = np.where(wanted.any(axis=1, keepdims=True), wanted, ties).argmax(axis=1)
    return np.where(values.any(axis=1), first, -1).astype(np.int64)


def _checked(shift: ArrayLike, intended: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Shifts as float64, and which features each pair intends, both ``[pair, feature]``."""
    values, places = np.asarray(shift, dtype=np.float64), np.asarray(intended)
    if values.ndim != 2 or places.ndim != 2 or len(values) != len(places):
        raise ValueError(
            f"shift has shape {values.shape} and intended {places.shape}; [pair, feature] and [pair, k] of the same "
            "pairs are needed. Pass one row for every pair in both."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"shift holds {int((~np.isfinite(values)).sum())} values that are NaN or infinite; all must be finite. "
            "Leave those pairs out."
        )
    if places.size and not np.issubdtype(places.dtype, np.integer):
        raise TypeError(f"intended has dtype {places.dtype}; positions of features are whole numbers, -1 for none.")
    outside = places[(places < -1) | (places >= values.shape[1])]
    if outside.size:
        raise ValueError(
            f"intended holds the position {outside[0]}; allowed are 0 to {values.shape[1] - 1}, and -1 for none. "
            "Pass positions in the columns of shift, not SAE indices."
        )
    mask = np.zeros(values.shape, dtype=bool)
    pair, slot = np.nonzero(places >= 0)
    mask[pair, places[pair, slot].astype(np.int64)] = True
    return values, mask
