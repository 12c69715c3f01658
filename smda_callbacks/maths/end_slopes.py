"""How the change of a functional over a whole run depends on the state at its end.

:func:`~smda_callbacks.maths.functionals.measured` takes the change between two states, exactly. Its derivative by the
second state is not the slope of :func:`~smda_callbacks.maths.functionals.slopes` there: over a run, the parts of a
coefficient's shift depend on both ends. With ``β_j(X, y)`` the coefficient, ``W(X) = HZG⁻¹`` its derivative by y, bars
for the mean of both ends, and ``M = ḡ ⊙ Δp``::

    shift_x_magnitude = ½ {[β(X₀+M, ȳ) − β(X₀, ȳ)] + [β(X₁, ȳ) − β(X₁−M, ȳ)]}
    shift_x_gating    = β(X₁, ȳ) − β(X₀, ȳ) − shift_x_magnitude
    shift_y           = ½ [β(X₀, Δy) + β(X₁, Δy)]

are differentiated by p₁ and y₁ with both gates held. The derivatives of the three sum to that of ``β(X₁, y₁)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.functionals import FeatureShift, FunctionalSet, Slopes
from smda_callbacks.maths.pathways import State, centred, check_states, solve_gram
from smda_callbacks.maths.units import conversion_slope

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _At:
    """Derivatives of coefficients at features X: ``weights`` ``[probe, feature]`` by y."""

    z: Array
    inverse: Array  # [feature, feature], symmetric
    weights: Array
    scale: Array

    @classmethod
    def of(cls, x: Array, scale: Array, lam: float) -> _At:
        z = centred(x / scale)
        inverse = solve_gram(z, lam, np.eye(len(scale)))
        return cls(z, inverse, z @ inverse, scale)

    def by_x(self, y: Array, j: int) -> Array:
        """Derivative of coefficient ``j`` for behaviour ``y [probe]`` by the activations, ``[probe, feature]``."""
        coef = self.weights.T @ y
        residual = y - y.mean() - self.z @ coef
        found: Array = (np.outer(residual, self.inverse[:, j]) - np.outer(self.weights[:, j], coef)) / self.scale
        return found


def end_slopes(functionals: FunctionalSet, before: State, after: State, *, scale: Array, lam: float) -> Slopes:
    """Derivatives of :func:`measured` by the state ``after``, in behaviours and pre-activations, gates held.

    ``scale``, ``lam`` and errors as in :func:`~smda_callbacks.maths.functionals.measured`.
    """
    check_states(before, after)
    n, d, m = functionals.shape
    result = Slopes(np.zeros((len(functionals), n, m)), np.zeros((len(functionals), n, d)))
    rate = conversion_slope(after.y, functionals.target)
    for row, mean in enumerate(functionals.means):
        inside = rate[mean.probes, mean.behaviour] if mean.converted else 1.0
        result.y[row, mean.probes, mean.behaviour] = inside / len(mean.probes)
    if functionals.shifts:
        ends = _Ends(before, after, np.asarray(scale, dtype=np.float64), lam)
        for row, shift in enumerate(functionals.shifts, start=len(functionals.means)):
            result.y[row, :, shift.behaviour], result.pre[row] = ends.slopes(shift)
    return result


class _Ends:
    """What the derivatives of all shifts share."""

    def __init__(self, before: State, after: State, scale: Array, lam: float) -> None:
        self.gate, self.mean_gate = after.gate, (before.gate + after.gate) / 2
        moved = self.mean_gate * (after.pre - before.pre)
        self.mean, self.change = (before.y + after.y) / 2, after.y - before.y
        self.start, self.open, self.back, self.end = (
            _At.of(x, scale, lam) for x in (before.x, before.x + moved, after.x - moved, after.x)
        )

    def slopes(self, shift: FeatureShift) -> tuple[Array, Array]:
        """By y ``[probe]`` and by pre-activations ``[probe, feature]``."""
        j, y = shift.position, self.mean[:, shift.behaviour]
        start, end = self.start.weights[:, j], self.end.weights[:, j]
        if shift.pathway == "y":
            return (start + end) / 2, self.end.by_x(self.change[:, shift.behaviour], j) * self.gate / 2
        by_y = (self.open.weights[:, j] - start + end - self.back.weights[:, j]) / 4
        at_end = self.end.by_x(y, j) * self.gate
        by_pre = (
            self.open.by_x(y, j) * self.mean_gate + at_end - self.back.by_x(y, j) * (self.gate - self.mean_gate)
        ) / 2
        return (by_y, by_pre) if shift.pathway == "x" else ((end - start) / 2 - by_y, at_end - by_pre)
