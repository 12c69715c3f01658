"""The account of a category's change in behaviour units: what moved it, row by row, closing to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.maths.pathways import PathwaySplit, State, check_states, split_shift
from smda_callbacks.maths.ridge import RidgeFit, fit_ridge

Array = NDArray[np.float64]
Groups = NDArray[np.int64]


@dataclass(frozen=True)
class Account:
    """Why the mean behaviour of each category changed, in behaviour units.

    ``rows``: row -> ``[category, behaviour]``; the rows sum to ``measured``.

    * ``magnitude``, ``gating``: features moved under the mean coefficients, ``ΔZ·β̄``,
    * ``shift_x_magnitude``, ``shift_x_gating``, ``shift_y``: coefficients moved, ``(Z̄ − o)·Δβ``,
    * ``intercept``: the prediction at the origin ``o`` moved, ``Δ(b + o·β)``,
    * ``residual``: what the policy does not fit changed, ``Δ(y − ŷ)``.

    ``features``: the first five rows over features, ``[category, feature, behaviour]``; they sum to their rows.
    ``measured``: change of the category's mean behaviour, ``[category, behaviour]``, taken from y alone.
    """

    rows: dict[str, Array]
    features: dict[str, Array]
    measured: Array


def account(
    before: State, after: State, *, scale: Array, lam: float, groups: ArrayLike, origin: ArrayLike | None = None
) -> Account:
    """Account for the change of every category's mean behaviour between two states.

    ``scale`` ``[feature]``, ``lam``: as in :func:`~smda_callbacks.maths.pathways.split_shift`. ``groups`` ``[probe]``:
    category numbers 0..C-1. The identity is the product rule ``Δ(Zβ) = ΔZ·β̄ + Z̄·Δβ`` with bars for the mean of before
    and after, so no order of events is preferred.

    ``origin`` ``[feature]``, in units of z: the point from which a change of coefficients is counted, zeros if None.
    At the mean z of harmless prompts, features carry what sets a category apart from those, and ``intercept`` is what
    moved on harmless prompts too. At zeros, a coefficient that weakens on both kinds is split between features and
    intercept by how often the feature fires anywhere. The rows sum to the same for every origin.

    Raises ValueError for states of different shapes, groups of another length or with an empty category, an origin of
    another length or not finite; TypeError for groups that are not whole numbers.
    """
    check_states(before, after)
    numbers = check_groups(groups, len(before.y))
    fits = (fit_ridge(before.x, before.y, lam, scale=scale), fit_ridge(after.x, after.y, lam, scale=scale))
    split = split_shift(before, after, scale=scale, lam=lam)
    start = _check_origin(origin, len(scale))
    features = _feature_rows(before, after, scale, fits, split, numbers, start)
    rows = {name: values.sum(axis=1) for name, values in features.items()}
    measured = mean_by_group(after.y - before.y, numbers)
    at_origin = [fit.intercept + start @ fit.coef for fit in fits]
    rows["intercept"] = np.broadcast_to(at_origin[1] - at_origin[0], measured.shape).copy()
    change = _residual(after, fits[1], scale) - _residual(before, fits[0], scale)
    rows["residual"] = mean_by_group(change, numbers)
    return Account(rows, features, measured)


def mean_by_group(values: Array, groups: Groups) -> Array:
    """Mean over the probes of each group: ``[probe, ...]`` to ``[category, ...]``.

    ``groups`` must have passed :func:`check_groups`.
    """
    counts = np.bincount(groups)
    weights = np.zeros((len(counts), len(groups)))
    weights[groups, np.arange(len(groups))] = 1.0 / counts[groups]
    means: Array = (weights @ values.reshape(len(groups), -1)).reshape(len(counts), *values.shape[1:])
    return means


def check_groups(groups: ArrayLike, probes: int, categories: int | None = None) -> Groups:
    """Category numbers as int64 ``[probe]``, checked to be 0..C-1 with every category in use.

    ``categories``: C, where known; else one more than the highest number. Raises TypeError for numbers that are not
    whole, ValueError for a wrong length, an unknown number or an empty category.
    """
    array = np.asarray(groups)
    if array.shape != (probes,):
        raise ValueError(
            f"groups has shape {array.shape}; one category number for each of the {probes} probes is needed. "
            "Pass a one-dimensional array in the order of the probes."
        )
    if probes == 0:
        raise ValueError("there are no probes; at least one is needed. Check the probe set.")
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"groups has dtype {array.dtype}; whole numbers are needed. Number the categories 0..C-1.")
    count = int(array.max()) + 1 if categories is None else categories
    unknown = sorted({int(number) for number in array[(array < 0) | (array >= count)]})
    if unknown:
        raise ValueError(
            f"unknown group number {unknown[0]}; allowed are 0 to {count - 1}. "
            "Number the categories in the order of their list."
        )
    empty = np.setdiff1d(np.arange(count), array)
    if empty.size:
        raise ValueError(
            f"category {int(empty[0])} has no probes; each of the categories 0 to {count - 1} needs at least one. "
            "Leave the category out and number the rest without a gap."
        )
    return array.astype(np.int64)


def _feature_rows(
    before: State,
    after: State,
    scale: Array,
    fits: tuple[RidgeFit, RidgeFit],
    split: PathwaySplit,
    groups: Groups,
    origin: Array,
) -> dict[str, Array]:
    """The rows that are split over features, each ``[category, feature, behaviour]``."""
    mean_coef = (fits[0].coef + fits[1].coef) / 2
    moved = (before.gate + after.gate) / 2 * (after.pre - before.pre) / scale
    flipped = (before.pre + after.pre) / 2 * (after.gate - before.gate) / scale
    mean_z = mean_by_group((before.x + after.x) / (2 * scale), groups) - origin
    rows = {
        "magnitude": _outer(mean_by_group(moved, groups), mean_coef),
        "gating": _outer(mean_by_group(flipped, groups), mean_coef),
    }
    return rows | {name: _outer(mean_z, shift) for name, shift in split.as_dict().items()}


def _check_origin(origin: ArrayLike | None, features: int) -> Array:
    array = np.zeros(features) if origin is None else np.asarray(origin, dtype=np.float64)
    if array.shape != (features,) or not np.isfinite(array).all():
        raise ValueError(
            f"origin must hold one finite number for each of the {features} features, got shape {array.shape}. "
            "Pass the mean of z over harmless probes, or None for zeros."
        )
    return array


def _outer(means: Array, coef: Array) -> Array:
    """``[category, feature]`` times ``[feature, behaviour]`` without the sum over features."""
    product: Array = means[:, :, None] * coef[None, :, :]
    return product


def _residual(state: State, fit: RidgeFit, scale: Array) -> Array:
    residual: Array = state.y - (fit.intercept + state.x / scale @ fit.coef)
    return residual
