"""Noise floors and split-half reliability, on data whose noise is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.maths.uncertainty import (
    LEAST_RELIABILITY,
    above_floor,
    halves,
    is_reliable,
    rms_floor,
    split_half_reliability,
    step_floor,
    times_for,
    total_floor,
)

Array = NDArray[np.float64]
PARTS = ("shift_x_magnitude", "shift_x_gating", "shift_y")


def test_rms_floor_by_hand() -> None:
    floor = rms_floor([{"a": np.array([[3.0], [0.0]]), "b": [1.0]}, {"a": np.array([[-4.0], [0.0]]), "b": [1.0]}])
    np.testing.assert_allclose(floor["a"], [[np.sqrt(12.5)], [0.0]])
    np.testing.assert_allclose(floor["b"], [1.0])
    assert list(floor) == ["a", "b"]


def test_rms_floor_counts_a_common_offset_as_noise() -> None:
    np.testing.assert_allclose(rms_floor([{"a": [2.0]}] * 5)["a"], [2.0])


def test_floors_add_in_quadrature() -> None:
    np.testing.assert_allclose(step_floor([3.0, 0.0], [4.0, 1.0], 1.0), [5.0, 1.0])
    np.testing.assert_allclose(step_floor([3.0], [4.0], 0.0), [4.0])
    np.testing.assert_allclose(step_floor([6.0], [4.0], 0.5), [5.0])
    np.testing.assert_allclose(total_floor([[3.0, 1.0], [4.0, 1.0], [12.0, 1.0]]), [13.0, np.sqrt(3.0)])
    np.testing.assert_allclose(total_floor([np.full((2, 1), 0.1)] * 100), np.ones((2, 1)))


def test_total_floor_is_the_spread_of_a_sum_of_independent_noise() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([0.5, 1.0, 2.0])
    sums = (sizes * rng.normal(size=(200_000, 3))).sum(axis=1)
    assert np.std(sums) == pytest.approx(float(total_floor([[size] for size in sizes])[0]), rel=0.01)


def test_above_floor() -> None:
    shift, floor = np.array([[2.1], [-2.1], [1.9], [0.0], [1e-9]]), np.array([[1.0], [1.0], [1.0], [0.0], [0.0]])
    above = above_floor(shift, floor)
    assert above.dtype == np.bool_
    np.testing.assert_array_equal(above, [[True], [True], [False], [False], [True]])
    np.testing.assert_array_equal(above_floor(shift, floor, times=3.0), [[False], [False], [False], [False], [True]])


@pytest.mark.parametrize("seed", range(5))
def test_halves_are_disjoint_complete_and_stratified(seed: int) -> None:
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(5), [1, 7, 10, 3, 4]))
    first, second = halves(groups, seed)
    assert sorted([*first, *second]) == list(range(25))
    assert abs(len(first) - len(second)) == 1
    for number in range(5):
        assert abs(int((groups[first] == number).sum()) - int((groups[second] == number).sum())) <= 1
    for half in (first, second):
        np.testing.assert_array_equal(half, np.sort(half))


def test_halves_follow_the_seed() -> None:
    groups = np.repeat(np.arange(4), 20)
    np.testing.assert_array_equal(halves(groups, 3)[0], halves(groups, 3)[0])
    assert not np.array_equal(halves(groups, 3)[0], halves(groups, 4)[0])


def random_states(n: int, d: int, m: int, seed: int) -> tuple[State, State]:
    rng = np.random.default_rng(seed)
    pre, later = rng.normal(0.3, 1.0, (2, n, d))
    y, new = rng.uniform(size=(2, n, m))
    return State(pre, (pre > 0).astype(float), y), State(later, (later > 0).astype(float), new)


def test_identical_halves_are_perfectly_reliable() -> None:
    before, after = random_states(30, 6, 2, seed=1)
    copies = np.repeat(np.arange(30), 4)  # a category is four copies of one probe, so any half holds two of each
    states = [State(s.pre[copies], s.gate[copies], s.y[copies]) for s in (before, after)]
    found = split_half_reliability(states[0], states[1], scale=np.ones(6), lam=3.0, groups=copies)
    assert found == {part: pytest.approx(1.0, abs=1e-12) for part in PARTS}


def test_independent_noise_has_no_reliability() -> None:
    values: dict[str, list[float]] = {part: [] for part in PARTS}
    for seed in range(20):
        before, after = random_states(120, 20, 2, seed)
        groups = np.arange(120) % 4
        found = split_half_reliability(before, after, scale=np.ones(20), lam=3.0, groups=groups, seed=seed)
        for part, value in found.items():
            assert value is not None
            values[part].append(value)
    # A correlation over 20 features has the standard error 1/sqrt(19); over 20 × 2 of them the mean's is 0.036.
    assert abs(np.mean(values["shift_y"])) < 0.12
    assert np.mean(values["shift_x_magnitude"]) < 0.2


def test_a_common_shift_is_more_reliable_the_less_noise_there_is() -> None:
    rng = np.random.default_rng(0)
    x, beta = rng.normal(size=(200, 10)), rng.normal(size=(10, 1))
    ones = np.ones_like(x)
    before = State(x, ones, np.zeros((200, 1)))
    found: list[float] = []
    for noise in (0.01, 3.0, 300.0):
        after = State(x, ones, x @ beta + noise * rng.normal(size=(200, 1)))
        parts = split_half_reliability(before, after, scale=np.ones(10), lam=1.0, groups=np.arange(200) % 5)
        assert parts["shift_y"] is not None
        found.append(parts["shift_y"])
    assert found[0] == pytest.approx(1.0, abs=1e-3)
    assert found[0] > found[1] > found[2]
    assert abs(found[2]) < 0.6


def test_agrees_with_splitting_the_halves_by_hand() -> None:
    before, after = random_states(41, 6, 2, seed=2)
    groups = np.arange(41) % 3
    found = split_half_reliability(before, after, scale=np.full(6, 2.0), lam=3.0, groups=groups, seed=7)
    parts = []
    for index in halves(groups, 7):
        states = [State(s.pre[index], s.gate[index], s.y[index]) for s in (before, after)]
        parts.append(split_shift(states[0], states[1], scale=np.full(6, 2.0), lam=1.5).as_dict())
    for part in PARTS:
        want = np.mean([np.corrcoef(parts[0][part][:, m], parts[1][part][:, m])[0, 1] for m in range(2)])
        assert found[part] == pytest.approx(want, abs=1e-12)


def test_a_part_that_does_not_vary_has_no_reliability() -> None:
    before, after = random_states(40, 6, 1, seed=3)
    options: dict[str, Any] = {"scale": np.ones(6), "lam": 3.0, "groups": np.arange(40) % 3}
    still = split_half_reliability(before, State(after.pre, before.gate, before.y), **options)
    assert still["shift_x_gating"] is None
    assert still["shift_y"] is None
    assert still["shift_x_magnitude"] is not None
    # Behaviour that moves by the same amount everywhere shifts the intercept only; what is left is rounding.
    lifted = split_half_reliability(before, State(before.pre, before.gate, before.y + 0.1), **options)
    assert lifted == dict.fromkeys(PARTS)


def test_a_behaviour_that_does_not_vary_is_left_out_of_the_mean() -> None:
    before, after = random_states(40, 6, 2, seed=4)
    half_still = State(after.pre, after.gate, np.column_stack([after.y[:, 0], before.y[:, 1]]))
    options: dict[str, Any] = {"scale": np.ones(6), "lam": 3.0, "groups": np.arange(40) % 3}
    alone = [State(s.pre, s.gate, s.y[:, [0]]) for s in (before, half_still)]
    both = split_half_reliability(before, half_still, **options)["shift_y"]
    assert both == pytest.approx(split_half_reliability(*alone, **options)["shift_y"], abs=1e-12)


def test_one_feature_has_no_reliability() -> None:
    before, after = random_states(40, 1, 1, seed=5)
    found = split_half_reliability(before, after, scale=np.ones(1), lam=3.0, groups=np.zeros(40, dtype=int))
    assert found == dict.fromkeys(PARTS)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"there are no draws; at least one"):
        rms_floor([])
    with pytest.raises(ValueError, match=r"draw 1 has the parts \['b'\], draw 0 has \['a'\]"):
        rms_floor([{"a": [1.0]}, {"b": [1.0]}])
    with pytest.raises(ValueError, match=r"a has the shapes \[\(1,\), \(2,\)\]; all must be the same"):
        rms_floor([{"a": [1.0]}, {"a": [1.0, 2.0]}])
    with pytest.raises(ValueError, match=r"random has shape \(1,\) but rounding has \(2,\)"):
        step_floor([1.0], [1.0, 2.0], 1.0)
    for size in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"relative_size is .*; a finite number of at least 0"):
            step_floor([1.0], [1.0], size)
    with pytest.raises(ValueError, match=r"there are no floors"):
        total_floor([])
    with pytest.raises(ValueError, match=r"floor has the shapes"):
        total_floor([[1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match=r"shift has shape \(2,\) but floor has \(1,\)"):
        above_floor([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match=r"floor holds -1; a floor is at least 0"):
        above_floor([1.0], [-1.0])
    with pytest.raises(ValueError, match=r"times is 0; a number above 0"):
        above_floor([1.0], [1.0], times=0)


def test_refuses_groups_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"3 probes cannot be halved; at least 4"):
        halves([0, 0, 0], 0)
    with pytest.raises(ValueError, match=r"category 1 has no probes"):
        halves([0, 0, 2, 2], 0)
    before, after = random_states(40, 2, 1, seed=6)
    with pytest.raises(ValueError, match=r"groups has shape \(39,\); one category number for each of the 40 probes"):
        split_half_reliability(before, after, scale=np.ones(2), lam=1.0, groups=np.zeros(39, dtype=int))


def test_times_for_several_tests_is_bonferroni() -> None:
    """Against scipy: the chance of any of d normal numbers beyond the limit is at most that of one beyond 2."""
    assert times_for(1) == 2.0
    for tests in (2, 5, 100):
        assert 2 * norm.sf(times_for(tests)) * tests == pytest.approx(2 * norm.sf(2.0), rel=1e-9)
    rng = np.random.default_rng(0)
    assert np.mean(np.abs(rng.normal(size=(20_000, 5))).max(axis=1) > times_for(5)) == pytest.approx(0.0455, abs=0.005)
    with pytest.raises(ValueError, match="tests is 0"):
        times_for(0)


def test_the_least_reliability_is_where_three_signs_of_four_are_right() -> None:
    """Normal shifts seen through normal noise of two halves: at the limit the mean of both has the sign of the truth.

    That of the whole is r of the halves by Spearman-Brown; the sign agrees at 1/2 + asin(√whole)/π (Sheppard 1899).
    """
    rng = np.random.default_rng(0)
    noise = np.sqrt(1 / LEAST_RELIABILITY - 1)  # of a half, where the signal has variance 1
    signal = rng.normal(size=400_000)
    halves_seen = signal + noise * rng.normal(size=(2, len(signal)))
    assert np.corrcoef(halves_seen)[0, 1] == pytest.approx(LEAST_RELIABILITY, abs=0.01)
    whole = halves_seen.mean(axis=0)
    assert np.corrcoef(whole, signal)[0, 1] ** 2 == pytest.approx(0.5, abs=0.01)
    assert np.mean(np.sign(whole) == np.sign(signal)) == pytest.approx(0.75, abs=0.005)
    assert is_reliable(None)
    assert is_reliable(LEAST_RELIABILITY)
    assert not is_reliable(LEAST_RELIABILITY - 1e-9)
