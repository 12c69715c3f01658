"""Functionals against hand-computed values, finite differences, first order, and the exact split."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.functionals import FunctionalSet, Slopes, functional_set, measured, slopes
from smda_callbacks.maths.pathways import State, first_order_shift, split_shift
from smda_callbacks.maths.units import conversion_slope, convert
from smda_callbacks.observe.behaviour import OpeningScorer, score
from smda_callbacks.observe.prefixes import PrefixTree

Array = NDArray[np.float64]
Target = Literal["probability", "logit"]
LAM = 3.0
SHAPES = [(40, 6), (12, 25)]  # fewer and more features than probes


def make_set(
    n: int = 40,
    d: int = 6,
    m: int = 2,
    *,
    target: Target = "probability",
    gating: bool = False,
    all_features: bool = True,
) -> FunctionalSet:
    """Three categories, the first two to be refused, over probes in turn."""
    return functional_set(
        behaviours=("refusal", "warning", "tone")[:m],
        categories=("arson", "fraud", "cooking"),
        refuse=(True, True, False),
        groups=np.arange(n) % 3,
        features=100 + np.arange(d),
        attributed=None if all_features else (4, 1),
        target=target,
        gating=gating,
    )


def make_state(n: int = 40, d: int = 6, m: int = 2, *, target: Target = "probability", seed: int = 0) -> State:
    """A JumpReLU state with gates partly open; behaviours well inside their range."""
    rng = np.random.default_rng(seed)
    pre = rng.normal(0.3, 1.0, (n, d))
    y = rng.uniform(0.1, 0.9, (n, m))
    return State(pre, (pre > 0.2).astype(float), y if target == "probability" else np.log(y / (1 - y)))


def make_scale(d: int = 6) -> Array:
    return np.random.default_rng(9).uniform(0.5, 2.0, d)


def moved(state: State, step: float, *, seed: int = 1, pre: bool = True, y: bool = True) -> State:
    """The state some way along a fixed random direction, gates held."""
    rng = np.random.default_rng(seed)
    along_pre, along_y = rng.normal(size=state.pre.shape), 0.05 * rng.normal(size=state.y.shape)
    return State(state.pre + pre * step * along_pre, state.gate, state.y + y * step * along_y)


def contracted(slope: Slopes, before: State, after: State) -> Array:
    """First-order change of every functional."""
    along_y = np.einsum("kim,im->k", slope.y, after.y - before.y)
    return np.asarray(along_y + np.einsum("kij,ij->k", slope.pre, after.pre - before.pre))


def test_names_in_their_order() -> None:
    made = functional_set(
        behaviours=["refusal", "tone"],
        categories=["arson", "cooking"],
        refuse=[True, False],
        groups=[0, 1, 1],
        features=[7, 31, 5],
        attributed=[2, 0],
        gating=True,
    )
    groups = ["harmful", "harmless", "arson", "cooking"]
    assert list(made.names) == [
        *(
            f"{behaviour}:{group}{suffix}"
            for behaviour in ("refusal", "tone")
            for suffix in ("", ":logit")
            for group in groups
        ),
        *("feature:5:x", "feature:5:y", "feature:5:gating"),
        *("feature:5:x:tone", "feature:5:y:tone", "feature:5:gating:tone"),
        *("feature:7:x", "feature:7:y", "feature:7:gating"),
        *("feature:7:x:tone", "feature:7:y:tone", "feature:7:gating:tone"),
    ]
    assert len(made) == 28
    assert [made.index(name) for name in made.names] == list(range(28))
    assert [(each.feature, each.position) for each in made.shifts[::6]] == [(5, 2), (7, 0)]


def test_a_logit_policy_has_the_probability_beside_it() -> None:
    names = make_set(m=1, target="logit").names
    assert names[:3] == ("refusal:harmful", "refusal:harmless", "refusal:arson")
    assert names[5:7] == ("refusal:harmful:probability", "refusal:harmless:probability")


@pytest.mark.parametrize(("refuse", "left", "out"), [(True, "harmful", "harmless"), (False, "harmless", "harmful")])
def test_a_group_without_a_probe_is_left_out(refuse: bool, left: str, out: str) -> None:
    made = functional_set(behaviours=["refusal"], categories=["a"], refuse=[refuse], groups=[0, 0], features=[1])
    assert made.names[:4] == (f"refusal:{left}", "refusal:a", f"refusal:{left}:logit", "refusal:a:logit")
    assert f"refusal:{out}" not in made.names


def test_categories_named_like_the_groups_are_told_apart() -> None:
    # "harmful" is to be complied with here, so that mixing it up with the group would show.
    made = functional_set(
        behaviours=["refusal"],
        categories=["harmful", "harmless", "arson"],
        refuse=[False, True, True],
        groups=[0, 1, 2, 2],
        features=[1],
        attributed=[],
    )
    assert made.names[:5] == (
        *("refusal:harmful", "refusal:harmless"),
        *("refusal:category harmful", "refusal:category harmless", "refusal:arson"),
    )
    before = State(np.zeros((4, 1)), np.zeros((4, 1)), np.zeros((4, 1)))
    after = State(np.zeros((4, 1)), np.zeros((4, 1)), np.array([[0.5], [0.2], [0.3], [0.7]]))
    got = measured(made, before, after, scale=np.ones(1), lam=1.0)[:5]
    np.testing.assert_allclose(got, [0.4, 0.5, 0.5, 0.2, 0.5], rtol=1e-15)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no functional 'refusal:harmfull' among the 44\. Nearest: refusal:harmful"):
        make_set().index("refusal:harmfull")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behaviours": []}, "no behaviours"),
        ({"refuse": [True]}, "1 entries for 2 categories"),
        ({"target": "odds"}, "target is 'odds'"),
        ({"attributed": [2]}, r"position 2; allowed are 0 to 1"),
        ({"attributed": [0, 0]}, r"two functionals would be called 'feature:5:x'"),
        ({"categories": ["a", "a:logit"]}, r"two functionals would be called 'refusal:a:logit'"),
        ({"groups": [0, 0, 0]}, "category 1 has no probes"),
        ({"groups": [0, 1, 2]}, "unknown group number 2"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    right: dict[str, object] = {
        "behaviours": ["refusal"],
        "categories": ["a", "b"],
        "refuse": [True, False],
        "groups": [0, 1, 1],
        "features": [5, 6],
    }
    functional_set(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        functional_set(**(right | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "d", "m"), [(39, 6, 2), (40, 5, 2), (40, 6, 1)])
def test_states_of_other_probes_features_or_behaviours_are_refused(n: int, d: int, m: int) -> None:
    wrong = make_state(n, d, m)
    with pytest.raises(ValueError, match=r"the functionals are of \(40, 6, 2\)"):
        measured(make_set(), wrong, wrong, scale=make_scale(d), lam=LAM)
    with pytest.raises(ValueError, match=r"the functionals are of \(40, 6, 2\)"):
        slopes(make_set(), wrong, scale=make_scale(d), lam=LAM)


@pytest.mark.parametrize("target", ["probability", "logit"])
def test_means_are_those_of_the_groups_in_both_units(target: Target) -> None:
    made, before = make_set(target=target), make_state(target=target)
    after = make_state(target=target, seed=5)
    got = measured(made, before, after, scale=make_scale(), lam=LAM)
    group = np.arange(40) % 3

    def other(y: Array) -> Array:
        return np.log(y / (1 - y)) if target == "probability" else 1 / (1 + np.exp(-y))

    unit = "logit" if target == "probability" else "probability"
    for m, behaviour in enumerate(("refusal", "warning")):
        for label, members in (("harmful", group < 2), ("harmless", group == 2), ("fraud", group == 1)):
            want = after.y[members, m].mean() - before.y[members, m].mean()
            assert got[made.index(f"{behaviour}:{label}")] == pytest.approx(want, rel=1e-12)
            want = other(after.y)[members, m].mean() - other(before.y)[members, m].mean()
            assert got[made.index(f"{behaviour}:{label}:{unit}")] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shifts_are_those_of_the_exact_split(n: int, d: int) -> None:
    made, before, after = make_set(n, d, gating=True), make_state(n, d), make_state(n, d, seed=5)
    got = measured(made, before, after, scale=make_scale(d), lam=LAM)
    split = split_shift(before, after, scale=make_scale(d), lam=LAM)
    for j in range(d):
        for m, ending in enumerate(("", ":warning")):
            assert got[made.index(f"feature:{100 + j}:x{ending}")] == split.shift_x_magnitude[j, m]
            assert got[made.index(f"feature:{100 + j}:y{ending}")] == split.shift_y[j, m]
            assert got[made.index(f"feature:{100 + j}:gating{ending}")] == split.shift_x_gating[j, m] != 0


def test_some_features_have_the_same_numbers_as_among_all() -> None:
    every, some = make_set(gating=True), make_set(gating=True, all_features=False)
    places = [every.index(name) for name in some.names]
    before, after, scale = make_state(), make_state(seed=5), make_scale()
    assert places != sorted(places)
    whole, part = (measured(each, before, after, scale=scale, lam=LAM) for each in (every, some))
    np.testing.assert_array_equal(part, whole[places])
    wide, narrow = (slopes(each, before, scale=scale, lam=LAM) for each in (every, some))
    np.testing.assert_allclose(narrow.pre, wide.pre[places], rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(narrow.y, wide.y[places], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("target", ["probability", "logit"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_slopes_are_the_finite_differences_of_what_is_measured(n: int, d: int, target: Target) -> None:
    made, state, scale = make_set(n, d, target=target), make_state(n, d, target=target), make_scale(d)
    found, h = slopes(made, state, scale=scale, lam=LAM), 1e-4
    for i, column in [(0, 0), (1, 1), (5, d - 1), (n - 1, 2)]:
        step = np.zeros((n, d))
        step[i, column] = h
        ends = [State(state.pre + sign * step, state.gate, state.y) for sign in (-1, 1)]
        numeric = measured(made, *ends, scale=scale, lam=LAM) / (2 * h)
        np.testing.assert_allclose(found.pre[:, i, column], numeric, rtol=1e-5, atol=1e-8)
    for i, column in [(0, 0), (1, 1), (n - 1, 0)]:
        step = np.zeros((n, 2))
        step[i, column] = h
        ends = [State(state.pre, state.gate, state.y + sign * step) for sign in (-1, 1)]
        numeric = measured(made, *ends, scale=scale, lam=LAM) / (2 * h)
        np.testing.assert_allclose(found.y[:, i, column], numeric, rtol=1e-5, atol=1e-8)
    assert np.abs(found.pre[len(made.means) :: 2]).max(axis=(1, 2)).min() > 1e-3  # no comparison of zeros


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_agrees_with_first_order_shift(n: int, d: int, fractional: bool) -> None:
    made, before, scale = make_set(n, d, gating=True), make_state(n, d), make_scale(d)
    if fractional:  # the share of tokens on which a feature is active
        before = State(before.pre, np.random.default_rng(3).uniform(size=(n, d)), before.y)
    after = moved(before, 0.7)
    got = contracted(slopes(made, before, scale=scale, lam=LAM), before, after)
    first = first_order_shift(before, after, scale=scale, lam=LAM)
    for row, each in enumerate(made.shifts, start=len(made.means)):
        part = {"x": first.shift_x_magnitude, "y": first.shift_y, "gating": np.zeros_like(first.shift_y)}[each.pathway]
        assert got[row] == pytest.approx(part[each.position, each.behaviour], rel=1e-10, abs=1e-15), each.name


def test_one_feature_by_hand() -> None:
    # β = Σzy / (Σz² + λ) over centred z and y: z = ±1, y = ∓½, so G = 4, β = 1 / 4, r = ±¼.
    made = functional_set(behaviours=["b"], categories=["a"], refuse=[True], groups=[0, 0], features=[3])
    state = State(np.array([[-2.0], [2.0]]), np.ones((2, 1)), np.array([[0.0], [1.0]]))
    found = slopes(made, state, scale=np.array([2.0]), lam=2.0)
    assert made.names[-2:] == ("feature:3:x", "feature:3:y")
    # dβ = (dzᵀr − zᵀdz β) / G = (¼ − ¼) dz₁ / 4 = 0: the numerator grows as the denominator does.
    np.testing.assert_allclose(found.pre[-2, :, 0], [0.0, 0.0], atol=1e-16)
    np.testing.assert_allclose(found.y[-1, :, 0], [-0.25, 0.25], rtol=1e-15)
    steeper = slopes(made, state, scale=np.array([2.0]), lam=6.0)  # G = 8, β = 1 / 8, r = ±3/8
    np.testing.assert_allclose(steeper.pre[-2, :, 0], [-(3 / 8 - 1 / 8) / 16, (3 / 8 - 1 / 8) / 16], rtol=1e-14)


def test_slopes_that_must_vanish_do() -> None:
    made, state = make_set(gating=True), make_state()
    found = slopes(made, state, scale=make_scale(), lam=LAM)
    kinds = np.array(["mean"] * len(made.means) + [each.pathway for each in made.shifts])
    assert not found.pre[np.isin(kinds, ["mean", "y", "gating"])].any()
    assert not found.y[np.isin(kinds, ["x", "gating"])].any()
    assert not found.pre[:, state.gate == 0].any()
    # A behaviour's own functionals do not see the other one, and the intercept takes up a common change.
    behaviour = np.array([each.behaviour for each in made.means] + [each.behaviour for each in made.shifts])
    assert not found.y[behaviour == 0, :, 1].any()
    assert not found.y[behaviour == 1, :, 0].any()
    assert np.abs(found.y[kinds == "y"].sum(axis=1)).max() < 1e-14


@pytest.mark.parametrize("target", ["probability", "logit"])
def test_the_trapezoid_rule_is_right_to_third_order(target: Target) -> None:
    made, before, scale = make_set(target=target), make_state(target=target), make_scale()

    def errors(step: float) -> tuple[Array, Array]:
        after = moved(before, step)
        exact = measured(made, before, after, scale=scale, lam=LAM)
        ends = [slopes(made, state, scale=scale, lam=LAM) for state in (before, after)]
        both = Slopes((ends[0].y + ends[1].y) / 2, (ends[0].pre + ends[1].pre) / 2)
        return contracted(ends[0], before, after) - exact, contracted(both, before, after) - exact

    kinds = np.array(
        ["converted" if each.converted else "plain" for each in made.means] + [e.pathway for e in made.shifts]
    )
    (one_wide, both_wide), (one, both) = errors(0.04), errors(0.02)
    for kind in ("converted", "x"):
        mine = kinds == kind
        assert np.linalg.norm(one_wide[mine]) / np.linalg.norm(one[mine]) == pytest.approx(4, rel=0.1), kind
        assert np.linalg.norm(both_wide[mine]) / np.linalg.norm(both[mine]) == pytest.approx(8, rel=0.1), kind
        assert np.linalg.norm(both[mine]) < np.linalg.norm(one[mine]) / 20
    # The exact ΔY part is itself a mean over both ends, and a plain mean is linear: nothing is left.
    assert np.abs(both_wide[np.isin(kinds, ["plain", "y"])]).max() < 1e-14


def test_units_of_the_features_do_not_matter() -> None:
    made, before, scale = make_set(), make_state(), make_scale()
    units = np.random.default_rng(2).uniform(0.1, 10.0, 6)
    after = moved(before, 0.3)
    other = [State(each.pre * units, each.gate, each.y) for each in (before, after)]
    np.testing.assert_allclose(
        measured(made, *other, scale=scale * units, lam=LAM),
        measured(made, before, after, scale=scale, lam=LAM),
        rtol=1e-9,
    )
    found, rescaled = slopes(made, before, scale=scale, lam=LAM), slopes(made, other[0], scale=scale * units, lam=LAM)
    np.testing.assert_allclose(rescaled.pre * units, found.pre, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(rescaled.y, found.y, rtol=1e-9, atol=1e-15)


def test_order_of_probes_and_features_does_not_matter() -> None:
    made, state, scale = make_set(), make_state(), make_scale()
    rng = np.random.default_rng(4)
    rows, columns = rng.permutation(40), rng.permutation(6)
    shuffled = functional_set(
        behaviours=("refusal", "warning"),
        categories=("arson", "fraud", "cooking"),
        refuse=(True, True, False),
        groups=(np.arange(40) % 3)[rows],
        features=(100 + np.arange(6))[columns],
    )
    places = [shuffled.index(name) for name in made.names]
    other = State(state.pre[rows][:, columns], state.gate[rows][:, columns], state.y[rows])
    found, again = slopes(made, state, scale=scale, lam=LAM), slopes(shuffled, other, scale=scale[columns], lam=LAM)
    np.testing.assert_allclose(again.y[places], found.y[:, rows], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(again.pre[places], found.pre[:, rows][:, :, columns], rtol=1e-9, atol=1e-15)


def test_every_probe_twice_at_twice_the_penalty_halves_its_slopes() -> None:
    # A sum of squares over twice as many probes, against twice the penalty, has the same minimum.
    made, double, state, scale = make_set(30), make_set(60), make_state(30), make_scale()
    twice = State(*(np.vstack([array, array]) for array in (state.pre, state.gate, state.y)))
    found, again = slopes(made, state, scale=scale, lam=LAM), slopes(double, twice, scale=scale, lam=2 * LAM)
    for got, want in ((again.y, found.y), (again.pre, found.pre)):
        np.testing.assert_allclose(got, np.concatenate([want, want], axis=1) / 2, rtol=1e-9, atol=1e-15)


def test_clipped_probabilities_have_constant_log_odds() -> None:
    y = np.array([[0.0], [1e-12], [0.5], [1.0]])
    made = functional_set(behaviours=["b"], categories=["a"], refuse=[True], groups=np.zeros(4, int), features=[3])
    state = State(np.arange(4.0)[:, None], np.ones((4, 1)), y)
    found = slopes(made, state, scale=np.ones(1), lam=LAM)
    np.testing.assert_array_equal(found.y[made.index("b:a:logit"), :, 0], [0.0, 0.0, 1.0, 0.0])
    np.testing.assert_array_equal(found.y[made.index("b:a"), :, 0], np.full(4, 0.25))


def test_log_odds_are_those_of_a_logit_policy() -> None:
    scorer = OpeningScorer("b", ("a",), lambda log_probs: np.exp(log_probs[:, 0]))
    p = np.array([[0.0], [1e-15], [1e-3], [0.5], [1 - 1e-3], [1.0]])
    edge = np.zeros(1, dtype=np.int64)
    tree = PrefixTree(("a",), ((0,),), (-1,), (-1,), edge, edge, ((0,),))
    with np.errstate(divide="ignore"):
        want = score([scorer], tree, np.log(p), "logit")
    np.testing.assert_allclose(convert(p, "probability"), want, rtol=1e-12)
    np.testing.assert_allclose(convert(want, "logit"), np.clip(p, 1e-9, 1 - 1e-9), rtol=1e-7)


@pytest.mark.parametrize("target", ["probability", "logit"])
def test_conversion_slope_is_the_derivative(target: Target) -> None:
    y = np.array([0.01, 0.3, 0.5, 0.99]) if target == "probability" else np.array([-8.0, -1.0, 0.0, 3.0])
    numeric = (convert(y + 1e-6, target) - convert(y - 1e-6, target)) / 2e-6
    np.testing.assert_allclose(conversion_slope(y, target), numeric, rtol=1e-6)


def test_extreme_log_odds_neither_overflow_nor_warn() -> None:
    np.testing.assert_array_equal(convert(np.array([-800.0, 800.0]), "logit"), [0.0, 1.0])
    assert convert(np.array([-300.0]), "logit")[0] == pytest.approx(np.exp(-300.0), rel=1e-12)
    np.testing.assert_array_equal(conversion_slope(np.array([-800.0, 800.0]), "logit"), [0.0, 0.0])
