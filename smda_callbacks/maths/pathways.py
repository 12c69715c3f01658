"""Split the change of a ridge policy between two model states into pathways.

A policy is refit on each state, ``β(X, y) = argmin ‖H(y − Zβ)‖² + λ‖β‖²`` with ``Z = X / scale`` and ``H`` centring
over probes. Training moves both the features ``X`` and the behaviour ``y``; the change of ``β`` is split into

* ``shift_x_magnitude``: the pre-activations moved, at the mean gate,
* ``shift_x_gating``: gates opened or closed, at the mean pre-activation,
* ``shift_y``: the behaviour itself moved.

The ΔX/ΔY pathways are those of SMDA (arXiv 2606.29171). The exact split is the two-player Shapley value (Shapley 1953):
the three parts sum to the change of the coefficients and change sign when time runs backwards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smda_callbacks.maths.ridge import fit_ridge

Array = NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Features and behaviours of one model state; arrays are converted to float64.

    ``pre`` ``[probe, feature]``: pre-activations, in the SAE's units. ``gate`` ``[probe, feature]``: 0/1, or with mean
    read-out the share of tokens on which the feature is active. ``y`` ``[probe, behaviour]``: probability or logit.

    Raises ValueError if an array has the wrong number of axes, the shapes disagree, a value is not finite, or a gate
    lies outside [0, 1].
    """

    pre: Array
    gate: Array
    y: Array

    def __post_init__(self) -> None:
        for name, axes in (("pre", "[probe, feature]"), ("gate", "[probe, feature]"), ("y", "[probe, behaviour]")):
            object.__setattr__(self, name, _matrix(getattr(self, name), name, axes))
        if self.gate.shape != self.pre.shape:
            raise ValueError(
                f"gate has shape {self.gate.shape} but pre has {self.pre.shape}; both are [probe, feature] of the same "
                "probes and features. Pass the two arrays of one encoding."
            )
        if len(self.y) != len(self.pre):
            raise ValueError(
                f"y has {len(self.y)} probes but pre has {len(self.pre)}; rows must be the same probes. "
                "Pass arrays of one snapshot."
            )
        if self.gate.size and (self.gate.min() < 0 or self.gate.max() > 1):
            raise ValueError(
                f"gate holds values from {self.gate.min():g} to {self.gate.max():g}; allowed is 0 to 1. "
                "Check that pre and gate were not swapped."
            )

    @property
    def x(self) -> Array:
        """Feature activations ``gate * pre``, ``[probe, feature]``."""
        return self.gate * self.pre


@dataclass(frozen=True)
class PathwaySplit:
    """The parts of a coefficient shift, each ``[feature, behaviour]`` in behaviour units per scaled feature unit."""

    shift_x_magnitude: Array
    shift_x_gating: Array
    shift_y: Array

    @property
    def shift_x(self) -> Array:
        """The whole feature-activation pathway, magnitude and gating, ``[feature, behaviour]``."""
        return self.shift_x_magnitude + self.shift_x_gating

    @property
    def total(self) -> Array:
        """All parts together; for the exact split the change of the coefficients, ``[feature, behaviour]``."""
        return self.shift_x + self.shift_y

    def as_dict(self) -> dict[str, Array]:
        """The parts keyed by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def split_shift(before: State, after: State, *, scale: Array, lam: float) -> PathwaySplit:
    """Split ``β(X₁, y₁) − β(X₀, y₀)`` exactly into magnitude, gating and behaviour parts.

    With ``ȳ`` the mean behaviour of the two states and ``M = ḡ ⊙ Δp``::

        shift_x_magnitude = ½ {[β(X₀+M, ȳ) − β(X₀, ȳ)] + [β(X₁, ȳ) − β(X₁−M, ȳ)]}
        shift_x_gating    = ½ {[β(X₁, ȳ) − β(X₀+M, ȳ)] + [β(X₁−M, ȳ) − β(X₀, ȳ)]}
        shift_y           = ½ {β(X₀, Δy) + β(X₁, Δy)}

    Two-player Shapley splits, X against y and magnitude against gating within X. Four factorisations in all.

    ``scale`` ``[feature]``: the standard deviations that fix the units, the same for both states. ``lam``: ridge
    penalty on a sum of squares. Raises ValueError if the states differ in shape, or from ``fit_ridge``.
    """
    check_states(before, after)
    mean_y, change_y = (before.y + after.y) / 2, after.y - before.y
    m = mean_y.shape[1]
    # β is linear in y: one factorisation per X serves the stacked right-hand sides.
    both = np.hstack([mean_y, change_y])
    start = fit_ridge(before.x, both, lam, scale=scale).coef
    end = fit_ridge(after.x, both, lam, scale=scale).coef
    moved, flipped = _halfway(before, after)
    via_moved = fit_ridge(moved, mean_y, lam, scale=scale).coef
    via_flipped = fit_ridge(flipped, mean_y, lam, scale=scale).coef
    return PathwaySplit(
        shift_x_magnitude=((via_moved - start[:, :m]) + (end[:, :m] - via_flipped)) / 2,
        shift_x_gating=((end[:, :m] - via_moved) + (via_flipped - start[:, :m])) / 2,
        shift_y=(start[:, m:] + end[:, m:]) / 2,
    )


def first_order_shift(before: State, after: State, *, scale: Array, lam: float) -> PathwaySplit:
    """The shift to first order in the step, expanded at ``before``; the gating part is zero.

    With ``G = ZᵀHZ + λI`` and ``r = H(y − Zβ)`` at ``before`` (the differential of the normal equations)::

        shift_x_magnitude = G⁻¹ (dZᵀ r − ZᵀH dZ β)      dX = gate₀ ⊙ (pre₁ − pre₀)
        shift_y           = G⁻¹ ZᵀH dy                   dy = y₁ − y₀

    The gate is held at its value before, which is also what autograd differentiates. Same arguments and errors as
    :func:`split_shift`.
    """
    check_states(before, after)
    coef = fit_ridge(before.x, before.y, lam, scale=scale).coef
    z = centred(before.x / scale)
    residual = centred(before.y) - z @ coef
    dz = before.gate * (after.pre - before.pre) / scale
    right_x = dz.T @ residual - z.T @ (dz @ coef)
    right_y = z.T @ (after.y - before.y)
    solved = solve_gram(z, lam, np.hstack([right_x, right_y]))
    m = coef.shape[1]
    return PathwaySplit(solved[:, :m], np.zeros_like(coef), solved[:, m:])


def first_order_error(exact: PathwaySplit, first: PathwaySplit) -> float:
    """How far first order is from exact: ``‖exact − first‖ / ‖exact‖``, Frobenius norms.

    Compared on ``shift_x_magnitude`` and ``shift_y`` together; gating has no first order. 0 where both shifts vanish,
    inf where only the exact one does. Raises ValueError if the two differ in shape.
    """
    if exact.shift_y.shape != first.shift_y.shape:
        raise ValueError(
            f"the exact shift has shape {exact.shift_y.shape}, the first-order one {first.shift_y.shape}; both are "
            "[feature, behaviour]. Compute both from the same two states."
        )
    whole = np.vstack([exact.shift_x_magnitude, exact.shift_y])
    gap = float(np.linalg.norm(whole - np.vstack([first.shift_x_magnitude, first.shift_y])))
    size = float(np.linalg.norm(whole))
    if size == 0.0:
        return 0.0 if gap == 0.0 else float("inf")
    return gap / size


def check_states(before: State, after: State) -> None:
    """Raise ValueError unless the two states have the same probes, features and behaviours (by shape)."""
    for name, axes in (("pre", "[probe, feature]"), ("y", "[probe, behaviour]")):
        old, new = getattr(before, name).shape, getattr(after, name).shape
        if old != new:
            raise ValueError(
                f"{name} has shape {old} before and {new} after; both states need the same {axes}. "
                "Take both snapshots with the same probes and the same support."
            )


def _halfway(before: State, after: State) -> tuple[Array, Array]:
    """``X₀ + M`` (moved, gates not yet flipped) and ``X₁ − M`` (flipped, not yet moved)."""
    magnitude = (before.gate + after.gate) / 2 * (after.pre - before.pre)
    same = before.gate == after.gate
    # Where the gate stays, the halfway points are X₁ and X₀ themselves: taking those keeps rounding out of gating,
    # which then is exactly zero when nothing flips.
    moved: Array = np.where(same, after.x, before.x + magnitude)
    flipped: Array = np.where(same, before.x, after.x - magnitude)
    return moved, flipped


def centred(values: Array) -> Array:
    """``values`` less their means over probes, ``[probe, ...]``."""
    result: Array = values - values.mean(axis=0)
    return result


def solve_gram(z: Array, lam: float, right: Array) -> Array:
    """``(ZᵀZ + λI)⁻¹ right`` for a centred ``z`` [probe, feature], in the smaller of its two dimensions."""
    n, d = z.shape
    if d <= n:
        return np.asarray(np.linalg.solve(z.T @ z + lam * np.eye(d), right), dtype=np.float64)
    # Woodbury: with more features than probes only an n × n system has to be solved.
    inner = np.linalg.solve(z @ z.T + lam * np.eye(n), z @ right)
    solved: Array = (right - z.T @ inner) / lam
    return solved


def _matrix(value: ArrayLike, name: str, axes: str) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(
            f"{name} has {array.ndim} axes, shape {array.shape}; it needs two, {axes}. "
            "For a single column pass values[:, None]."
        )
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite; all must be finite. "
            "Leave this reading out and compare the next one with the last good one."
        )
    return array
