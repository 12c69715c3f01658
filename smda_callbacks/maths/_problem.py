"""What a regression problem must look like before it is solved: the refusals of ``ridge``, in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.maths import sparse
from smda_callbacks.maths.sparse import Array, CSRLike, SparseRows

Matrix = NDArray[Any] | SparseRows | CSRLike
Rows = NDArray[Any] | SparseRows


def check_lam(lam: float) -> None:
    """Refuse a penalty that is not finite and positive."""
    if not (np.isfinite(lam) and lam > 0):
        raise ValueError(
            f"lam must be a finite number > 0 (a penalty on a sum of squares), got {lam}. "
            f"Choose one from loo_path(x, y, lambda_grid())."
        )


def check_resolved(lam: float, size: int, largest: float) -> None:
    """Refuse a λ that rounding swallows when it is added to a Gram matrix of that size and largest diagonal entry."""
    check_overflow(largest)
    smallest = size * float(np.finfo(np.float64).eps) * largest
    if lam < smallest:
        raise ValueError(
            f"lam={lam:g} is lost to rounding beside the data, whose Gram matrix reaches {largest:.3g}; the smallest "
            f"that float64 resolves here is {smallest:.3g}. Use a larger λ or pass scale=."
        )


def check_overflow(largest: float) -> None:
    """Refuse a Gram matrix whose largest diagonal entry is not finite, though x is."""
    if not np.isfinite(largest):
        raise ValueError("x is too large for float64: its squares overflow. Pass scale= with the size of each feature.")


def check_problem(x: Matrix, y: Array, scale: Array | None) -> tuple[Rows, Array, Array | None]:
    """x as :func:`check_x` gives it, y in float64, and the scale, once they fit together and are finite."""
    x = check_x(x)
    n, d = x.shape
    y = np.asarray(y)
    if y.ndim != 2 or y.shape[0] != n or y.shape[1] < 1:
        raise ValueError(
            f"y must be [probe, behaviour] with the {n} probes of x {x.shape}, got shape {y.shape}. "
            f"Write a single behaviour as y[:, None]."
        )
    if n < 2 or d < 1:
        raise ValueError(f"a fit needs at least 2 probes and 1 feature, got x of shape {x.shape}. Bring more of them.")
    _check_real(y, "y")
    _check_finite(y, "y", ("probe", "behaviour"))
    return x, y.astype(np.float64), check_scale(scale, d)


def check_x(x: Matrix) -> Rows:
    """x as SparseRows or a dense real array, its dtype as it came: the columns in use are converted later."""
    if not isinstance(x, SparseRows):
        x = np.asarray(x) if getattr(x, "indptr", None) is None else sparse.from_csr(x)  # type: ignore[arg-type]
    if isinstance(x, SparseRows):
        if not np.isfinite(x.data).all():
            bad = np.flatnonzero(~np.isfinite(x.data))
            _refuse_not_finite("x", bad.size, f"probe {x.rows[bad[0]]}, feature {x.indices[bad[0]]}")
        return x
    if x.ndim != 2:
        raise ValueError(f"x must be a matrix [probe, feature], got shape {x.shape}. Write one feature as x[:, None].")
    _check_real(x, "x")
    _check_finite(x, "x", ("probe", "feature"))
    return x


def check_scale(scale: Array | None, d: int) -> Array | None:
    """The scale in float64, None as it is (for ones)."""
    if scale is None:
        return None
    scale = np.asarray(scale, dtype=np.float64)
    if scale.shape != (d,):
        raise ValueError(f"scale must have one entry per feature, shape ({d},), got shape {scale.shape}.")
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if bad.size:
        raise ValueError(
            f"scale must be finite and > 0, got {bad.size} entries that are not (the first: feature {bad[0]}, "
            f"{scale[bad[0]]}). Leave features that do not vary out of the support, or give them the scale 1."
        )
    return scale


def _check_real(values: NDArray[Any], name: str) -> None:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold real numbers, got dtype {values.dtype}. Use .astype('float64') on it.")


def _check_finite(values: NDArray[Any], name: str, axes: tuple[str, str]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum()):  # one pass and no temporary; a sum may overflow, so look again before refusing
            return
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        _refuse_not_finite(name, len(bad), ", ".join(f"{a} {i}" for a, i in zip(axes, bad[0], strict=True)))


def _refuse_not_finite(name: str, count: int, where: str) -> None:
    raise ValueError(
        f"{name} is NaN or inf in {count} place{'s' if count != 1 else ''}, the first at {where}. "
        f"Only finite numbers can be fitted: find out what produced them, or leave those probes out."
    )
