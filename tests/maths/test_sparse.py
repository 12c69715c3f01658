"""Sparse rows against the dense matrix that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from numpy.typing import NDArray
from sklearn.linear_model import Ridge

from smda_callbacks.maths import sparse
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.maths.sparse import SparseRows, from_csr, from_dense, to_dense

Array = NDArray[np.float64]


def zipf_rows(n: int, d: int, l0: int, seed: int = 0) -> SparseRows:
    """Rows with ``l0`` active features each; the feature of popularity rank r is drawn in proportion to 1 / r."""
    rng = np.random.default_rng(seed)
    popularity = 1.0 / np.arange(1, d + 1)
    name = rng.permutation(d)
    columns = [np.sort(name[rng.choice(d, l0, replace=False, p=popularity / popularity.sum())]) for _ in range(n)]
    return SparseRows(np.arange(n + 1) * l0, np.concatenate(columns), rng.exponential(1.0, n * l0), (n, d))


@dataclass(frozen=True)
class HandMadeCSR:
    """Compressed rows that come from no library."""

    indptr: Any
    indices: Any
    data: Any
    shape: Any


CASES = {
    "zipf": to_dense(zipf_rows(64, 500, 20)),
    "few probes": to_dense(zipf_rows(3, 40, 6)),
    "all active": np.random.default_rng(0).normal(size=(20, 30)),
    "nothing active": np.zeros((4, 7)),
    "empty rows at both ends": np.pad(np.eye(3), ((2, 2), (1, 4))),
    "one column": np.arange(5.0)[:, None],
    "every column rare": np.kron(np.eye(20), np.ones((2, 3))),
}


@pytest.fixture(params=CASES, ids=str)
def dense(request: pytest.FixtureRequest) -> Array:
    return CASES[request.param]


def test_dense_to_sparse_and_back_is_the_same_matrix(dense: Array) -> None:
    rows = from_dense(dense)
    np.testing.assert_array_equal(to_dense(rows), dense)
    assert rows.data.size == np.count_nonzero(dense)


def test_products_are_those_of_the_dense_matrix(dense: Array) -> None:
    rng, (n, d), rows = np.random.default_rng(1), dense.shape, from_dense(dense)
    a, b, scale = rng.normal(size=(n, 3)), rng.normal(size=(d, 2)), rng.uniform(0.5, 2.0, d)
    np.testing.assert_allclose(sparse.times(rows, b), dense @ b, atol=1e-12)
    np.testing.assert_allclose(sparse.transposed_times(rows, a), dense.T @ a, atol=1e-12)
    np.testing.assert_allclose(to_dense(sparse.divide_columns(rows, scale)), dense / scale, atol=1e-15)


@pytest.mark.parametrize("heavy", [1, 2, 16, 10**9], ids=lambda h: f"1 in {h}")
def test_centred_gram_is_that_of_the_centred_matrix_wherever_columns_are_split(
    dense: Array, heavy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_HEAVY", heavy)
    centred = dense - dense.mean(axis=0)
    gram = sparse.centred_gram(from_dense(dense))
    np.testing.assert_allclose(gram, centred @ centred.T, atol=1e-11)
    np.testing.assert_allclose(gram.sum(axis=0), 0.0, atol=1e-10)


def test_centred_gram_keeps_its_digits_beside_a_large_common_mean() -> None:
    x = to_dense(zipf_rows(64, 300, 10))
    offset = x.copy()
    offset[:, 0] += 2.0**30  # exact in binary, so the centred columns are the same but for x's own last digits
    # Centring after the product would leave errors of about 2**60 * 1e-16 = 100.
    np.testing.assert_allclose(sparse.centred_gram(from_dense(offset)), sparse.centred_gram(from_dense(x)), atol=1e-5)


def test_more_columns_than_sixteen_bits_can_number() -> None:
    n, pairs = 40, 70_000
    rng = np.random.default_rng(0)
    first = rng.integers(0, n - 1, pairs)
    second = first + 1 + (rng.random(pairs) * (n - 1 - first)).astype(int)
    built = scipy.sparse.coo_array(
        (rng.normal(size=2 * pairs), (np.append(first, second), np.tile(np.arange(pairs), 2))), shape=(n, pairs)
    ).tocsr()
    expected = (built @ built.T).toarray()
    expected = expected - expected.mean(axis=0)
    expected -= expected.mean(axis=1)[:, None]
    np.testing.assert_allclose(sparse.centred_gram(from_csr(built)), expected, atol=1e-9)


@pytest.mark.parametrize("d", [16_384, 131_072])
def test_dictionary_sized_fit_equals_scikit_learn_on_the_dense_matrix(d: int) -> None:
    rows = zipf_rows(60, d, 70)
    y = np.random.default_rng(1).random((60, 2))
    expected = Ridge(alpha=10.0).fit(to_dense(rows), y)
    fit = fit_ridge(rows, y, 10.0)
    np.testing.assert_allclose(fit.coef, expected.coef_.T, atol=1e-8)
    np.testing.assert_allclose(fit.intercept, expected.intercept_, atol=1e-8)
    assert fit.route == "dual"
    never = np.bincount(rows.indices, minlength=d) == 0
    assert never.sum() > d / 2
    assert not fit.coef[never].any()


@pytest.mark.parametrize("make", [scipy.sparse.csr_array, scipy.sparse.csr_matrix], ids=["array", "matrix"])
def test_scipy_rows_are_taken_by_their_attributes(make: Any) -> None:
    x = to_dense(zipf_rows(30, 200, 12))
    y = np.random.default_rng(1).random((30, 1))
    np.testing.assert_array_equal(fit_ridge(make(x), y, 1.0).coef, fit_ridge(from_dense(x), y, 1.0).coef)
    np.testing.assert_array_equal(to_dense(from_csr(make(x.astype(np.float32)))), x.astype(np.float32))


def test_unsorted_and_repeated_columns_mean_what_they_mean_in_this_layout() -> None:
    loose = HandMadeCSR([0, 3, 3, 5], [4, 0, 4, 1, 0], [1.0, 2.0, 3.0, 4.0, 5.0], (3, 5))
    expected = [[2.0, 0, 0, 0, 4.0], [0, 0, 0, 0, 0], [5.0, 4.0, 0, 0, 0]]
    rows = from_csr(loose)
    np.testing.assert_array_equal(to_dense(rows), expected)
    assert rows.indices.tolist() == [0, 4, 0, 1]
    y = np.array([[0.0], [1.0], [0.5]])
    np.testing.assert_allclose(fit_ridge(loose, y, 1.0).coef, fit_ridge(np.array(expected), y, 1.0).coef, atol=1e-14)


def test_stored_zeros_change_nothing() -> None:
    rows = from_csr(HandMadeCSR([0, 2, 3], [0, 1, 1], [1.0, 0.0, 2.0], (2, 3)))
    np.testing.assert_array_equal(sparse.centred_gram(rows), sparse.centred_gram(from_dense(to_dense(rows))))


@pytest.mark.parametrize("layout", ["csc_array", "bsr_array"])
def test_refuses_other_layouts_with_the_same_attributes(layout: str) -> None:
    matrix = getattr(scipy.sparse, layout)(np.eye(4))
    with pytest.raises(
        ValueError, match=rf"compressed-row layout \('csr'\), got '{layout[:3]}'\. Call its \.tocsr\(\)"
    ):
        fit_ridge(matrix, np.eye(4), 1.0)


@pytest.mark.parametrize(
    ("indptr", "indices", "data", "message"),
    [
        ([0, 1], [0], [1.0], "one entry per row plus one, 3, got 2"),
        ([0, 1, 2], [0, 1], [1.0], "of one length, got 2 and 1"),
        ([0, 2, 1], [0], [1.0], "indptr must rise from 0 to the number of non-zeros, 1"),
        ([1, 1, 1], [0], [1.0], "indptr must rise from 0"),
        ([0, 1, 2], [0, 3], [1.0, 1.0], r"indices must lie in 0\.\.2, got 0\.\.3"),
        ([0, 1, 2], [-1, 0], [1.0, 1.0], r"indices must lie in 0\.\.2, got -1\.\.0"),
        ([0, 1, 1], [0], [[1.0]], "must be 1-D, got 1-D, 1-D and 2-D"),
    ],
)
def test_refuses_arrays_that_describe_no_matrix(indptr: Any, indices: Any, data: Any, message: str) -> None:
    for build in (from_csr, lambda m: SparseRows(m.indptr, m.indices, m.data, m.shape)):
        with pytest.raises(ValueError, match=r"sparse x of shape \(2, 3\): .*" + message):
            build(HandMadeCSR(indptr, indices, data, (2, 3)))


def test_refuses_loose_columns_in_the_constructor_and_names_the_way_out() -> None:
    for indices in ([1, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"strictly increasing, got unsorted or repeated.*sparse\.from_csr"):
            SparseRows(np.array([0, 2]), np.array(indices), np.ones(2), (1, 3))
    assert callable(sparse.from_csr)
    with pytest.raises(ValueError, match=r"must be a matrix \[probe, feature\], got shape \(3,\)"):
        from_dense(np.ones(3))
