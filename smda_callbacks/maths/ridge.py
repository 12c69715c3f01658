"""Exact ridge regression of behaviours on features, with closed-form leave-one-out.

Objective, here and everywhere in the library, for each behaviour (column of y) on its own:

    minimise  ‖H(y − Zb)‖² + λ‖b‖²,    Z = X / scale,    H = I − 11ᵀ/n

A *sum* of squares over probes, not a mean; the intercept is free and not penalised. λ is therefore the ``alpha`` of
``sklearn.linear_model.Ridge``. Two exact routes to the same answer (Saunders, Gammerman & Vovk, ICML 1998):

    primal  b = (ZᵀHZ + λI)⁻¹ ZᵀHy          dual  b = ZᵀH (HZZᵀH + λI)⁻¹ Hy

X is dense ``[probe, feature]`` of any real dtype, :class:`~smda_callbacks.maths.sparse.SparseRows`, or any object in
compressed-row layout. y is ``[probe, behaviour]`` in its own units (probability or logit). All work is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths import sparse
from smda_callbacks.maths._problem import (
    Matrix,
    Rows,
    check_lam,
    check_overflow,
    check_problem,
    check_resolved,
    check_scale,
    check_x,
)
from smda_callbacks.maths.quality import MIN_VARIANCE, r2
from smda_callbacks.maths.sparse import Array, SparseRows

Route = Literal["primal", "dual"]

#: Where 1 - leverage is smaller, its rounding error spoils the leave-one-out residual in the eighth digit.
_LEAST_FREE = 1e-8


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A policy: behaviour = ``intercept + (x / scale) @ coef``, behaviour units per unit of ``x / scale``."""

    coef: Array  # [feature, behaviour]
    intercept: Array  # [behaviour]
    lam: float
    route: Route  # the one that was solved
    n: int
    d: int


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """How far a fit may be believed.

    ``loo`` is what each probe would have been predicted with that probe left out (λ and scale held, mean and
    coefficients refitted). ``r2_loo`` is ``1 - Σ(y - loo)² / Σ(y - ȳ)²``; NaN, like ``r2``, where y does not vary.
    ``edf`` is the trace of the hat matrix, intercept included; ``condition`` that of ``ZᵀHZ + λI`` in the 2-norm.
    """

    fitted: Array  # [probe, behaviour]
    loo: Array  # [probe, behaviour]
    leverage: Array  # [probe], diagonal of the hat matrix
    r2: Array  # [behaviour]
    r2_loo: Array  # [behaviour]
    edf: float
    condition: float


@dataclass(frozen=True, eq=False)
class LambdaPath:
    """Leave-one-out error along a grid of λ."""

    lams: Array  # [lam]
    mse: Array  # [lam, behaviour], mean squared leave-one-out error
    best: float  # lowest mean over varying behaviours of mse / variance
    at_edge: bool  # best is the smallest or largest of the grid: look further out


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Eigenvalues of HZZᵀH with their vectors, orthogonal to 1; ``complete`` if they span all such directions."""

    values: Array  # [k]
    vectors: Array  # [probe, k]
    complete: bool


def lambda_grid(low: float = 1e-2, high: float = 1e5, num: int = 15) -> Array:
    """``num`` values of λ from ``low`` to ``high``, evenly spaced in the logarithm; half a decade apart by default."""
    if not (np.isfinite([low, high]).all() and 0 < low < high and num >= 2):
        raise ValueError(
            f"a λ grid needs 0 < low < high, both finite, and num >= 2, got low={low}, high={high}, num={num}."
        )
    return np.geomspace(low, high, num)


def fit_ridge(
    x: Matrix, y: Array, lam: float, *, scale: Array | None = None, route: Literal["auto", "primal", "dual"] = "auto"
) -> RidgeFit:
    """Minimise ``‖H(y − Zb)‖² + λ‖b‖²`` exactly; one factorisation serves all behaviours.

    ``scale [feature]`` divides the columns of x (None: ones). ``route="auto"`` takes the primal where d <= n, else the
    dual; the fit names the one taken. Cost: primal n·d² + d³, dual n²·d + n³ (features active on no probe cost next to
    nothing there and get a coefficient of exactly 0); SparseRows make the dual's n²·d proportional to the non-zeros.

    Raises ``ValueError`` for shapes that do not match, fewer than 2 probes, NaN or inf, a scale or λ that is not
    positive and finite, and a λ lost to rounding beside the data, where float64 cannot tell the solution.
    """
    check_lam(lam)
    x, y, scale = check_problem(x, y, scale)
    n, d = x.shape
    if route not in ("auto", "primal", "dual"):
        raise ValueError(f"route must be 'auto', 'primal' or 'dual', got {route!r}.")
    taken: Route = ("primal" if d <= n else "dual") if route == "auto" else route
    if taken == "primal":
        coef, intercept = _primal(x, y, float(lam), scale)
    elif isinstance(x, SparseRows):
        coef, intercept = _sparse_dual(x, y, float(lam), scale)
    else:
        coef, intercept = _dense_dual(x, y, float(lam), scale)
    return RidgeFit(coef, intercept, float(lam), taken, n, d)


def predict(x: Matrix, fit: RidgeFit, *, scale: Array | None = None) -> Array:
    """``intercept + (x / scale) @ coef``, ``[probe, behaviour]``; ``scale`` as it was in the fit.

    Raises ``ValueError`` for a number of features other than the fit's, NaN or inf, and as the fit does for ``scale``.
    """
    x = check_x(x)
    if x.shape[1] != fit.d:
        raise ValueError(f"x has {x.shape[1]} features, the fit {fit.d}. Pass the columns that it was fitted on.")
    scale = check_scale(scale, fit.d)
    coef = fit.coef if scale is None else fit.coef / scale[:, None]
    return fit.intercept + (sparse.times(x, coef) if isinstance(x, SparseRows) else x @ coef)


def diagnose(x: Matrix, y: Array, fit: RidgeFit, *, scale: Array | None = None) -> Diagnostics:
    """:class:`Diagnostics` of ``fit`` on the very x, y and scale that it was fitted on.

    Closed form, no refits: with e the residual and h the leverage (intercept included), the leave-one-out residual is
    ``e / (1 - h)`` (Allen's PRESS; Golub, Heath & Wahba, Technometrics 1979), which is exact with re-centring too.

    Raises ``ValueError`` as :func:`fit_ridge` does, where ``fit`` does not belong to x, y and scale, and where a probe
    left out would leave nothing that determines its prediction (leverage 1).
    """
    x, y, scale = check_problem(x, y, scale)
    fitted = predict(x, fit, scale=scale)
    spectrum = _spectrum(x, scale)
    residual, free = _residuals(spectrum, y, fit.lam)
    off = float(np.abs(y - residual - fitted).max())
    if off > 1e-6 * np.abs(y).max():
        raise ValueError(
            f"the fit (n={fit.n}, d={fit.d}, lam={fit.lam:g}) was not made from this x, y and scale: its fitted values "
            f"are off by up to {off:.3g}. Pass the data of the fit, or refit."
        )
    loo = y - residual / free[:, None]
    values = spectrum.values
    floor = values.min() if fit.d < fit.n else 0.0  # centred, n probes span n - 1 directions of the features at most
    edf = 1.0 + float((values / (values + fit.lam)).sum())
    condition = float((values.max() + fit.lam) / (floor + fit.lam))
    return Diagnostics(fitted, loo, 1.0 - free, r2(y, fitted), r2(y, loo), edf, condition)


def loo_path(x: Matrix, y: Array, lams: Array, *, scale: Array | None = None) -> LambdaPath:
    """Leave-one-out error at every λ of ``lams`` from a single eigendecomposition.

    Raises ``ValueError`` as :func:`diagnose` does, and where no behaviour varies: there is nothing to choose by.
    """
    x, y, scale = check_problem(x, y, scale)
    lams = np.asarray(lams, dtype=np.float64)
    if lams.ndim != 1 or not lams.size:
        raise ValueError(f"lams must be a list of one λ or more, got shape {lams.shape}. lambda_grid() makes one.")
    for lam in lams:
        check_lam(lam)
    variance = y.var(axis=0)
    varies = variance >= MIN_VARIANCE
    if not varies.any():
        raise ValueError(
            f"no behaviour varies over the {len(y)} probes (variances {variance}), so no λ is better than another. "
            f"Use probes on which the behaviour differs."
        )
    spectrum = _spectrum(x, scale)
    mse = np.empty((lams.size, y.shape[1]))
    for row, lam in enumerate(lams):
        residual, free = _residuals(spectrum, y, float(lam))
        mse[row] = np.square(residual / free[:, None]).mean(axis=0)
    best = float(lams[np.argmin((mse[:, varies] / variance[varies]).mean(axis=1))])
    return LambdaPath(lams, mse, best, best in (lams.min(), lams.max()))


def _primal(x: Rows, y: Array, lam: float, scale: Array | None) -> tuple[Array, Array]:
    z, mean = _centred(x, scale)
    gram = z.T @ z
    check_resolved(lam, len(gram), float(gram.diagonal().max()))
    gram.flat[:: len(gram) + 1] += lam
    coef = np.linalg.solve(gram, z.T @ (y - y.mean(axis=0)))
    return coef, y.mean(axis=0) - mean @ coef


def _dense_dual(x: NDArray[Any], y: Array, lam: float, scale: Array | None) -> tuple[Array, Array]:
    active = np.flatnonzero((x != 0).any(axis=0))
    whole = active.size == x.shape[1]
    z, mean = _centred(x, scale) if whole else _centred(x[:, active], None if scale is None else scale[active])
    weights = _dual_weights(z @ z.T, y, lam)
    some = z.T @ weights
    intercept = y.mean(axis=0) - mean @ some
    if whole:
        return some, intercept
    coef = np.zeros((x.shape[1], y.shape[1]))
    coef[active] = some
    return coef, intercept


def _sparse_dual(x: SparseRows, y: Array, lam: float, scale: Array | None) -> tuple[Array, Array]:
    z = x if scale is None else sparse.divide_columns(x, scale)
    # The weights sum to 0, so that Zᵀ does what (HZ)ᵀ would and Z need never be centred.
    coef = sparse.transposed_times(z, _dual_weights(sparse.centred_gram(z), y, lam))
    return coef, y.mean(axis=0) - z.data @ coef.take(z.indices, axis=0) / len(y)


def _dual_weights(gram: Array, y: Array, lam: float) -> Array:
    """``(HZZᵀH + λI)⁻¹ Hy``, ``[probe, behaviour]``; overwrites ``gram``, which is HZZᵀH."""
    check_resolved(lam, len(gram), float(gram.diagonal().max()))
    gram.flat[:: len(y) + 1] += lam
    weights = np.linalg.solve(gram, y - y.mean(axis=0))
    # The exact weights sum to 0; what rounding leaves of a sum, 1/λ has blown up.
    return weights - weights.mean(axis=0)


def _spectrum(x: Rows, scale: Array | None) -> _Spectrum:
    n, d = x.shape
    if d < n:
        vectors, singular, _ = np.linalg.svd(_centred(x, scale)[0], full_matrices=False)
        return _Spectrum(np.square(singular), vectors, complete=False)
    if isinstance(x, SparseRows):
        gram = sparse.centred_gram(x if scale is None else sparse.divide_columns(x, scale))
    else:
        active = np.flatnonzero((x != 0).any(axis=0))
        z, _ = _centred(x[:, active], None if scale is None else scale[active])
        gram = z @ z.T
    check_overflow(float(gram.diagonal().max()))
    basis = _zero_sum_basis(n)
    values, vectors = np.linalg.eigh(basis.T @ gram @ basis)
    return _Spectrum(np.maximum(values, 0.0), basis @ vectors, complete=True)


def _zero_sum_basis(n: int) -> Array:
    """Orthonormal ``[n, n - 1]`` basis of the vectors that sum to 0: a Householder reflection less its first column."""
    axis = np.full(n, n**-0.5)
    axis[0] += 1.0
    return np.eye(n)[:, 1:] - np.outer(axis, axis[1:] / axis[0])


def _residuals(spectrum: _Spectrum, y: Array, lam: float) -> tuple[Array, Array]:
    """Residuals ``[probe, behaviour]`` and ``1 - leverage [probe]`` at λ."""
    n, vectors = len(y), spectrum.vectors
    check_resolved(lam, len(spectrum.values), float(spectrum.values.max()))
    centred = y - y.mean(axis=0)
    if spectrum.complete:  # sums of positive terms: no cancellation, however small λ
        kept = lam / (spectrum.values + lam)
        residual, free = vectors @ (kept[:, None] * (vectors.T @ centred)), np.square(vectors) @ kept
    else:
        taken = spectrum.values / (spectrum.values + lam)
        residual = centred - vectors @ (taken[:, None] * (vectors.T @ centred))
        free = 1.0 - 1.0 / n - np.square(vectors) @ taken
        tight = int(np.argmin(free))
        if free[tight] < _LEAST_FREE:
            raise ValueError(
                f"leave-one-out is not determined at lam={lam:g}: probe {tight} has leverage 1 to rounding (n={n}, "
                f"{len(spectrum.values)} features). Use a larger λ or fewer features."
            )
    return residual, free


def _centred(x: Rows, scale: Array | None) -> tuple[Array, Array]:
    """``HZ`` as a fresh float64 array ``[probe, feature]``, and the means taken off ``[feature]``."""
    z = sparse.to_dense(x) if isinstance(x, SparseRows) else x.astype(np.float64)
    if scale is not None:
        z /= scale
    mean = z.mean(axis=0)
    z -= mean
    return z, mean
