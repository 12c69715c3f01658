"""Ridge against hand-derived solutions, its own limits and symmetries, brute force, and scikit-learn."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from smda_callbacks.maths.ridge import diagnose, fit_ridge, lambda_grid, loo_path, predict
from smda_callbacks.maths.sparse import from_dense

Array = NDArray[np.float64]
SHAPES = [(30, 4), (20, 19), (20, 20), (20, 21), (12, 90), (2, 3), (3, 1)]
ROUTES = ["primal", "dual"]


def sparse_problem(n: int, d: int, m: int = 2, seed: int = 0) -> tuple[Array, Array, Array]:
    """Activations with popular, rare and never active features; behaviours; scales."""
    rng = np.random.default_rng(seed)
    active = rng.random((n, d)) < np.geomspace(0.9, 0.01, d)
    return active * rng.exponential(2.0, (n, d)), rng.random((n, m)), rng.uniform(0.5, 2.0, d)


def known_problem(n: int, d: int, lam: float, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """x, y, coef, intercept with the solution derived by hand from x's own singular vectors.

    With HX = U diag(s) Vᵀ and y = c + U q, the minimiser is V diag(s / (s² + λ)) q whatever the shape.
    """
    rng = np.random.default_rng(seed)
    rank, mean = min(n - 1, d), rng.normal(size=d)
    basis = np.linalg.qr(np.column_stack([np.ones(n), rng.normal(size=(n, rank))]))[0][:, 1:]
    v = np.linalg.qr(rng.normal(size=(d, rank)))[0]
    s, q, c = rng.uniform(0.5, 5.0, rank), rng.normal(size=(rank, 2)), np.array([0.3, -2.0])
    coef = v @ ((s / (s**2 + lam))[:, None] * q)
    return mean + (basis * s) @ v.T, c + basis @ q, coef, c - mean @ coef


def brute_loo(x: Array, y: Array, lam: float, scale: Array | None = None) -> Array:
    """Every probe predicted by scikit-learn fitted on the others."""
    z = x if scale is None else x / scale
    keep = ~np.eye(len(y), dtype=bool)
    return np.stack(
        [Ridge(alpha=lam, solver="svd").fit(z[k], y[k]).predict(z[[i]]).reshape(-1) for i, k in enumerate(keep)]
    )


@pytest.mark.parametrize("shape", [(40, 6), (8, 50)], ids=["long", "wide"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lam", [1e-3, 1.0, 300.0])
def test_solution_derived_by_hand(shape: tuple[int, int], route: Any, lam: float) -> None:
    x, y, coef, intercept = known_problem(*shape, lam)
    # The fixture itself: the gradient of the stated objective is zero at the answer.
    residual = (y - y.mean(axis=0)) - (x - x.mean(axis=0)) @ coef
    np.testing.assert_allclose((x - x.mean(axis=0)).T @ residual, lam * coef, atol=1e-11)
    fit = fit_ridge(x, y, lam, route=route)
    np.testing.assert_allclose(fit.coef, coef, atol=1e-11)
    np.testing.assert_allclose(fit.intercept, intercept, atol=1e-10)
    assert (fit.route, fit.n, fit.d, fit.lam) == (route, *shape, lam)


@pytest.mark.parametrize(("shape", "taken"), [((10, 3), "primal"), ((10, 10), "primal"), ((10, 11), "dual")])
def test_auto_takes_the_smaller_system_and_says_so(shape: tuple[int, int], taken: str) -> None:
    x, y, _ = sparse_problem(*shape)
    assert fit_ridge(x, y, 1.0).route == taken
    assert fit_ridge(from_dense(x), y, 1.0).route == taken


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [1e-4, 1.0, 1e4])
def test_primal_dual_and_sparse_agree_with_scikit_learn(shape: tuple[int, int], lam: float) -> None:
    x, y, scale = sparse_problem(*shape)
    expected = Ridge(alpha=lam, solver="svd").fit(x / scale, y)
    for rows in (x, from_dense(x)):
        for route in ROUTES:
            fit = fit_ridge(rows, y, lam, scale=scale, route=route)  # type: ignore[arg-type]
            np.testing.assert_allclose(fit.coef, expected.coef_.T, atol=1e-8)
            np.testing.assert_allclose(fit.intercept, expected.intercept_, atol=1e-8)
            np.testing.assert_allclose(predict(rows, fit, scale=scale), expected.predict(x / scale), atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 6), (30, 300)])
def test_scale_of_one_standard_deviation_is_standard_scaler(shape: tuple[int, int]) -> None:
    x, y, _ = sparse_problem(*shape)
    x += 0.1 * np.random.default_rng(5).random(shape)
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=2.0)).fit(x, y)
    fit = fit_ridge(x, y, 2.0, scale=x.std(axis=0))
    np.testing.assert_allclose(fit.coef, pipeline[-1].coef_.T, atol=1e-8)
    np.testing.assert_allclose(predict(x, fit, scale=x.std(axis=0)), pipeline.predict(x), atol=1e-8)


@pytest.mark.parametrize("shape", [(20, 5), (20, 60)])
def test_each_behaviour_is_fitted_as_if_alone(shape: tuple[int, int]) -> None:
    x, y, scale = sparse_problem(*shape, m=3)
    together = fit_ridge(x, y, 0.7, scale=scale)
    for m in range(3):
        np.testing.assert_allclose(
            together.coef[:, [m]], fit_ridge(x, y[:, [m]], 0.7, scale=scale).coef, rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("route", ROUTES)
def test_small_lambda_is_least_squares_and_large_lambda_the_mean(route: Any) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(50, 6)), rng.normal(size=(50, 1))
    least_squares = LinearRegression().fit(x, y).coef_.T
    np.testing.assert_allclose(fit_ridge(x, y, 1e-8, route=route).coef, least_squares, atol=1e-6)
    heavy = fit_ridge(x, y, 1e14, route=route)
    np.testing.assert_allclose(heavy.coef, 0.0, atol=1e-11)
    np.testing.assert_allclose(heavy.intercept, y.mean(axis=0), atol=1e-11)


def test_small_lambda_in_the_wide_shape_is_the_interpolation_of_least_norm() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(10, 40)), rng.normal(size=(10, 1))
    least_norm = np.linalg.pinv(x - x.mean(axis=0)) @ (y - y.mean())
    for rows in (x, from_dense(x)):
        np.testing.assert_allclose(fit_ridge(rows, y, 1e-9).coef, least_norm, atol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_small_lambda_does_not_blow_up_rounding_along_the_mean(offset: float) -> None:
    x, y, _ = sparse_problem(40, 300)
    x[:, 0] += offset
    u, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    answer = vt[:-1].T @ ((s / (s**2 + 1e-7))[:-1, None] * (u[:, :-1].T @ (y - y.mean(axis=0))))
    for rows in (x, from_dense(x)):
        np.testing.assert_allclose(fit_ridge(rows, y, 1e-7).coef, answer, atol=1e-11)


@pytest.mark.parametrize("shape", [(15, 4), (15, 40)])
def test_every_row_twice_with_twice_the_penalty_changes_nothing(shape: tuple[int, int]) -> None:
    x, y, _ = sparse_problem(*shape)
    once, twice = fit_ridge(x, y, 3.0), fit_ridge(np.vstack([x, x]), np.vstack([y, y]), 6.0)
    np.testing.assert_allclose(twice.coef, once.coef, atol=1e-11)
    np.testing.assert_allclose(twice.intercept, once.intercept, atol=1e-11)


@pytest.mark.parametrize("shape", [(30, 4), (10, 25)])
def test_a_column_twice_halves_the_penalty_and_splits_the_weight(shape: tuple[int, int]) -> None:
    x, y, _ = sparse_problem(*shape)
    fit = fit_ridge(np.hstack([x, x]), y, 3.0)
    half = fit_ridge(x, y, 1.5).coef / 2
    np.testing.assert_allclose(fit.coef, np.vstack([half, half]), atol=1e-11)


@pytest.mark.parametrize("shape", [(25, 6), (25, 80)])
def test_order_of_probes_and_features_is_irrelevant(shape: tuple[int, int]) -> None:
    x, y, scale = sparse_problem(*shape)
    rng = np.random.default_rng(3)
    i, j = rng.permutation(shape[0]), rng.permutation(shape[1])
    for make in (np.asarray, from_dense):
        there = fit_ridge(make(x), y, 1.0, scale=scale)
        back = fit_ridge(make(x[i][:, j]), y[i], 1.0, scale=scale[j])
        np.testing.assert_allclose(back.coef, there.coef[j], atol=1e-12)


def test_shifting_a_column_moves_the_intercept_only() -> None:
    x, y, _ = sparse_problem(20, 50)
    moved = x + 1e4
    np.testing.assert_allclose(fit_ridge(moved, y, 1.0).coef, fit_ridge(x, y, 1.0).coef, atol=1e-9)
    np.testing.assert_allclose(fit_ridge(from_dense(moved), y, 1.0).coef, fit_ridge(x, y, 1.0).coef, atol=1e-9)


def test_never_active_features_get_exactly_zero() -> None:
    x, y, _ = sparse_problem(20, 200)
    silent = np.array([0, 7, 199])
    x[:, silent] = 0.0
    for rows in (x, x.astype(np.float32), from_dense(x)):
        for route in ROUTES:
            fit = fit_ridge(rows, y, 0.1, route=route)  # type: ignore[arg-type]
            assert (fit.coef[silent] == 0.0).all()
            assert (fit.coef[x.any(axis=0)] != 0.0).all()


def test_nothing_active_predicts_the_mean() -> None:
    y = np.array([[0.0], [1.0], [0.5]])
    for rows in (np.zeros((3, 9)), from_dense(np.zeros((3, 9)))):
        fit = fit_ridge(rows, y, 1.0)
        assert not fit.coef.any()
        np.testing.assert_allclose(fit.intercept, [0.5])
        np.testing.assert_allclose(diagnose(rows, y, fit).loo, [[0.75], [0.25], [0.5]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64])
def test_any_real_dtype_is_computed_in_float64(dtype: Any) -> None:
    x = np.round(sparse_problem(15, 40)[0] * 4).astype(dtype)
    y = np.random.default_rng(0).random((15, 1)).astype(np.float32)
    before = x.copy()
    fit, exact = fit_ridge(x, y, 1.0), fit_ridge(x.astype(np.float64), y.astype(np.float64), 1.0)
    assert fit.coef.dtype == np.float64
    np.testing.assert_array_equal(fit.coef, exact.coef)
    np.testing.assert_array_equal(x, before)  # the caller's array is left alone


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e3])
def test_leave_one_out_is_what_leaving_one_out_gives(shape: tuple[int, int], lam: float) -> None:
    x, y, scale = sparse_problem(*shape)
    expected = brute_loo(x, y, lam, scale)
    for rows in (x, from_dense(x)):
        result = diagnose(rows, y, fit_ridge(rows, y, lam, scale=scale), scale=scale)
        np.testing.assert_allclose(result.loo, expected, atol=1e-9)


def test_leave_one_out_keeps_its_digits_where_the_fit_interpolates() -> None:
    x, y, _ = sparse_problem(12, 90)
    x += np.random.default_rng(2).random(x.shape)
    result = diagnose(x, y, fit_ridge(x, y, 1e-9))
    np.testing.assert_allclose(result.fitted, y, atol=1e-8)  # so residual / (1 - leverage) would be 0 / 0
    np.testing.assert_allclose(result.loo, brute_loo(x, y, 1e-9), atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_diagnostics_are_those_of_the_hat_matrix(shape: tuple[int, int]) -> None:
    x, y, scale = sparse_problem(*shape)
    n, d = shape
    h, z = np.eye(n) - 1 / n, x / scale
    normal = z.T @ h @ z + 0.8 * np.eye(d)
    hat = 1 / n + h @ z @ np.linalg.solve(normal, z.T @ h)
    for rows in (x, from_dense(x)):
        result = diagnose(rows, y, fit_ridge(rows, y, 0.8, scale=scale), scale=scale)
        np.testing.assert_allclose(result.fitted, hat @ y, atol=1e-10)
        np.testing.assert_allclose(result.leverage, np.diag(hat), atol=1e-10)
        assert result.edf == pytest.approx(np.trace(hat), abs=1e-9)
        assert result.condition == pytest.approx(np.linalg.cond(normal), rel=1e-8)
        spread = np.square(y - y.mean(axis=0)).sum(axis=0)
        np.testing.assert_allclose(result.r2, 1 - np.square(y - hat @ y).sum(axis=0) / spread, atol=1e-10)
        np.testing.assert_allclose(result.r2_loo, 1 - np.square(y - result.loo).sum(axis=0) / spread, atol=1e-10)


def test_a_behaviour_that_does_not_vary_has_no_r2() -> None:
    x, y, _ = sparse_problem(20, 5)
    y[:, 1] = 0.3
    result = diagnose(x, y, fit_ridge(x, y, 1.0))
    assert np.isnan(result.r2).tolist() == [False, True]
    assert np.isnan(result.r2_loo).tolist() == [False, True]


@pytest.mark.parametrize("shape", [(25, 4), (25, 120)])
def test_lambda_path_is_the_error_of_leaving_one_out(shape: tuple[int, int]) -> None:
    x, y, scale = sparse_problem(*shape)
    lams = np.array([0.1, 3.0, 200.0])
    expected = np.stack([np.square(y - brute_loo(x, y, lam, scale)).mean(axis=0) for lam in lams])
    for rows in (x, from_dense(x)):
        path = loo_path(rows, y, lams, scale=scale)
        np.testing.assert_allclose(path.mse, expected, rtol=1e-8)
        assert path.best == lams[np.argmin((expected / y.var(axis=0)).mean(axis=1))]


def test_best_lambda_weighs_behaviours_by_their_variance_and_marks_the_edge() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3))
    noisy = x @ [1.0, -1.0, 0.5] + 2.0 * rng.normal(size=60)
    inside = loo_path(x, noisy[:, None], lambda_grid())
    assert not inside.at_edge
    cut = loo_path(x, noisy[:, None], inside.lams[inside.lams >= inside.best])
    assert cut.at_edge
    assert cut.best == inside.best
    # Two behaviours that prefer different λ: the units of either, and a constant one, must not pull the choice.
    clean = x @ [1.0, -1.0, 0.5] + 0.5 * rng.normal(size=60)
    assert loo_path(x, clean[:, None], lambda_grid()).best < inside.best
    best = {
        loo_path(x, np.column_stack([a * noisy, b * clean, np.ones(60)]), lambda_grid()).best
        for a, b in [(1.0, 1.0), (1e4, 1.0), (1.0, 1e4)]
    }
    assert len(best) == 1


def test_pure_noise_and_pure_signal_sit_at_opposite_edges() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 40))
    assert loo_path(x, rng.normal(size=(60, 1)), lambda_grid()).best > 1e2
    exact = loo_path(x, x[:, :1], lambda_grid())
    assert exact.at_edge
    assert exact.best == pytest.approx(1e-2)


def test_lambda_grid_is_even_in_the_logarithm() -> None:
    grid = lambda_grid()
    np.testing.assert_allclose(np.diff(np.log10(grid)), 0.5)
    assert (grid[0], grid[-1], grid.size) == (pytest.approx(1e-2), pytest.approx(1e5), 15)
    for bad in ({"low": 0.0}, {"low": 2.0, "high": 1.0}, {"num": 1}, {"high": np.inf}):
        with pytest.raises(ValueError, match="needs 0 < low < high, both finite, and num >= 2, got low="):
            lambda_grid(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("lam", [0.0, -1.0, np.nan, np.inf])
def test_refuses_a_lambda_that_is_no_penalty(lam: float) -> None:
    x, y, _ = sparse_problem(6, 3)
    message = r"lam must be a finite number > 0 .*, got (0\.0|-1\.0|nan|inf)\. Choose one from loo_path"
    with pytest.raises(ValueError, match=message):
        fit_ridge(x, y, lam)
    with pytest.raises(ValueError, match=message):
        loo_path(x, y, np.array([1.0, lam]))


@pytest.mark.parametrize("shape", [(8, 3), (8, 20)])
def test_refuses_a_lambda_lost_to_rounding(shape: tuple[int, int]) -> None:
    x, y, _ = sparse_problem(*shape)
    for rows in (x, from_dense(x)):
        with pytest.raises(ValueError, match=r"lam=1e-20 is lost to rounding .* the smallest that float64 resolves"):
            fit_ridge(rows, y, 1e-20)
        with pytest.raises(ValueError, match="lam=1e-20 is lost to rounding"):
            loo_path(rows, y, np.array([1e-20]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_values_that_are_not_finite_and_says_where(bad: float) -> None:
    x, y, _ = sparse_problem(8, 20)
    x[4, 17] = x[5, 2] = bad
    for rows in (x, x.astype(np.float32), from_dense(x)):
        with pytest.raises(ValueError, match=r"x is NaN or inf in 2 places, the first at probe 4, feature 17"):
            fit_ridge(rows, y, 1.0)
    y[3, 1] = bad
    with pytest.raises(
        ValueError, match=r"y is NaN or inf in 1 place, the first at probe 3, behaviour 1\. Only finite"
    ):
        fit_ridge(np.ones((8, 2)), y, 1.0)


def test_large_finite_values_whose_sum_overflows_are_not_taken_for_inf() -> None:
    x = np.full((4, 2), 1e308)
    x[:, 1] = [0.0, 1e308, 0.0, 1e308]
    y = np.array([[0.0], [1.0], [0.0], [1.0]])
    fit = fit_ridge(x, y, 1.0, scale=np.array([1e308, 1e308]), route="primal")
    assert np.isfinite(fit.coef).all()


def test_refuses_squares_that_overflow() -> None:
    x = np.diag([1e200, 2e200, 3e200])
    with (
        np.errstate(all="ignore"),
        pytest.raises(ValueError, match=r"x is too large for float64: its squares overflow\. Pass scale="),
    ):
        fit_ridge(x, np.eye(3), 1.0, route="dual")


@pytest.mark.parametrize(
    ("x", "y", "scale", "message"),
    [
        (np.ones(5), np.ones((5, 1)), None, r"x must be a matrix \[probe, feature\], got shape \(5,\)"),
        (np.ones((5, 2)), np.ones(5), None, r"y must be \[probe, behaviour\] .* got shape \(5,\)\. .*y\[:, None\]"),
        (np.ones((5, 2)), np.ones((4, 1)), None, r"the 5 probes of x \(5, 2\), got shape \(4, 1\)"),
        (np.ones((5, 2)), np.ones((5, 0)), None, r"got shape \(5, 0\)"),
        (np.ones((1, 2)), np.ones((1, 1)), None, r"at least 2 probes and 1 feature, got x of shape \(1, 2\)"),
        (np.ones((5, 0)), np.ones((5, 1)), None, r"at least 2 probes and 1 feature, got x of shape \(5, 0\)"),
        (np.ones((5, 2)), np.ones((5, 1)), np.ones(3), r"one entry per feature, shape \(2,\), got shape \(3,\)"),
        (np.ones((5, 2)), np.ones((5, 1)), np.array([1.0, 0.0]), r"> 0, got 1 entries .* feature 1, 0\.0\)"),
        (np.ones((5, 2)), np.ones((5, 1)), np.array([np.nan, -1.0]), r"> 0, got 2 entries .* feature 0, nan\)"),
        (np.ones((5, 2)) * 1j, np.ones((5, 1)), None, r"x must hold real numbers, got dtype complex128"),
        (np.ones((5, 2)), np.full((5, 1), "no"), None, r"y must hold real numbers, got dtype <U2"),
    ],
)
def test_refuses_arrays_that_do_not_fit_together(x: Any, y: Any, scale: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_ridge(x, y, 1.0, scale=scale)
    with pytest.raises(ValueError, match=message):
        loo_path(x, y, lambda_grid(), scale=scale)


def test_refuses_an_unknown_route_and_a_prediction_of_other_features() -> None:
    x, y, _ = sparse_problem(6, 3)
    with pytest.raises(ValueError, match="route must be 'auto', 'primal' or 'dual', got 'svd'"):
        fit_ridge(x, y, 1.0, route="svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has 2 features, the fit 3"):
        predict(x[:, :2], fit_ridge(x, y, 1.0))


def test_refuses_to_diagnose_a_fit_of_something_else() -> None:
    x, y, scale = sparse_problem(20, 5)
    fit = fit_ridge(x, y, 1.0)
    for wrong in ((x, y + x[:, :2], None), (x, y, scale), (np.roll(x, 1, axis=0), y, None)):
        with pytest.raises(ValueError, match=r"the fit \(n=20, d=5, lam=1\) was not made from this x, y and scale"):
            diagnose(wrong[0], wrong[1], fit, scale=wrong[2])


def test_refuses_leave_one_out_where_one_probe_alone_decides() -> None:
    x = np.zeros((6, 2))
    x[:, 0], x[4, 1] = np.arange(6.0), 1e3  # feature 1 is active on probe 4 only, and hardly penalised
    y = np.arange(6.0)[:, None] ** 2
    with pytest.raises(ValueError, match=r"not determined at lam=1e-07: probe 4 has leverage 1 to rounding"):
        diagnose(x, y, fit_ridge(x, y, 1e-7))


def test_refuses_to_choose_lambda_by_a_behaviour_that_never_varies() -> None:
    with pytest.raises(ValueError, match=r"no behaviour varies over the 5 probes"):
        loo_path(np.eye(5), np.ones((5, 2)), lambda_grid())
    with pytest.raises(ValueError, match=re.escape("one λ or more, got shape (0,)")):
        loo_path(np.eye(5), np.eye(5), np.array([]))
