"""LDS and its intervals on constructed problems, and which targets are asked about."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from recipes.evidence.stats import columns_of, fidelity, in_group, nested, spearman, varying
from recipes.evidence.truth import drops


def test_spearman_is_scipys_with_ties() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(5, size=(30, 4)).astype(float), rng.integers(5, size=(30, 4)).astype(float)
    wanted = [spearmanr(first[:, k], second[:, k]).statistic for k in range(4)]
    np.testing.assert_allclose(spearman(first, second), wanted, atol=1e-12)


def test_what_does_not_vary_says_nothing() -> None:
    assert spearman(np.ones((10, 1)), np.arange(10.0)[:, None]).tolist() == [0.0]


def test_a_linear_world_has_fidelity_one_and_its_mirror_minus_one() -> None:
    """Outcomes that are sums over the pairs trained on: the pairs' own effects predict every subset, in any unit."""
    effects = np.random.default_rng(1).standard_normal((40, 6))
    weights = drops(40, 25, 0.5, seed=0)
    actual = effects.sum(axis=0) - weights @ effects
    found = fidelity([(1 - weights) @ effects * 7.0], [actual], draws=50)
    assert found is not None
    assert (found.lds, found.low, found.high, found.targets) == (1.0, 1.0, 1.0, 6)
    turned = fidelity([(1 - weights) @ -effects], [actual], draws=50)
    assert turned is not None
    assert turned.lds == -1.0


def test_noise_has_fidelity_zero_within_its_interval_and_orders_are_averaged() -> None:
    rng = np.random.default_rng(2)
    actual = [rng.standard_normal((60, 20)) for _ in range(2)]
    found = fidelity([actual[0], rng.standard_normal((60, 20))], actual, draws=200)
    assert found is not None
    assert found.per_order[0] == 1.0
    assert abs(found.per_order[1]) < 0.1
    assert found.lds == pytest.approx(sum(found.per_order) / 2)
    assert found.low < found.lds < found.high
    noise = fidelity([rng.standard_normal((60, 20))], actual[:1], draws=200)
    assert noise is not None
    assert noise.low < 0 < noise.high


def test_intervals_are_wider_with_fewer_subsets() -> None:
    rng = np.random.default_rng(3)
    actual = rng.standard_normal((80, 10))
    predicted = actual + rng.standard_normal((80, 10))
    many, few = (fidelity([predicted[:n]], [actual[:n]], draws=200) for n in (80, 15))
    assert many is not None
    assert few is not None
    assert few.high - few.low > many.high - many.low


def test_a_method_that_does_not_answer_all_targets_gets_no_figure() -> None:
    actual = np.random.default_rng(4).standard_normal((10, 3))
    silent = actual.copy()
    silent[:, 1] = np.nan
    assert fidelity([silent], [actual]) is None
    assert fidelity([actual[:, :0]], [actual[:, :0]]) is None


NAMES = ("refusal:harmful", "refusal:harmless", "refusal:fraud", "refusal:fraud:logit", "feature:7:x", "feature:7:y",
         "feature:7:gating", "feature:7:x:held", "feature:7:y:held", "feature:7:gating:held")  # fmt: skip


@pytest.mark.parametrize(
    ("group", "columns"),
    [
        ("refusal", [[2]]),
        ("refusal, both sides", [[0], [1]]),
        ("policy x", [[4]]),
        ("policy y", [[5]]),
        ("coefficient", [[4, 5, 6]]),
        ("coefficient, gates held", [[7, 8, 9]]),
    ],
)
def test_columns_of_every_group(group: str, columns: list[list[int]]) -> None:
    assert columns_of(group, NAMES) == columns
    values = np.arange(10.0)[None]
    assert in_group(values, group, NAMES).tolist() == [[float(sum(column)) for column in columns]]


def test_a_prediction_without_gating_counts_it_as_zero_and_knows_no_held_gates() -> None:
    said = np.arange(10.0)[None].copy()
    said[0, 6] = np.nan
    for group in ("coefficient", "coefficient, gates held"):
        assert in_group(said[:, :7], group, NAMES[:7], predicted=True).tolist() == [[9.0]]
    said[0, 5] = np.nan
    assert np.isnan(in_group(said[:, :7], "coefficient", NAMES[:7], predicted=True)).all()


def test_targets_that_hardly_vary_in_any_order_are_left_out() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.standard_normal((30, 5)), rng.standard_normal((30, 5))
    first[:, 1] *= 1e-3
    second[:, 3] = 2.0
    assert varying([first, second]).tolist() == [True, False, True, False, True]


def test_subsets_leave_out_their_share_and_grow_without_changing() -> None:
    weights = drops(40, 10, 0.1, seed=0)
    assert ((weights == 0).sum(axis=1) == 4).all()
    assert set(np.unique(weights)) == {0.0, 1.0}
    np.testing.assert_array_equal(drops(40, 25, 0.1, seed=0)[:10], weights)


def test_results_nest_by_method_group_and_drop() -> None:
    actual = np.random.default_rng(6).standard_normal((10, 3))
    found = nested({("a", "refusal", "half"): fidelity([actual], [actual], draws=5), ("b", "refusal", "half"): None})
    assert found["a"]["refusal"]["half"]["lds"] == 1.0
    assert "b" not in found
