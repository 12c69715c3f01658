"""Sparse rows ``[probe, feature]`` and the three products that an exact dual ridge needs, in numpy alone.

An SAE activates some tens of features per probe, out of tens of thousands. Everything here costs in proportion to
the non-zeros and to ``n * n``; the number of features enters only through vectors of that length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]

#: A column active on more than one probe in this many is multiplied densely, the others pair by pair. There both cost
#: the same (measured at 200 and 400 probes; flat), and below it a column's mean is small beside its values.
_HEAVY = 16


class CSRLike(Protocol):
    """Anything in compressed-row layout, such as ``scipy.sparse.csr_array``; scipy itself is never imported."""

    indptr: Any
    indices: Any
    data: Any
    shape: Any


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix ``[probe, feature]`` in canonical compressed-row form, float64.

    Row ``i`` holds ``data[indptr[i]:indptr[i + 1]]`` at the columns ``indices[indptr[i]:indptr[i + 1]]``, which are
    strictly increasing. Build it with :func:`from_dense` or :func:`from_csr`, which bring any input to that form.

    Raises ``ValueError`` where the arrays do not describe such a matrix.
    """

    indptr: Index  # [probe + 1]
    indices: Index  # [non-zero]
    data: Array  # [non-zero]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        for name, dtype in (("indptr", np.int64), ("indices", np.int64), ("data", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        _check_layout(self.indptr, self.indices, self.data, self.shape)
        if not _is_canonical(self.indptr, self.indices):
            raise ValueError(
                "SparseRows: the column indices of a row must be strictly increasing, got unsorted or repeated ones. "
                "Build the matrix with smda_callbacks.maths.sparse.from_csr, which sorts them and sums repeats."
            )

    @property
    def rows(self) -> Index:
        """Row number of every non-zero, ``[non-zero]``."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))


def from_dense(x: Any) -> SparseRows:
    """The non-zeros of a dense ``[probe, feature]`` array of any real dtype (NaN and inf are kept, as non-zeros)."""
    x = np.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"from_dense: x must be a matrix [probe, feature], got shape {x.shape}. Reshape it first.")
    rows, columns = np.nonzero(x)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=x.shape[0]))])
    return SparseRows(indptr, columns, x[rows, columns], (x.shape[0], x.shape[1]))


def from_csr(matrix: CSRLike) -> SparseRows:
    """:class:`SparseRows` of any object with ``indptr, indices, data, shape`` in compressed-row layout.

    Unsorted columns are sorted and repeated ones summed, which is what they mean in this layout.

    Raises ``ValueError`` for another layout with the same attributes (``csc``, ``bsr``) and for inconsistent arrays.
    """
    layout = getattr(matrix, "format", "csr")
    if layout != "csr":
        raise ValueError(f"sparse x must be in compressed-row layout ('csr'), got {layout!r}. Call its .tocsr() first.")
    indptr, indices = np.asarray(matrix.indptr, dtype=np.int64), np.asarray(matrix.indices, dtype=np.int64)
    data, shape = np.asarray(matrix.data, dtype=np.float64), (int(matrix.shape[0]), int(matrix.shape[1]))
    _check_layout(indptr, indices, data, shape)
    if not _is_canonical(indptr, indices):
        indptr, indices, data = _canonical(indptr, indices, data, shape)
    return SparseRows(indptr, indices, data, shape)


def to_dense(x: SparseRows) -> Array:
    """The same matrix as a dense float64 array ``[probe, feature]``."""
    dense = np.zeros(x.shape)
    dense[x.rows, x.indices] = x.data
    return dense


def divide_columns(x: SparseRows, scale: Array) -> SparseRows:
    """``x / scale`` with one divisor per feature, ``[feature]``."""
    return SparseRows(x.indptr, x.indices, x.data / scale[x.indices], x.shape)


def times(x: SparseRows, b: Array) -> Array:
    """``x @ b`` for ``b [feature, behaviour]``; returns ``[probe, behaviour]``."""
    rows = x.rows
    columns = [np.bincount(rows, x.data * b[x.indices, m], x.shape[0]) for m in range(b.shape[1])]
    return np.stack(columns, axis=1)


def transposed_times(x: SparseRows, a: Array) -> Array:
    """``x.T @ a`` for ``a [probe, behaviour]``; returns ``[feature, behaviour]``, exactly 0 where nothing is active."""
    lengths = np.diff(x.indptr)
    columns = [np.bincount(x.indices, x.data * np.repeat(a[:, m], lengths), x.shape[1]) for m in range(a.shape[1])]
    return np.stack(columns, axis=1)


def centred_gram(x: SparseRows) -> Array:
    """``H x xᵀ H`` with ``H = I - 11ᵀ/n``: the Gram matrix of the centred rows, ``[probe, probe]``.

    Columns that many probes share are centred and multiplied densely, which also spares a large common mean the
    cancellation of centring afterwards. The others, most of a dictionary, contribute a handful of pairs each.
    """
    n = x.shape[0]
    rows, counts = x.rows, np.bincount(x.indices, minlength=x.shape[1])
    limit = max(1, n // _HEAVY)
    slot = np.empty(x.shape[1], dtype=np.int64)  # set, and read, for the chosen columns only
    per_entry = counts[x.indices]
    heavy = np.flatnonzero(per_entry > limit)
    block = _dense_columns(x, rows, heavy, np.flatnonzero(counts > limit), slot)
    block -= block.mean(axis=0)
    gram = block @ block.T
    shared = np.flatnonzero((per_entry > 1) & (per_entry <= limit))
    _add_products(gram, x, rows, shared, np.flatnonzero((counts > 1) & (counts <= limit)), counts, slot)
    squares = np.square(x.data)
    squares[heavy] = 0.0
    gram.flat[:: n + 1] += np.bincount(rows, squares, n)
    mean = gram.mean(axis=0)
    mean -= mean.mean() / 2
    gram -= mean
    gram -= mean[:, None]
    return gram


def _dense_columns(x: SparseRows, rows: Index, entries: Index, columns: Index, slot: Index) -> Array:
    """``columns`` of x, whose non-zeros are ``entries``, as a dense array ``[probe, column]``."""
    slot[columns] = np.arange(columns.size)
    block = np.zeros((x.shape[0], columns.size))
    block[rows[entries], slot[x.indices[entries]]] = x.data[entries]
    return block


def _add_products(
    gram: Array, x: SparseRows, rows: Index, entries: Index, columns: Index, counts: Index, slot: Index
) -> None:
    """Add to ``gram`` the products of ``columns``, whose non-zeros are ``entries``, between different rows."""
    n = x.shape[0]
    # Numbers that fit 16 bits are sorted by radix, several times faster.
    slot[columns] = np.arange(columns.size)
    order = np.argsort(slot[x.indices[entries]].astype(np.min_scalar_type(columns.size)), kind="stable")
    entries = entries[order]
    partners, right = _later_in_run(counts[columns])
    row, value = rows[entries], x.data[entries]
    products = np.repeat(value, partners)
    products *= value.take(right)
    first, second = np.repeat(row, partners), row.take(right)
    flat = gram.reshape(-1)
    np.add.at(flat, first * n + second, products)
    np.add.at(flat, second * n + first, products)


def _later_in_run(sizes: Index) -> tuple[Index, Index]:
    """In consecutive runs of the given sizes: how many positions follow each in its run, and which, one by one."""
    positions = np.arange(int(sizes.sum()))
    partners = np.repeat(np.cumsum(sizes), sizes) - positions - 1
    first = np.cumsum(partners) - partners
    right = np.repeat(positions + 1 - first, partners)
    right += np.arange(right.size)
    return partners, right


def _is_canonical(indptr: Index, indices: Index) -> bool:
    increasing = np.diff(indices) > 0
    starts = indptr[1:-1]
    starts = starts[(starts > 0) & (starts < indices.size)]
    increasing[starts - 1] = True  # from one row to the next anything goes
    return bool(increasing.all())


def _canonical(indptr: Index, indices: Index, data: Array, shape: tuple[int, int]) -> tuple[Index, Index, Array]:
    rows = np.repeat(np.arange(shape[0]), np.diff(indptr))
    cells, inverse = np.unique(rows * shape[1] + indices, return_inverse=True)
    counts = np.bincount(cells // shape[1], minlength=shape[0])
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return indptr, cells % shape[1], np.bincount(inverse, data).astype(np.float64)


def _check_layout(indptr: Index, indices: Index, data: Array, shape: tuple[int, int]) -> None:
    n, d = shape
    problem = None
    if not indptr.ndim == indices.ndim == data.ndim == 1:
        problem = f"indptr, indices and data must be 1-D, got {indptr.ndim}-D, {indices.ndim}-D and {data.ndim}-D"
    elif indptr.size != n + 1:
        problem = f"indptr must have one entry per row plus one, {n + 1}, got {indptr.size}"
    elif indices.size != data.size:
        problem = f"indices and data must be of one length, got {indices.size} and {data.size}"
    elif indptr[0] != 0 or indptr[-1] != data.size or (np.diff(indptr) < 0).any():
        problem = f"indptr must rise from 0 to the number of non-zeros, {data.size}"
    elif indices.size and (indices.min() < 0 or indices.max() >= d):
        problem = f"indices must lie in 0..{d - 1}, got {indices.min()}..{indices.max()}"
    if problem:
        raise ValueError(f"sparse x of shape {shape}: {problem}. Is it in compressed-row ('csr') layout?")
