"""How far a policy may be believed: R² overall, per category, and with every choice made again in each fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Predictor = Callable[[Index], Array]

#: Below this variance a category does not vary, and a share of its variance means nothing.
MIN_VARIANCE = 1e-12


def r2(y: Array, pred: Array) -> Array:
    """Share of the variance over probes that ``pred`` explains, ``[behaviour]``, float64.

    ``1 - Σ(y - pred)² / Σ(y - ȳ)²``, ȳ the mean of all of ``y`` also where ``pred`` is leave-one-out or from folds.
    At most 1; negative where the mean would predict better; NaN for a behaviour whose variance is below
    ``MIN_VARIANCE``. ``y`` and ``pred`` are ``[probe, behaviour]``; ``ValueError`` where their shapes differ.
    """
    y, pred = np.asarray(y, dtype=np.float64), np.asarray(pred, dtype=np.float64)
    if y.ndim != 2 or y.shape != pred.shape or not len(y):
        raise ValueError(
            f"y and the predictions must both be [probe, behaviour] with one probe or more, got {y.shape} and "
            f"{pred.shape}. Write a single behaviour as y[:, None]."
        )
    variance = y.var(axis=0)
    varies = variance >= MIN_VARIANCE
    unexplained = np.square(y - pred).mean(axis=0) / np.where(varies, variance, 1.0)
    return np.where(varies, 1.0 - unexplained, np.nan)


def category_quality(
    y: Array, fitted: Array, loo: Array, groups: NDArray[np.integer], names: Sequence[str]
) -> tuple[dict[str, dict[str, float | None]], ...]:
    """Error figures of every category, one mapping ``category -> figure -> value`` per behaviour.

    ``y``, ``fitted`` and ``loo`` (leave-one-out predictions) are ``[probe, behaviour]``; ``groups [probe]`` numbers the
    categories and ``names`` spells them. Figures, in the units of ``y``: ``mean`` and ``predicted`` (means of ``y``
    and ``fitted``), ``rmse``, ``rmse_loo``, and ``r2``, ``r2_loo`` against the category's own mean, None where its
    variance is below ``MIN_VARIANCE``.

    Raises ``ValueError`` for shapes that do not match, a group without a name, and a name without a probe.
    """
    y = np.asarray(y, dtype=np.float64)
    for other in (fitted, loo):
        if np.shape(other) != y.shape:
            raise ValueError(f"y, fitted and loo must have one shape, got {y.shape} and {np.shape(other)}.")
    numbers = _check_groups(groups, len(y))
    present = set(numbers.tolist())
    if present != set(range(len(names))):
        raise ValueError(
            f"groups must use every number 0..{len(names) - 1}, one per name, got {sorted(present)}. "
            f"Names: {', '.join(names)}. Drop names without probes and number the categories from 0."
        )
    rows = [np.flatnonzero(numbers == number) for number in range(len(names))]
    return tuple(
        {name: _figures(y[r, m], fitted[r, m], loo[r, m]) for name, r in zip(names, rows, strict=True)}
        for m in range(y.shape[1])
    )


def stratified_folds(groups: NDArray[np.integer], folds: int = 10, seed: int = 0) -> Index:
    """Fold number of every probe, ``[probe]``: shuffled within each group, then dealt out in turn.

    Fold sizes differ by at most one, in every group and overall. Same seed, same folds.

    Raises ``ValueError`` unless 2 <= ``folds`` <= number of probes.
    """
    groups = _check_groups(groups, len(groups))
    if not 2 <= folds <= len(groups):
        raise ValueError(
            f"folds must be between 2 and the number of probes, {len(groups)}, got {folds}. "
            f"Ask for fewer folds or bring more probes."
        )
    shuffled = np.random.default_rng(seed).permutation(len(groups))
    dealt = shuffled[np.argsort(groups[shuffled], kind="stable")]
    number = np.empty(len(groups), dtype=np.int64)
    number[dealt] = np.arange(len(groups)) % folds
    return number


def cv_r2(
    y: Array,
    fit_fold: Callable[[Index], Predictor],
    *,
    groups: NDArray[np.integer] | None = None,
    folds: int = 10,
    seed: int = 0,
) -> Array:
    """Honest R², ``[behaviour]``: :func:`r2` of the predictions that each probe gets from a fit that never saw it.

    ``fit_fold(train_rows)`` is called once per fold and must make *every* choice (support, scale, λ) from those probes
    alone; it returns ``predictor(rows) -> [row, behaviour]``, which is asked for the rows left out. Folds are those of
    :func:`stratified_folds`; without ``groups`` all probes are one group.

    Raises ``ValueError`` as :func:`r2` and :func:`stratified_folds` do, and for predictions of the wrong shape or
    not finite.
    """
    y = np.asarray(y, dtype=np.float64)
    number = stratified_folds(np.zeros(len(y), dtype=np.int64) if groups is None else groups, folds, seed)
    if len(number) != len(y):
        raise ValueError(f"groups must have one entry per probe, {len(y)}, got {len(number)}.")
    predicted = np.empty_like(y)
    for fold in range(folds):
        held_out = np.flatnonzero(number == fold)
        answer = np.asarray(fit_fold(np.flatnonzero(number != fold))(held_out), dtype=np.float64)
        if answer.shape != (held_out.size, *y.shape[1:]) or not np.isfinite(answer).all():
            raise ValueError(
                f"fold {fold}: the predictor must return finite values of shape {(held_out.size, *y.shape[1:])}, got "
                f"shape {answer.shape}, {int((~np.isfinite(answer)).sum())} not finite. Check what fit_fold returns."
            )
        predicted[held_out] = answer
    return r2(y, predicted)


def _figures(y: Array, fitted: Array, loo: Array) -> dict[str, float | None]:
    mse, mse_loo, variance = float(np.mean((y - fitted) ** 2)), float(np.mean((y - loo) ** 2)), float(np.var(y))
    varies = variance >= MIN_VARIANCE
    return {
        "mean": float(np.mean(y)),
        "predicted": float(np.mean(fitted)),
        "rmse": mse**0.5,
        "rmse_loo": mse_loo**0.5,
        "r2": 1.0 - mse / variance if varies else None,
        "r2_loo": 1.0 - mse_loo / variance if varies else None,
    }


def _check_groups(groups: NDArray[np.integer], n: int) -> Index:
    numbers = np.asarray(groups)
    if numbers.shape != (n,) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"groups must be one integer per probe, shape ({n},), got shape {numbers.shape} of {numbers.dtype}. "
            f"Number the categories 0, 1, 2, ..."
        )
    return numbers.astype(np.int64)
