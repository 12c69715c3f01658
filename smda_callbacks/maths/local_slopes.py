"""The slopes of functionals by behaviours, in two factors: one known probe by probe, one that needs all probes.

``slopes(...).y = mixing @ local_slopes``: probes can be differentiated while they are being read, batch by batch, and
what depends on the whole snapshot (the ridge system) is multiplied on afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths.functionals import FunctionalSet
from smda_callbacks.maths.pathways import State, centred, solve_gram
from smda_callbacks.maths.units import conversion_slope

Array = NDArray[np.float64]


def local_slopes(functionals: FunctionalSet, probes: NDArray[np.int64], x: Array, y: Array, *, scale: Array) -> Array:
    """``[basis, row, behaviour]`` for the probes whose numbers are ``probes [row]``.

    ``x`` ``[row, feature]``, ``y`` ``[row, behaviour]``: activations and behaviours of these probes. The basis holds a
    row per group mean, and per behaviour one for each feature (``x / scale``) and one of ones.
    """
    behaviours = functionals.shape[2]
    rows = np.zeros((basis_size(functionals), len(probes), behaviours))
    rate = conversion_slope(y, functionals.target)
    for row, mean in enumerate(functionals.means):
        inside = np.isin(probes, mean.probes)
        rows[row, inside, mean.behaviour] = (rate[inside, mean.behaviour] if mean.converted else 1.0) / len(mean.probes)
    if functionals.shifts:
        z = np.hstack([x / scale, np.ones((len(probes), 1))]).T  # [feature + 1, row]
        for m in range(behaviours):
            rows[_block(functionals, m), :, m] = z
    return rows


def mixing(functionals: FunctionalSet, state: State, *, scale: Array, lam: float) -> Array:
    """``[functional, basis]``: how functionals are made of the basis of :func:`local_slopes`, at the whole ``state``.

    The slope of ``shift_y`` by the behaviours is ``G⁻¹ZᵀH`` (see :func:`~smda_callbacks.maths.functionals.slopes`), and
    ``ZᵀH dy = Σ_i z_i dy_i − z̄ Σ_i dy_i``.
    """
    mix = np.zeros((len(functionals), basis_size(functionals)))
    means = len(functionals.means)
    mix[:means, :means] = np.eye(means)
    if functionals.shifts:
        z = state.x / scale
        inverse = solve_gram(centred(z), lam, np.eye(len(scale)))  # [feature, feature]
        for row, each in enumerate(functionals.shifts, start=means):
            if each.pathway == "y":
                column = inverse[:, each.position]
                mix[row, _block(functionals, each.behaviour)] = [*column, -(z.mean(axis=0) @ column)]
    return mix


def basis_size(functionals: FunctionalSet) -> int:
    """Number of rows of the basis."""
    _, features, behaviours = functionals.shape
    return len(functionals.means) + (behaviours * (features + 1) if functionals.shifts else 0)


def _block(functionals: FunctionalSet, behaviour: int) -> slice:
    size = functionals.shape[1] + 1
    start = len(functionals.means) + behaviour * size
    return slice(start, start + size)
