"""The account in behaviour units closes, and names the right row where only one thing happened."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from smda_callbacks.maths.account import Account, account, check_groups, mean_by_group
from smda_callbacks.maths.pathways import State, split_shift

Array = NDArray[np.float64]
ROWS = ("magnitude", "gating", "shift_x_magnitude", "shift_x_gating", "shift_y", "intercept", "residual")


def make_problem(n: int = 60, d: int = 7, m: int = 2, seed: int = 0) -> tuple[State, State, Array, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    pre = rng.normal(0.3, 1.0, (n, d))
    later = pre + 0.4 * rng.normal(size=(n, d))
    before = State(pre, (pre > 0.2).astype(float), rng.uniform(size=(n, m)))
    after = State(later, (later > 0.2).astype(float), rng.uniform(size=(n, m)))
    groups = np.concatenate([np.arange(4), rng.integers(0, 4, n - 4)])
    return before, after, rng.uniform(0.5, 2.0, d), groups


def only(result: Account, names: tuple[str, ...], atol: float = 1e-6) -> None:
    """Assert that the named rows carry the whole measured change and the others nothing."""
    np.testing.assert_allclose(sum(result.rows[name] for name in names), result.measured, rtol=0, atol=atol)
    for name in ROWS:
        if name not in names:
            np.testing.assert_allclose(result.rows[name], 0.0, atol=atol, err_msg=name)


def carried_by(result: Account, name: str) -> None:
    """Assert that the policy stayed as it was and one feature row carries the whole measured change.

    ΔX and ΔY each refit the policy with the other half held back, so with a fixed policy they are not zero alone:
    they cancel.
    """
    np.testing.assert_allclose(result.rows[name], result.measured, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sum(result.rows[part] for part in ROWS[2:5]), 0.0, atol=1e-6)
    for other in {"magnitude", "gating", "intercept", "residual"} - {name}:
        np.testing.assert_allclose(result.rows[other], 0.0, atol=1e-6, err_msg=other)


@pytest.mark.parametrize(("n", "d"), [(60, 7), (25, 40)])
@pytest.mark.parametrize("lam", [0.1, 3.0, 1000.0])
def test_rows_sum_to_the_measured_change(n: int, d: int, lam: float) -> None:
    before, after, scale, groups = make_problem(n, d)
    result = account(before, after, scale=scale, lam=lam, groups=groups)
    assert tuple(result.rows) == ROWS
    for c in range(4):
        measured = after.y[groups == c].mean(axis=0) - before.y[groups == c].mean(axis=0)
        np.testing.assert_allclose(result.measured[c], measured, rtol=0, atol=1e-15)
        np.testing.assert_allclose(sum(row[c] for row in result.rows.values()), measured, rtol=0, atol=1e-12)


def test_features_sum_to_their_rows() -> None:
    before, after, scale, groups = make_problem()
    result = account(before, after, scale=scale, lam=3.0, groups=groups)
    assert tuple(result.features) == ROWS[:5]
    for name, values in result.features.items():
        assert values.shape == (4, 7, 2)
        assert np.abs(values).max() > 1e-5
        np.testing.assert_allclose(values.sum(axis=1), result.rows[name], rtol=0, atol=1e-12)


def test_features_agree_with_a_loop_over_probes() -> None:
    before, after, scale, groups = make_problem()
    result = account(before, after, scale=scale, lam=3.0, groups=groups)
    split = split_shift(before, after, scale=scale, lam=3.0)
    z = (before.x + after.x) / 2 / scale
    for c, j, m in [(0, 0, 0), (3, 6, 1), (2, 4, 0)]:
        members = np.flatnonzero(groups == c)
        for part, shift in split.as_dict().items():
            want = np.mean([z[i, j] * shift[j, m] for i in members])
            assert result.features[part][c, j, m] == pytest.approx(want, abs=1e-14)
    # Magnitude and gating share the mean coefficient, so their ratio is that of the two parts of the feature's change.
    change = (after.x - before.x)[groups == 1, 2].mean()
    gating = ((before.pre + after.pre) / 2 * (after.gate - before.gate))[groups == 1, 2].mean()
    got = result.features["gating"][1, 2] / (result.features["gating"][1, 2] + result.features["magnitude"][1, 2])
    np.testing.assert_allclose(got, gating / change, rtol=1e-10)


def linear_problem() -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Pre-activations, a true policy, scales and groups; with hardly any penalty a refit finds the true policy."""
    rng = np.random.default_rng(5)
    return rng.normal(1.0, 1.0, (50, 4)), rng.normal(size=(4, 2)), rng.uniform(0.5, 2.0, 4), np.arange(50) % 3


def test_features_that_move_under_a_fixed_policy_are_all_magnitude() -> None:
    pre, beta, scale, groups = linear_problem()
    later = pre + np.outer(groups == 1, [0.5, 0.0, -0.2, 0.0])
    ones = np.ones_like(pre)
    before, after = State(pre, ones, 0.3 + pre / scale @ beta), State(later, ones, 0.3 + later / scale @ beta)
    result = account(before, after, scale=scale, lam=1e-9, groups=groups)
    carried_by(result, "magnitude")
    assert np.abs(result.measured[1]).min() > 0.01
    np.testing.assert_allclose(result.features["magnitude"][1, 0], 0.5 / scale[0] * beta[0], atol=1e-6)
    np.testing.assert_allclose(result.features["magnitude"][1, [1, 3]], 0.0, atol=1e-6)


def test_gates_that_flip_under_a_fixed_policy_are_all_gating() -> None:
    pre, beta, scale, groups = linear_problem()
    gate = np.random.default_rng(6).integers(0, 2, pre.shape).astype(float)
    ones = np.ones_like(pre)
    before = State(pre, ones, 0.3 + pre / scale @ beta)
    after = State(pre, gate, 0.3 + gate * pre / scale @ beta)
    result = account(before, after, scale=scale, lam=1e-9, groups=groups)
    carried_by(result, "gating")
    assert np.abs(result.measured).min() > 0.01


def test_a_new_policy_on_fixed_features_is_shift_y_and_intercept() -> None:
    pre, beta, scale, groups = linear_problem()
    ones, new = np.ones_like(pre), beta + np.array([[0.5, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    before, after = State(pre, ones, 0.3 + pre / scale @ beta), State(pre, ones, 0.1 + pre / scale @ new)
    result = account(before, after, scale=scale, lam=1e-9, groups=groups)
    only(result, ("shift_y", "intercept"))
    np.testing.assert_allclose(result.rows["intercept"], -0.2, atol=1e-6)
    np.testing.assert_allclose(
        result.features["shift_y"][:, 0, 0], 0.5 * mean_by_group(pre / scale, groups)[:, 0], atol=1e-6
    )


def test_what_the_features_cannot_express_is_residual() -> None:
    pre, beta, scale, groups = linear_problem()
    ones = np.ones_like(pre)
    design = np.column_stack([np.ones(50), pre])
    bump = (groups == 2).astype(float)
    unseen = bump - design @ np.linalg.lstsq(design, bump, rcond=None)[0]  # orthogonal to all features and to 1
    y = pre / scale @ beta
    result = account(State(pre, ones, y), State(pre, ones, y + unseen[:, None]), scale=scale, lam=3.0, groups=groups)
    only(result, ("residual",), atol=1e-12)
    np.testing.assert_allclose(result.rows["residual"][2], unseen[groups == 2].mean(), atol=1e-12)


def test_running_time_backwards_flips_every_row() -> None:
    before, after, scale, groups = make_problem()
    forward = account(before, after, scale=scale, lam=3.0, groups=groups)
    backward = account(after, before, scale=scale, lam=3.0, groups=groups)
    for name in ROWS:
        np.testing.assert_allclose(backward.rows[name], -forward.rows[name], rtol=0, atol=1e-13)
    for name in ROWS[:5]:
        np.testing.assert_allclose(backward.features[name], -forward.features[name], rtol=0, atol=1e-13)


def test_order_of_probes_and_numbering_of_categories_do_not_matter() -> None:
    before, after, scale, groups = make_problem()
    order, renamed = np.random.default_rng(3).permutation(60), np.array([2, 0, 3, 1])
    mixed = [State(s.pre[order], s.gate[order], s.y[order]) for s in (before, after)]
    plain = account(before, after, scale=scale, lam=3.0, groups=groups)
    other = account(mixed[0], mixed[1], scale=scale, lam=3.0, groups=renamed[groups[order]])
    for name in ROWS:
        np.testing.assert_allclose(other.rows[name][renamed], plain.rows[name], rtol=0, atol=1e-13)


def test_one_category_of_all_probes_has_no_residual() -> None:
    before, after, scale, _ = make_problem()
    result = account(before, after, scale=scale, lam=3.0, groups=np.zeros(60, dtype=int))
    np.testing.assert_allclose(result.rows["residual"], 0.0, atol=1e-14)


def test_mean_by_group_by_hand() -> None:
    values = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]])
    np.testing.assert_array_equal(mean_by_group(values, np.array([1, 0, 1])), [[3.0, 30.0], [3.0, 30.0]])
    np.testing.assert_array_equal(mean_by_group(values[:, 0], np.array([0, 0, 1])), [2.0, 5.0])


def test_refuses_groups_that_do_not_fit() -> None:
    before, after, scale, groups = make_problem()

    def run(numbers: object) -> None:
        account(before, after, scale=scale, lam=3.0, groups=numbers)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"groups has shape \(59,\); one category number for each of the 60 probes"):
        run(groups[:-1])
    with pytest.raises(ValueError, match=r"unknown group number -1; allowed are 0 to 3"):
        run(np.where(groups == 2, -1, groups))
    with pytest.raises(ValueError, match=r"category 2 has no probes.*0 to 3"):
        run(np.where(groups == 2, 1, groups))
    with pytest.raises(TypeError, match=r"groups has dtype float64; whole numbers"):
        run(groups.astype(float))
    with pytest.raises(ValueError, match=r"unknown group number 3; allowed are 0 to 2"):
        check_groups(groups, 60, 3)
    with pytest.raises(ValueError, match=r"category 4 has no probes"):
        check_groups(groups, 60, 5)
    with pytest.raises(ValueError, match=r"there are no probes"):
        check_groups([], 0)
    with pytest.raises(ValueError, match=r"pre has shape \(60, 7\) before and \(59, 7\) after"):
        account(before, make_problem(n=59)[1], scale=scale, lam=3.0, groups=groups)


def test_the_origin_moves_change_between_features_and_intercept_and_nothing_else() -> None:
    before, after, scale, groups = make_problem()
    origin = np.linspace(-1.0, 2.0, len(scale))
    plain = account(before, after, scale=scale, lam=3.0, groups=groups)
    moved = account(before, after, scale=scale, lam=3.0, groups=groups, origin=origin)
    for row in ("magnitude", "gating", "residual"):
        np.testing.assert_array_equal(plain.rows[row], moved.rows[row])
    np.testing.assert_allclose(sum(moved.rows.values()), moved.measured, atol=1e-12)
    total = split_shift(before, after, scale=scale, lam=3.0).total
    np.testing.assert_allclose(moved.rows["intercept"] - plain.rows["intercept"], np.tile(origin @ total, (4, 1)))


def test_at_the_mean_of_a_group_its_features_carry_nothing_but_movement() -> None:
    """Counted from where a category is, a change of coefficients does nothing to it: only moving features do."""
    before, after, scale, groups = make_problem()
    middle = (before.x + after.x)[groups == 1].mean(axis=0) / (2 * scale)
    result = account(before, after, scale=scale, lam=3.0, groups=groups, origin=middle)
    for row in ("shift_x_magnitude", "shift_x_gating", "shift_y"):
        np.testing.assert_allclose(result.rows[row][1], 0.0, atol=1e-12)


def test_an_origin_of_another_length_is_refused() -> None:
    before, after, scale, groups = make_problem()
    with pytest.raises(ValueError, match=r"origin must hold one finite number for each of the \d+ features, got shape"):
        account(before, after, scale=scale, lam=3.0, groups=groups, origin=np.zeros(len(scale) + 1))
