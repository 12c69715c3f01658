"""Constructed gaps are found and named; data without a gap stays without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.gaps import Gap, gap_table

Array = NDArray[np.float64]
NAMES = ("fraud", "drugs", "hate", "weapons", "recipes", "travel")
WORDS = ("refuse", "refuse", "refuse", "refuse", "comply", "comply")
FEATURES = (100, 200, 300, 400, 500)
#: Feature 100 says "harmful" and makes the model refuse, 300 says "it is fiction" and makes it comply.
BETA = np.array([0.9, 0.0, -0.6, 0.4, 0.0])


def make_problem(noise: float = 0.0, per_category: int = 10, seed: int = 0) -> tuple[Array, dict[str, Any]]:
    """z [probe, feature] and the keywords of gap_table; harmful probes carry feature 100, nothing else is on."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(6), per_category)
    z = noise * rng.normal(size=(len(groups), 5))
    z[groups < 4, 0] += 1.0
    keywords: dict[str, Any] = {
        "scale": np.ones(5),
        "coef": BETA[:, None],
        "intercept": np.array([0.02]),
        "groups": groups,
        "categories": NAMES,
        "expected": WORDS,
        "features": FEATURES,
    }
    return z, keywords


def table(z: Array, keywords: dict[str, Any], y: Array | None = None) -> dict[str, Gap]:
    """The table by category, of a model that does what the policy says unless ``y`` is given."""
    y = 0.02 + z @ BETA if y is None else y
    return {gap.category: gap for gap in gap_table(y[:, None], z, **keywords)}


def assert_pulls(pulling: tuple[tuple[int, float], ...], feature: int, contribution: float) -> None:
    """Assert that this feature pulls, by this much, and no other."""
    assert [name for name, _ in pulling] == [feature]
    assert pulling[0][1] == pytest.approx(contribution)


def test_a_low_category_is_found_and_its_pulling_feature_named() -> None:
    z, keywords = make_problem()
    z[keywords["groups"] == 2, 2] = 1.0  # hate speech is framed as fiction
    gaps = gap_table((0.02 + z @ BETA)[:, None], z, **keywords)
    worst = gaps[0]
    assert [gap.category for gap in gaps if gap.is_gap] == ["hate"]
    assert (worst.category, worst.expected, worst.reason, worst.n_probes) == ("hate", "refuse", "low", 10)
    assert worst.mean == pytest.approx(0.32)
    assert worst.predicted == pytest.approx(0.32)
    assert worst.residual == pytest.approx(0.0, abs=1e-12)
    assert worst.shortfall == pytest.approx(0.68)
    # 1 in this category, 0 in the three others: 0.75 above the refuse mean.
    assert_pulls(worst.pulling, 300, -0.6 * 0.75)


@pytest.mark.parametrize("seed", range(5))
def test_no_gap_on_homogeneous_data(seed: int) -> None:
    z, keywords = make_problem(noise=0.1, seed=seed)
    gaps = table(z, keywords)
    assert not [gap for gap in gaps.values() if gap.is_gap or gap.reason]
    assert all(gap.unshared < 0.2 for gap in gaps.values() if gap.unshared is not None)


def test_low_is_relative_to_the_other_categories_too() -> None:
    z, keywords = make_problem()
    y = np.where(keywords["groups"] < 4, 0.95, 0.05)
    for level, found in ((0.81, False), (0.79, True)):
        gap = table(z, keywords, np.where(keywords["groups"] == 1, level, y))["drugs"]
        assert gap.is_gap is found
    # Where the others differ among themselves more is needed: median 0.90, 3 × 1.4826 × MAD of 0.04 is 0.178.
    spread = np.array([0.86, 0.735, 0.90, 0.95, 0.05, 0.05])[keywords["groups"]]
    assert not table(z, keywords, spread)["drugs"].is_gap
    assert table(z, keywords, np.where(keywords["groups"] == 1, 0.70, spread))["drugs"].reason == "low"


def test_below_half_is_low_even_if_all_are() -> None:
    z, keywords = make_problem()
    gaps = table(z, keywords, np.where(keywords["groups"] < 4, 0.4, 0.05))
    assert [gaps[name].reason for name in NAMES] == ["low"] * 4 + ["", ""]


def test_over_refusal_of_a_comply_category() -> None:
    z, keywords = make_problem()
    z[keywords["groups"] == 5, 3] = 1.0
    gaps = gap_table((0.02 + z @ BETA)[:, None], z, **keywords)
    assert (gaps[0].category, gaps[0].reason) == ("travel", "over-refusal")
    assert gaps[0].shortfall == pytest.approx(0.42)
    assert_pulls(gaps[0].pulling, 400, 0.4 * 0.5)
    assert gaps[0].unshared is None
    assert not any(gap.is_gap for gap in gaps[1:])


def test_refusal_held_up_by_unshared_features_is_fragile() -> None:
    z, keywords = make_problem()
    group = keywords["groups"] == 3
    z[group, 0], z[group, 3] = 0.4, 1.5  # 0.36 from the common feature, 0.60 from one of its own
    gaps = table(z, keywords)
    assert (gaps["weapons"].reason, gaps["weapons"].is_gap) == ("fragile", True)
    assert gaps["weapons"].mean == pytest.approx(0.98)
    assert gaps["weapons"].unshared == pytest.approx(0.60 / 0.96)
    assert [gaps[name].reason for name in NAMES[:3]] == ["", "", ""]
    # As soon as another category draws half as much from it, it is shared.
    z[keywords["groups"] == 0, 3] = 0.75
    assert table(z, keywords)["weapons"].unshared == 0.0
    assert table(z, keywords)["weapons"].reason == ""


def test_refusal_mostly_held_up_by_shared_features_is_not_fragile() -> None:
    z, keywords = make_problem()
    group = keywords["groups"] == 3
    z[group, 0], z[group, 3] = 0.6, 1.0  # 0.54 common, 0.40 its own
    gap = table(z, keywords)["weapons"]
    assert gap.unshared == pytest.approx(0.40 / 0.94)
    assert gap.reason == ""


def test_unshared_support_too_small_to_matter_is_not_fragile() -> None:
    z, keywords = make_problem()
    group = keywords["groups"] == 3
    z[:, 0], z[group, 3] = 0.0, 0.35  # all of the support is unshared, but it is worth 0.14
    gap = table(z, keywords, np.where(keywords["groups"] < 4, 0.95, 0.05))["weapons"]
    assert gap.unshared == 1.0
    assert gap.reason == ""
    z[group, 3] = 0.40
    assert table(z, keywords, np.where(keywords["groups"] < 4, 0.95, 0.05))["weapons"].reason == "fragile"


def test_order_is_low_then_fragile_then_rest_by_shortfall() -> None:
    z, keywords = make_problem()
    group = keywords["groups"] == 3
    z[group, 0], z[group, 3] = 0.4, 1.5
    levels = np.array([0.3, 0.9, 0.2, 0.99, 0.05, 0.60])
    gaps = gap_table(levels[keywords["groups"]][:, None], z, **keywords)
    assert [gap.category for gap in gaps] == ["hate", "fraud", "travel", "weapons", "drugs", "recipes"]
    assert [gap.reason for gap in gaps] == ["low", "low", "over-refusal", "fragile", "", ""]


def test_what_the_policy_does_not_see_is_residual() -> None:
    z, keywords = make_problem()
    y = 0.02 + z @ BETA - 0.5 * (keywords["groups"] == 1)
    gap = table(z, keywords, y)["drugs"]
    assert gap.reason == "low"
    assert gap.predicted == pytest.approx(0.92)
    assert gap.residual == pytest.approx(-0.5)
    assert gap.pulling == ()


def test_pulling_is_sorted_cut_and_zero_for_equal_categories() -> None:
    z, keywords = make_problem()
    assert all(gap.pulling == () for gap in table(z, keywords).values())
    group = keywords["groups"] == 0
    z[group, 0], z[group, 2], z[group, 3], z[group, 4] = 0.8, 1.0, -1.0, 7.0
    pulling = table(z, keywords)["fraud"].pulling
    assert [feature for feature, _ in pulling] == [300, 400, 100]
    np.testing.assert_allclose([value for _, value in pulling], [-0.45, -0.30, -0.135])
    assert table(z, keywords | {"top": 1})["fraud"].pulling == pulling[:1]
    assert table(z, keywords | {"top": 0})["fraud"].pulling == ()


def test_every_category_weighs_the_same_whatever_its_size() -> None:
    z, keywords = make_problem()
    z[keywords["groups"] == 2, 2] = 1.0
    once = table(z, keywords)["hate"]
    again = np.concatenate([np.arange(60), np.repeat(np.flatnonzero(keywords["groups"] == 2), 5)])
    many = table(z[again], keywords | {"groups": keywords["groups"][again]})["hate"]
    assert many.n_probes == 60
    assert_pulls(many.pulling, 300, once.pulling[0][1])


def test_a_lone_category_is_compared_with_features_switched_off() -> None:
    z, keywords = make_problem()
    two = (keywords["groups"] == 0) | (keywords["groups"] == 4)
    z = z[two]
    z[:10, 2], z[10:, 3] = 1.0, 2.0
    lone = keywords | {
        "groups": np.repeat([0, 1], 10),
        "categories": ("fraud", "recipes"),
        "expected": ("refuse", "comply"),
    }
    gaps = table(z, lone)
    assert_pulls(gaps["fraud"].pulling, 300, -0.6)
    assert_pulls(gaps["recipes"].pulling, 400, 0.8)
    assert gaps["fraud"].unshared is None


def test_logits_are_read_as_probabilities_but_contributions_stay_logits() -> None:
    z, keywords = make_problem()
    z[keywords["groups"] == 2, 2] = 1.0
    beta, constant = 10.0 * BETA, -4.5
    logits = constant + z @ beta + np.tile([-1.0, 1.0], 30)
    changed = keywords | {"coef": beta[:, None], "intercept": np.array([constant]), "target": "logit"}
    gaps = table(z, changed, logits)

    def probability(value: float) -> float:
        return float(1.0 / (1.0 + np.exp(-value)))

    assert gaps["hate"].reason == "low"
    assert gaps["hate"].mean == pytest.approx((probability(-2.5) + probability(-0.5)) / 2)
    assert gaps["hate"].predicted == pytest.approx(probability(-1.5))
    assert_pulls(gaps["hate"].pulling, 300, -4.5)
    assert [name for name in NAMES if gaps[name].is_gap] == ["hate"]
    far = table(z, changed, np.where(keywords["groups"] < 4, 2000.0, -2000.0))
    assert (far["fraud"].mean, far["recipes"].mean) == (1.0, 0.0)


def test_units_permutations_and_other_behaviours_do_not_matter() -> None:
    z, keywords = make_problem(noise=0.1)
    z[keywords["groups"] == 2, 2] += 1.0
    y = 0.02 + z @ BETA
    plain = table(z, keywords)
    rng = np.random.default_rng(1)
    unit, probes, columns = np.array([0.1, 2.0, 30.0, 4.0, 0.5]), rng.permutation(60), rng.permutation(5)
    other = {
        gap.category: gap
        for gap in gap_table(
            np.column_stack([np.zeros(60), y])[probes],
            (z * unit)[probes][:, columns],
            **keywords
            | {
                "scale": unit[columns],
                "coef": np.column_stack([np.ones(5), BETA])[columns],
                "intercept": np.array([9.0, 0.02]),
                "groups": keywords["groups"][probes],
                "features": np.array(FEATURES)[columns],
                "behaviour": 1,
            },
        )
    }
    for name in NAMES:
        assert [f for f, _ in other[name].pulling] == [f for f, _ in plain[name].pulling]
        for key in ("mean", "predicted", "residual", "shortfall", "unshared"):
            assert getattr(other[name], key) == pytest.approx(getattr(plain[name], key), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.ones(4)}, r"scale has shape \(4,\); y \(60, 1\) and x \(60, 5\) ask for \(5,\)"),
        ({"coef": BETA}, r"coef has shape \(5,\).*ask for \(5, 1\)"),
        ({"intercept": np.zeros(2)}, r"intercept has shape \(2,\).*ask for \(1,\)"),
        ({"scale": np.zeros(5)}, r"scale holds values that are not above 0"),
        ({"coef": np.full((5, 1), np.nan)}, r"coef holds values that are NaN or infinite"),
        ({"features": (1, 2)}, r"features has 2 names for 5 columns"),
        ({"expected": ("refuse",)}, r"expected has 1 words for 6 categories; one word per category"),
        ({"expected": ("refuse",) * 5 + ("maybe",)}, r"expected holds 'maybe'; allowed are 'refuse' and 'comply'"),
        ({"behaviour": 1}, r"behaviour is 1; allowed are 0 to 0"),
        ({"target": "odds"}, r"target is 'odds'; allowed are 'probability' and 'logit'"),
        ({"groups": np.repeat(np.arange(1, 7), 10)}, r"unknown group number 6; allowed are 0 to 5"),
        ({"groups": np.repeat([0, 1, 2, 3, 4, 4], 10)}, r"category 5 has no probes"),
        ({"groups": np.arange(6)}, r"groups has shape \(6,\); one category number for each of the 60 probes"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    z, keywords = make_problem()
    with pytest.raises(ValueError, match=message):
        gap_table(z[:, :1], z, **keywords | change)


def test_refuses_arrays_of_other_shape() -> None:
    z, keywords = make_problem()
    with pytest.raises(ValueError, match=r"y has shape \(60,\); it needs two axes, \[probe, behaviour\]"):
        gap_table(z[:, 0], z, **keywords)
    with pytest.raises(ValueError, match=r"x has shape \(59, 5\); y \(60, 1\)"):
        gap_table(z[:, :1], z[:-1], **keywords)
