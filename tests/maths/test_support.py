"""Support and penalty: chosen by what is planted, reproducibly, and refused where there is nothing to choose."""

from __future__ import annotations

import numpy as np
import pytest

from smda_callbacks.maths.support import choose_support, feature_scale, strongest_keeping


def planted(n: int = 200, d: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse activations; features 3 and 17 drive the first behaviour, 8 the second."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, d)) < 0.4, rng.uniform(0.5, 2.0, (n, d)), 0.0)
    y = np.stack([x[:, 3] - x[:, 17], x[:, 8]], axis=1) + 0.1 * rng.normal(size=(n, 2))
    return x, y


def test_the_planted_features_are_chosen_for_any_behaviour() -> None:
    x, y = planted()
    assert choose_support(x, y, size=3, min_active=5).tolist() == [3, 8, 17]
    assert choose_support(x, y[:, 1:], size=1, min_active=5).tolist() == [8]


def test_rare_and_constant_features_are_left_out() -> None:
    x, y = planted()
    x[:, 5] = 0.0
    x[:3, 5] = y[:3, 0] + 10.0  # would correlate, on three probes
    x[:, 6] = 1.0  # always active, never varies
    chosen = choose_support(x, y, size=29, min_active=4)
    assert 5 not in chosen
    assert chosen.tolist() == sorted(chosen.tolist())
    assert 6 not in choose_support(x, y, size=3, min_active=4)


def test_scaling_a_feature_does_not_change_the_choice_and_shuffling_renames_it() -> None:
    x, y = planted()
    factors = np.linspace(0.1, 50.0, x.shape[1])
    np.testing.assert_array_equal(
        choose_support(x, y, size=6, min_active=5), choose_support(x * factors, y, size=6, min_active=5)
    )
    order = np.random.default_rng(1).permutation(x.shape[1])
    renamed = order[choose_support(x[:, order], y, size=6, min_active=5)]
    assert set(renamed) == set(choose_support(x, y, size=6, min_active=5))


def test_nothing_to_choose_is_refused() -> None:
    x, y = planted(n=50)
    with pytest.raises(ValueError, match=r"is active on at least 51 of 50 probes \(the most active one fires"):
        choose_support(x, y, size=4, min_active=51)
    with pytest.raises(ValueError, match=r"size and min_active must be at least 1, got size=0"):
        choose_support(x, y, size=0, min_active=1)


def test_scale_is_the_standard_deviation_and_one_where_nothing_varies() -> None:
    x, _ = planted()
    x[:, 4] = 3.0
    scale = feature_scale(x)
    assert scale[4] == 1.0
    np.testing.assert_allclose(np.delete(scale, 4), np.delete(x.std(axis=0), 4))


@pytest.mark.parametrize(("tolerance", "lam"), [(0.0, 10.0), (0.2, 100.0), (0.5, 1000.0)])
def test_the_strongest_penalty_that_keeps_its_share_of_r2(tolerance: float, lam: float) -> None:
    lams, r2 = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([0.7, 0.8, 0.65, 0.4])
    assert strongest_keeping(lams, 1 - r2, tolerance) == lam


def test_without_any_r2_the_lowest_error_is_taken() -> None:
    assert strongest_keeping(np.array([1.0, 10.0, 100.0]), np.array([1.4, 1.1, 1.3]), 0.5) == 10.0
