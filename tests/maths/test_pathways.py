"""The exact pathway split and its first order, on problems whose answer is known."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.pathways import (
    PathwaySplit,
    State,
    first_order_error,
    first_order_shift,
    split_shift,
)

Array = NDArray[np.float64]
LAM = 3.0
PARTS = ("shift_x_magnitude", "shift_x_gating", "shift_y")


def make_states(n: int = 60, d: int = 7, m: int = 2, step: float = 0.4, seed: int = 0) -> tuple[State, State, Array]:
    """Two JumpReLU states, some gates flipping in between, and scales."""
    rng = np.random.default_rng(seed)
    pre = rng.normal(0.3, 1.0, (n, d))
    later = pre + step * rng.normal(size=(n, d))
    y = rng.uniform(size=(n, m))
    before = State(pre, (pre > 0.2).astype(float), y)
    after = State(later, (later > 0.2).astype(float), np.clip(y + step * 0.3 * rng.normal(size=(n, m)), 0, 1))
    return before, after, rng.uniform(0.5, 2.0, d)


def slow_beta(x: Array, y: Array, scale: Array, lam: float = LAM) -> Array:
    """The normal equations with the centring matrix written out."""
    n, d = x.shape
    z, h = x / scale, np.eye(n) - np.full((n, n), 1.0 / n)
    return np.asarray(np.linalg.inv(z.T @ h @ z + lam * np.eye(d)) @ z.T @ h @ y)


def relative(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(("n", "d"), [(60, 7), (25, 40)])
@pytest.mark.parametrize("lam", [0.1, 3.0, 1000.0])
def test_parts_sum_to_the_change_of_the_coefficients(n: int, d: int, lam: float) -> None:
    before, after, scale = make_states(n, d)
    split = split_shift(before, after, scale=scale, lam=lam)
    change = slow_beta(after.x, after.y, scale, lam) - slow_beta(before.x, before.y, scale, lam)
    assert relative(np.sum(list(split.as_dict().values()), axis=0), change) < 1e-12
    assert relative(split.total, change) < 1e-12
    np.testing.assert_array_equal(split.shift_x, split.shift_x_magnitude + split.shift_x_gating)


def test_agrees_with_the_definition_written_out_slowly() -> None:
    before, after, scale = make_states()
    mean_y, change_y = (before.y + after.y) / 2, after.y - before.y
    magnitude = (before.gate + after.gate) / 2 * (after.pre - before.pre)

    def beta(x: Array, y: Array) -> Array:
        return slow_beta(x, y, scale)

    want_y = (beta(before.x, change_y) + beta(after.x, change_y)) / 2
    want_magnitude = (
        beta(before.x + magnitude, mean_y)
        - beta(before.x, mean_y)
        + beta(after.x, mean_y)
        - beta(after.x - magnitude, mean_y)
    ) / 2
    want_gating = beta(after.x, mean_y) - beta(before.x, mean_y) - want_magnitude
    split = split_shift(before, after, scale=scale, lam=LAM)
    assert tuple(split.as_dict()) == PARTS
    for part, want in zip(PARTS, (want_magnitude, want_gating, want_y), strict=True):
        assert relative(split.as_dict()[part], want) < 1e-11, part


def test_one_feature_by_hand() -> None:
    # β = zᵀHy / (zᵀHz + λ): 1 / (2 + 2) before, 2 / (8 + 2) after the activations double.
    gate, y = np.ones((2, 1)), np.array([[0.0], [1.0]])
    split = split_shift(
        State(np.array([[-1.0], [1.0]]), gate, y),
        State(np.array([[-2.0], [2.0]]), gate, y),
        scale=np.ones(1),
        lam=2.0,
    )
    assert split.shift_x_magnitude[0, 0] == pytest.approx(0.2 - 0.25, rel=1e-14)
    assert split.shift_x_gating[0, 0] == 0.0
    assert split.shift_y[0, 0] == 0.0


def test_running_time_backwards_flips_every_sign() -> None:
    before, after, scale = make_states()
    forward = split_shift(before, after, scale=scale, lam=LAM).as_dict()
    backward = split_shift(after, before, scale=scale, lam=LAM).as_dict()
    for part in PARTS:
        assert np.abs(forward[part]).max() > 1e-4
        np.testing.assert_allclose(backward[part], -forward[part], rtol=0, atol=1e-15)


def test_unchanged_behaviour_has_no_shift_y() -> None:
    before, after, scale = make_states()
    split = split_shift(before, State(after.pre, after.gate, before.y), scale=scale, lam=LAM)
    assert not split.shift_y.any()
    assert split.shift_x.any()


def test_unchanged_features_have_no_shift_x() -> None:
    before, after, scale = make_states()
    split = split_shift(before, State(before.pre, before.gate, after.y), scale=scale, lam=LAM)
    assert not split.shift_x_magnitude.any()
    assert not split.shift_x_gating.any()
    assert split.shift_y.any()


@pytest.mark.parametrize("fractional", [False, True])
def test_unchanged_gates_have_no_gating_part(fractional: bool) -> None:
    before, after, scale = make_states()
    gate = np.random.default_rng(1).uniform(size=before.gate.shape) if fractional else before.gate
    split = split_shift(State(before.pre, gate, before.y), State(after.pre, gate, after.y), scale=scale, lam=LAM)
    assert not split.shift_x_gating.any()
    assert split.shift_x_magnitude.any()


def test_unchanged_pre_activations_have_no_magnitude_part() -> None:
    before, after, scale = make_states()
    split = split_shift(before, State(before.pre, after.gate, after.y), scale=scale, lam=LAM)
    assert not split.shift_x_magnitude.any()
    assert split.shift_x_gating.any()


def test_nothing_changed_is_nothing_shifted() -> None:
    before, _, scale = make_states()
    for split in (split_shift, first_order_shift):
        assert not split(before, before, scale=scale, lam=LAM).total.any()


def test_order_of_probes_does_not_matter_and_features_carry_their_shift_along() -> None:
    before, after, scale = make_states()
    rng = np.random.default_rng(2)
    probes, features = rng.permutation(60), rng.permutation(7)

    def mixed(state: State) -> State:
        return State(state.pre[probes][:, features], state.gate[probes][:, features], state.y[probes])

    for split in (split_shift, first_order_shift):
        plain = split(before, after, scale=scale, lam=LAM).as_dict()
        permuted = split(mixed(before), mixed(after), scale=scale[features], lam=LAM).as_dict()
        for part in PARTS:
            np.testing.assert_allclose(permuted[part], plain[part][features], rtol=0, atol=1e-14)


def test_shift_is_linear_in_y_and_blind_to_a_constant() -> None:
    before, after, scale = make_states()

    def changed(state: State) -> State:
        return State(state.pre, state.gate, 5.0 * state.y + 2.0)

    for split in (split_shift, first_order_shift):
        plain = split(before, after, scale=scale, lam=LAM).as_dict()
        scaled = split(changed(before), changed(after), scale=scale, lam=LAM).as_dict()
        for part in PARTS:
            np.testing.assert_allclose(scaled[part], 5.0 * plain[part], rtol=0, atol=1e-13)


def test_units_of_a_feature_cancel_against_its_scale() -> None:
    before, after, scale = make_states()
    unit = np.geomspace(1e-3, 1e3, 7)
    plain = split_shift(before, after, scale=scale, lam=LAM).as_dict()
    other = split_shift(
        State(before.pre * unit, before.gate, before.y),
        State(after.pre * unit, after.gate, after.y),
        scale=scale * unit,
        lam=LAM,
    ).as_dict()
    for part in PARTS:
        np.testing.assert_allclose(other[part], plain[part], rtol=0, atol=1e-14)


def test_behaviours_are_independent_columns() -> None:
    before, after, scale = make_states(m=3)
    together = split_shift(before, after, scale=scale, lam=LAM).as_dict()
    for k in range(3):
        alone = split_shift(
            State(before.pre, before.gate, before.y[:, [k]]),
            State(after.pre, after.gate, after.y[:, [k]]),
            scale=scale,
            lam=LAM,
        ).as_dict()
        for part in PARTS:
            np.testing.assert_allclose(alone[part], together[part][:, [k]], rtol=0, atol=1e-14)


def test_windows_telescope() -> None:
    path = [make_states(seed=seed)[0] for seed in range(5)]
    scale = np.ones(7)
    total = sum(split_shift(a, b, scale=scale, lam=LAM).total for a, b in pairwise(path))
    change = slow_beta(path[-1].x, path[-1].y, scale) - slow_beta(path[0].x, path[0].y, scale)
    assert relative(np.asarray(total), change) < 1e-12


def on_the_way(before: State, after: State, part: float) -> State:
    """The state a share of the way to ``after``, at the gates of ``before``."""
    return State(before.pre + part * (after.pre - before.pre), before.gate, before.y + part * (after.y - before.y))


@pytest.mark.parametrize(("n", "d"), [(60, 7), (25, 40)])
def test_halving_the_step_quarters_the_first_order_error(n: int, d: int) -> None:
    before, after, scale = make_states(n, d)
    errors = []
    for part in (0.02, 0.01, 0.005):
        end = on_the_way(before, after, part)
        exact = split_shift(before, end, scale=scale, lam=LAM)
        first = first_order_shift(before, end, scale=scale, lam=LAM)
        size = np.linalg.norm(np.vstack([exact.shift_x_magnitude, exact.shift_y]))
        errors.append(first_order_error(exact, first) * size)
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(("n", "d"), [(60, 7), (25, 40)])
def test_first_order_is_the_derivative(n: int, d: int) -> None:
    before, after, scale = make_states(n, d)
    first = first_order_shift(before, after, scale=scale, lam=LAM)
    eps = 1e-5
    dx = before.gate * (after.pre - before.pre)
    dy = after.y - before.y
    ahead, behind = before.x + eps * dx, before.x - eps * dx
    by_x = (slow_beta(ahead, before.y, scale) - slow_beta(behind, before.y, scale)) / (2 * eps)
    by_y = (slow_beta(before.x, before.y + eps * dy, scale) - slow_beta(before.x, before.y - eps * dy, scale)) / (
        2 * eps
    )
    assert relative(first.shift_x_magnitude, by_x) < 1e-7
    assert relative(first.shift_y, by_y) < 1e-7
    assert not first.shift_x_gating.any()


def test_first_order_holds_the_gate_of_before() -> None:
    before, after, scale = make_states()
    flipped = State(after.pre, 1.0 - before.gate, after.y)
    one = first_order_shift(before, after, scale=scale, lam=LAM).as_dict()
    two = first_order_shift(before, flipped, scale=scale, lam=LAM).as_dict()
    for part in PARTS:
        np.testing.assert_array_equal(one[part], two[part])


def test_first_order_error_known_values() -> None:
    zero = np.zeros((2, 1))
    exact = PathwaySplit(np.array([[3.0], [0.0]]), np.full((2, 1), 9.0), np.array([[0.0], [4.0]]))
    nothing = PathwaySplit(zero, np.full((2, 1), 9.0), zero)
    assert first_order_error(exact, exact) == 0.0
    assert first_order_error(exact, nothing) == 1.0
    assert first_order_error(exact, PathwaySplit(zero, zero, exact.shift_y)) == pytest.approx(3 / 5)
    assert first_order_error(nothing, PathwaySplit(zero, zero, zero)) == 0.0
    assert first_order_error(nothing, exact) == float("inf")


def test_states_are_float64() -> None:
    state = State(np.ones((2, 1), dtype=np.float32), np.ones((2, 1), dtype=bool), np.ones((2, 1), dtype=np.float32))
    assert {state.pre.dtype, state.gate.dtype, state.y.dtype, state.x.dtype} == {np.dtype(np.float64)}


def test_states_refuse_what_does_not_fit() -> None:
    ones = np.ones((4, 2))
    with pytest.raises(
        ValueError, match=r"y has 1 axes, shape \(4,\); it needs two, \[probe, behaviour\].*\[:, None\]"
    ):
        State(ones, ones, np.ones(4))
    with pytest.raises(ValueError, match=r"gate has shape \(4, 3\) but pre has \(4, 2\)"):
        State(ones, np.ones((4, 3)), ones)
    with pytest.raises(ValueError, match=r"y has 3 probes but pre has 4"):
        State(ones, ones, np.ones((3, 1)))
    with pytest.raises(ValueError, match=r"pre holds 1 values that are NaN or infinite"):
        State(np.array([[1.0, np.nan]]), np.ones((1, 2)), np.ones((1, 1)))
    with pytest.raises(ValueError, match=r"gate holds values from 1 to 3; allowed is 0 to 1.*swapped"):
        State(ones, np.array([[1.0, 3.0]] * 4), ones)


def test_splits_refuse_states_of_different_shape() -> None:
    before, _, scale = make_states()
    other = make_states(n=59)[1]
    for split in (split_shift, first_order_shift):
        with pytest.raises(ValueError, match=r"pre has shape \(60, 7\) before and \(59, 7\) after.*same support"):
            split(before, other, scale=scale, lam=LAM)
        with pytest.raises(ValueError, match=r"y has shape \(60, 2\) before and \(60, 1\) after"):
            split(before, make_states(m=1)[1], scale=scale, lam=LAM)
    with pytest.raises(ValueError, match=r"exact shift has shape \(1, 1\), the first-order one \(2, 1\)"):
        first_order_error(PathwaySplit(*[np.ones((1, 1))] * 3), PathwaySplit(*[np.ones((2, 1))] * 3))
