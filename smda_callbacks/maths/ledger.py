"""The ledger of a window: what pairs, momentum and decay account for, and what is left unexplained.

Shares are linear in the parts of the weight update, the measured change is not: curvature, gates that flip and rounding
end up in ``unexplained``, which is defined as the remainder and so closes the books for every functional.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: The lines beside the pairs, and what all of them sum to.
_LINES = ("momentum", "decay", "unexplained")
_ALL = (*_LINES, "measured")


def close_books(
    measured: ArrayLike, share: ArrayLike, later_share: ArrayLike, *, momentum: ArrayLike, decay: ArrayLike
) -> dict[str, Array]:
    """The lines of one window's ledger, each ``[functional]`` in the functional's unit, float64.

    ``measured``, ``momentum``, ``decay`` ``[functional]``. ``share`` ``[pair, functional]``: what the window's pairs
    did; ``later_share`` ``[later, functional]``: what pairs of earlier windows went on doing. Either may hold no pair.
    ``unexplained`` is the exact sum of measured less all others, rounded once (Shewchuk's algorithm, ``math.fsum``).

    Raises ValueError for shapes that do not match or values that are not finite.
    """
    parts = {"measured": _line(measured, "measured"), "momentum": _line(momentum, "momentum")}
    parts |= {"decay": _line(decay, "decay"), "share": _rows(share, "share")}
    parts["later_share"] = _rows(later_share, "later_share")
    _check_widths(parts)
    _check_finite(parts)
    terms = np.vstack([-values if name != "measured" else values for name, values in parts.items()])
    lines = parts | {"unexplained": _sums(terms)}
    return {name: lines[name] for name in _ALL}


def balance_error(lines: Mapping[str, ArrayLike], share: ArrayLike, later_share: ArrayLike) -> float:
    """How far a window's ledger is from closing: the largest over functionals of the gap, relative to its terms.

    The gap is ``|measured − (Σ share + Σ later_share + momentum + decay + unexplained)|``, its size that of all those
    terms, ``Σ|term|``. 0 where all terms are 0, inf where one is NaN or infinite: such a ledger does not close. What
    :func:`close_books` makes stays below 1e-15.

    Raises ValueError for a line that is missing or shapes that do not match.
    """
    known = _checked_lines(lines)
    rows = [_rows(share, "share"), _rows(later_share, "later_share")]
    _check_widths({**known, "share": rows[0], "later_share": rows[1]})
    terms = np.vstack([-known["measured"], *(known[name] for name in _LINES), *rows])
    if not np.isfinite(terms).all():
        return math.inf
    gap, size = np.abs(_sums(terms)), _sums(np.abs(terms))
    return float(np.divide(gap, size, out=np.zeros_like(gap), where=size > 0).max(initial=0.0))


def _sums(terms: Array) -> Array:
    """Sum of every column of ``[term, functional]``, as if in infinite precision and rounded once."""
    return np.array([math.fsum(column) for column in terms.T.tolist()], dtype=np.float64)


def _checked_lines(lines: Mapping[str, ArrayLike]) -> dict[str, Array]:
    missing = [name for name in _ALL if name not in lines]
    if missing:
        raise ValueError(
            f"the ledger has the lines {sorted(lines)}; {missing[0]!r} is missing. Make the lines with close_books."
        )
    return {name: _line(lines[name], name) for name in _ALL}


def _line(value: ArrayLike, name: str) -> Array:
    return _with_axes(value, name, 1, "[functional]")


def _rows(value: ArrayLike, name: str) -> Array:
    return _with_axes(value, name, 2, "[pair, functional]")


def _with_axes(value: ArrayLike, name: str, axes: int, spelt: str) -> Array:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != axes:
        raise ValueError(f"{name} has shape {array.shape}; it needs {spelt}. Pass one number per functional.")
    return array


def _check_widths(arrays: Mapping[str, Array]) -> None:
    widths = {name: array.shape[-1] for name, array in arrays.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"the parts of the ledger are on axes of different lengths: {widths}; all need the same functionals. "
            "Take them from one set of functionals."
        )


def _check_finite(arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite; all must be finite. "
                "Book nothing for this window; the next one then spans it."
            )
