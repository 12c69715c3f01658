"""Interference, its flag and its matrix, by hand and under what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.interference import AgainstSwaps, against_swaps, interference, interference_matrix
from smda_callbacks.maths.uncertainty import times_for

Array = NDArray[np.float64]

SHIFT = np.array(
    [
        [3.0, -1.0, 0.0, 0.0],  # mostly as intended
        [-1.0, 2.0, -5.0, 0.0],  # mostly beside
        [0.0, 2.0, 0.0, -2.0],  # only as intended
        [0.0, 0.0, 4.0, 0.0],  # only beside
        [0.0, 0.0, 0.0, 0.0],  # nothing moves
        [1.0, 2.0, 3.0, 4.0],  # nothing is known to be intended
    ]
)
INTENDED = np.array([[0, -1], [1, 0], [3, 1], [0, 1], [0, 1], [-1, -1]])


def make_case(pairs: int = 50, features: int = 9, k: int = 3, seed: int = 0) -> tuple[Array, NDArray[np.int64], Array]:
    """Random shifts, intended features (fewer than k for some pairs) and floors."""
    rng = np.random.default_rng(seed)
    intended = np.array([rng.permutation(features)[:k] for _ in range(pairs)])
    intended[rng.uniform(size=intended.shape) < 0.3] = -1
    intended[-3:] = -1
    return rng.normal(size=(pairs, features)), intended, rng.uniform(0.1, 1.0, (pairs, features))


def test_by_hand() -> None:
    found = interference(SHIFT, INTENDED)
    np.testing.assert_array_equal(found.share, [1 / 4, 5 / 8, 0.0, 1.0, np.nan, np.nan])
    np.testing.assert_array_equal(found.largest, [0, 2, 1, 2, -1, 3])
    np.testing.assert_array_equal(found.flagged, [False, True, False, True, False, False])


def test_matrix_by_hand() -> None:
    by_pair = np.array([[3 / 4, 1 / 4, 0, 0], [1 / 8, 2 / 8, 5 / 8, 0], [0, 1 / 2, 0, 1 / 2], [0, 0, 1, 0]])
    want = [by_pair[[0, 1, 3]].mean(axis=0), by_pair[[1, 2, 3]].mean(axis=0), np.full(4, np.nan), by_pair[2]]
    np.testing.assert_allclose(interference_matrix(SHIFT, INTENDED), want, rtol=1e-15)


def test_agrees_with_loops_over_pairs_and_features() -> None:
    shift, intended, floor = make_case()
    found, matrix = interference(shift, intended, floor), interference_matrix(shift, intended)
    rows: dict[int, list[Array]] = {j: [] for j in range(9)}
    assert 5 < found.flagged.sum() < 40
    for p in range(50):
        own = {int(j) for j in intended[p] if j >= 0}
        beside = [abs(shift[p, j]) for j in range(9) if j not in own]
        largest = max(range(9), key=lambda j: abs(shift[p, j]))
        for j in own:
            rows[j].append(np.abs(shift[p]) / np.abs(shift[p]).sum())
        if own:
            assert found.share[p] == pytest.approx(sum(beside) / np.abs(shift[p]).sum(), rel=1e-13)
        else:
            assert np.isnan(found.share[p])
        assert found.largest[p] == largest
        above = abs(shift[p, largest]) > times_for(9) * floor[p, largest]
        assert found.flagged[p] == bool(own and largest not in own and above)
    for j, each in rows.items():
        np.testing.assert_allclose(matrix[j], np.mean(each, axis=0), rtol=1e-12)


def test_intentions_that_are_met_are_told_from_swapped_ones() -> None:
    places = np.arange(80) % 8
    found = against_swaps(np.eye(8)[places], places[:, None])
    assert found == AgainstSwaps(0.0, 1.0, 1 / 1000)
    same = against_swaps(np.eye(8)[places], np.zeros((80, 1), dtype=np.int64))
    assert same == AgainstSwaps(1.0, 1.0, 1.0)
    assert against_swaps(np.eye(4), np.arange(4)[:, None]) is None


@pytest.mark.parametrize("factor", [-1.0, 2.0**-300, 1e-5, 3e7])
def test_scale_and_sign_of_a_shift_do_not_change_its_share(factor: float) -> None:
    shift, intended, _ = make_case()
    per_pair = factor * np.random.default_rng(1).uniform(0.5, 2.0, (50, 1))
    found, scaled = interference(shift, intended), interference(shift * per_pair, intended)
    np.testing.assert_allclose(scaled.share, found.share, rtol=1e-12)
    np.testing.assert_array_equal(scaled.largest, found.largest)
    np.testing.assert_array_equal(scaled.flagged, found.flagged)
    matrices = interference_matrix(shift, intended), interference_matrix(shift * per_pair, intended)
    np.testing.assert_allclose(*matrices, rtol=1e-12)


def test_order_of_features_pairs_and_intended_does_not_matter() -> None:
    shift, intended, floor = make_case()
    rng = np.random.default_rng(2)
    rows, columns = rng.permutation(50), rng.permutation(9)
    place = np.append(np.argsort(columns), -1)  # the last is where -1 looks
    moved = shift[rows][:, columns], place[intended[rows][:, ::-1]]
    found, again = interference(shift, intended, floor), interference(*moved, floor[rows][:, columns])
    np.testing.assert_allclose(again.share, found.share[rows], rtol=1e-12)
    np.testing.assert_array_equal(columns[again.largest], found.largest[rows])
    np.testing.assert_array_equal(again.flagged, found.flagged[rows])
    matrix = interference_matrix(shift, intended)
    np.testing.assert_allclose(interference_matrix(*moved), matrix[columns][:, columns], rtol=1e-12)


def test_only_intended_is_exactly_none_and_only_unintended_all() -> None:
    shift, intended, _ = make_case()
    mask = np.zeros((50, 10), dtype=bool)
    np.put_along_axis(mask, intended, True, axis=1)  # -1 sets the tenth column
    mask, known = mask[:, :9], mask[:, :9].any(axis=1)
    as_meant, beside = (interference(np.where(keep, shift, 0.0), intended) for keep in (mask, ~mask))
    np.testing.assert_array_equal(as_meant.share[known], 0.0)
    assert not as_meant.flagged.any()
    np.testing.assert_array_equal(beside.share[known], 1.0)
    assert beside.flagged[known].all()
    assert 40 < known.sum() < 50
    assert not beside.flagged[~known].any()


@pytest.mark.parametrize(("times", "flagged"), [(1.99, True), (2.0, False), (2.01, False)])
def test_the_floor_decides_strictly(times: float, flagged: bool) -> None:
    floor = np.zeros((1, 4))
    floor[0, 2] = 5 / times_for(4)  # the shift there is 5, the largest of four
    assert interference(SHIFT[1:2], INTENDED[1:2], floor, times).flagged[0] == flagged


def test_only_the_floor_of_the_largest_counts_and_an_unknown_one_flags_nothing() -> None:
    floor = np.full((1, 4), np.inf)
    assert not interference(SHIFT[1:2], INTENDED[1:2], floor).flagged[0]
    floor[0, 2] = 1.0
    found = interference(SHIFT[1:2], INTENDED[1:2], floor)
    assert found.flagged[0]
    assert found.share[0] == 5 / 8  # a floor changes the flag alone


def test_of_equal_shifts_the_intended_one_is_the_largest() -> None:
    for place in (0, 1):
        found = interference([[2.0, -2.0]], [[place]])
        assert (found.largest[0], found.flagged[0], found.share[0]) == (place, False, 0.5)


def test_matrix_rows_are_shares() -> None:
    shift, intended, _ = make_case(seed=3)
    intended[intended == 4] = -1
    matrix = interference_matrix(shift, intended)
    assert np.isnan(matrix[4]).all()
    rest = np.delete(matrix, 4, axis=0)
    np.testing.assert_allclose(rest.sum(axis=1), 1.0, rtol=1e-12)
    assert (rest >= 0).all()


def test_pairs_that_all_do_as_intended_have_the_unit_matrix() -> None:
    shift = np.diag([1.0, -2.0, 3.0])
    np.testing.assert_array_equal(interference_matrix(shift, [[0], [1], [2]]), np.eye(3))


@pytest.mark.parametrize(("pairs", "features", "k"), [(0, 4, 2), (3, 0, 2), (3, 4, 0), (3, 0, 0)])
def test_nothing_there_is_nothing_known(pairs: int, features: int, k: int) -> None:
    found = interference(np.ones((pairs, features)), np.full((pairs, k), -1))
    assert np.isnan(found.share).all()
    assert not found.flagged.any()
    np.testing.assert_array_equal(found.largest, np.full(pairs, 0 if features else -1))
    assert found.largest.shape == found.share.shape == found.flagged.shape == (pairs,)
    matrix = interference_matrix(np.ones((pairs, features)), np.full((pairs, k), -1))
    assert matrix.shape == (features, features)
    assert np.isnan(matrix).all()


@pytest.mark.parametrize(
    ("shift", "intended", "floor", "message"),
    [
        ([1.0, 2.0], [[0]], None, r"shift has shape \(2,\)"),
        ([[1.0, 2.0]], [[0], [1]], None, r"intended \(2, 1\)"),
        ([[1.0, np.nan]], [[0]], None, "1 values that are NaN or infinite"),
        ([[1.0, 2.0]], [[2]], None, "position 2; allowed are 0 to 1"),
        ([[1.0, 2.0]], [[-2]], None, "position -2"),
        ([[1.0, 2.0]], [[0]], [[1.0]], r"but floor has \(1, 1\)"),
        ([[1.0, 2.0]], [[0]], [[1.0, -1.0]], "floor holds -1"),
        ([[1.0, 2.0]], [[0]], [[1.0, np.nan]], "floor holds NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(shift: object, intended: object, floor: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interference(shift, intended, floor)  # type: ignore[arg-type]


def test_positions_are_whole_numbers() -> None:
    with pytest.raises(TypeError, match="intended has dtype float64"):
        interference([[1.0]], [[0.0]])
    with pytest.raises(ValueError, match="times is 0"):
        interference([[1.0]], [[0]], times=0.0)
