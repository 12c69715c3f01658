"""Which features a policy uses, and how strongly it is penalised. Both are chosen once, at distillation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def choose_support(x: Array, y: Array, *, size: int, min_active: int) -> NDArray[np.int64]:
    """Columns of ``x`` for the policy: the ``size`` most correlated with any behaviour among those active often enough.

    Args:
        x: activations ``[probe, feature]``; active means above zero.
        y: behaviours ``[probe, behaviour]``.
        size: how many to keep at most.
        min_active: a feature must be active on at least this many probes. Features that fire on a handful of probes
            fit those probes and nothing else.

    Returns:
        Column numbers in ascending order (int64). Ties go to the lower number, so the choice is reproducible.

    Raises:
        ValueError: no feature is active often enough, or the arguments are out of range.
    """
    if size < 1 or min_active < 1:
        raise ValueError(f"size and min_active must be at least 1, got size={size} and min_active={min_active}.")
    active = (x > 0).sum(axis=0)
    candidates = np.flatnonzero(active >= min_active)
    if len(candidates) == 0:
        raise ValueError(
            f"no feature is active on at least {min_active} of {len(x)} probes (the most active one fires on "
            f"{int(active.max(initial=0))}). Next step: lower policy.min_active, use more probes, or check that the "
            "SAE belongs to this model and layer."
        )
    strength = _correlation(x[:, candidates], y)
    best = candidates[np.argsort(-strength, kind="stable")[:size]]
    return np.sort(best).astype(np.int64)


def _correlation(x: Array, y: Array) -> Array:
    """Largest absolute correlation of each column of ``x`` with any column of ``y``; 0 where one does not vary."""
    x = x - x.mean(axis=0)
    y = y - y.mean(axis=0)
    norm = np.linalg.norm(x, axis=0)[:, None] * np.linalg.norm(y, axis=0)[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.abs(x.T @ y) / norm
    return np.where(norm > 0, correlation, 0.0).max(axis=1)


def feature_scale(x: Array) -> Array:
    """Standard deviation of each feature over the probes, ``[feature]``; 1 where a feature does not vary."""
    deviation = x.std(axis=0)
    return np.where(deviation > 0, deviation, 1.0)


def strongest_keeping(lams: Array, error: Array, tolerance: float) -> float:
    """The largest λ that keeps ``1 - tolerance`` of the best leave-one-out R² = 1 - error.

    Prediction is flat over decades of λ, while the shift of a weakly penalised policy depends on which probes were
    asked: giving up a fifth of R² raised split-half reliability from 0.1 to 0.4 to above 0.7 (recipes/EVIDENCE.md). The
    same idea as the one-standard-error rule (Hastie, Tibshirani & Friedman, Elements of Statistical Learning, 7.10).

    Args:
        lams: ``[lam]``.
        error: ``[lam]``, leave-one-out mean squared error over the variance of the behaviour.
        tolerance: share of the best R² that may be given up, in [0, 1).

    Returns:
        The chosen λ; the one of lowest error where no R² is above 0, since there is nothing to share out.
    """
    r2 = 1.0 - error
    best = r2.max()
    return float(np.max(lams[r2 >= best * (1 - tolerance)])) if best > 0 else float(lams[np.argmax(r2)])
