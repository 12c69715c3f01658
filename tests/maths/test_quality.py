"""Quality figures on predictions whose error is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import r2_score

from smda_callbacks.maths.quality import category_quality, cv_r2, r2, stratified_folds
from smda_callbacks.maths.ridge import diagnose, fit_ridge, predict

Array = NDArray[np.float64]
Index = NDArray[np.int64]


def test_r2_by_hand_and_against_scikit_learn() -> None:
    y = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 8.0]])
    pred = np.array([[0.0, 4.0], [1.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(r2(y, pred), [1 - 1 / 2, 0.0])
    noisy = pred + np.random.default_rng(0).normal(size=pred.shape)
    np.testing.assert_allclose(r2(y, noisy), r2_score(y, noisy, multioutput="raw_values"))


def test_r2_of_a_constant_behaviour_is_nan_not_a_number_that_misleads() -> None:
    y = np.array([[0.5, 0.0], [0.5, 1.0]])
    assert np.isnan(r2(y, y)).tolist() == [True, False]


@pytest.mark.parametrize("shapes", [((3,), (3,)), ((3, 1), (3, 2)), ((0, 1), (0, 1))])
def test_r2_refuses_shapes_that_do_not_match(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"must both be \[probe, behaviour\] with one probe or more, got \("):
        r2(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_category_figures_by_hand() -> None:
    y = np.array([[0.0], [1.0], [0.5], [0.5]])
    fitted = np.array([[0.25], [1.0], [0.5], [0.75]])
    loo = np.array([[0.5], [0.5], [1.0], [0.0]])
    (quality,) = category_quality(y, fitted, loo, np.array([0, 0, 1, 1]), ("fraud", "cooking"))
    assert quality["fraud"] == pytest.approx(
        {"mean": 0.5, "predicted": 0.625, "rmse": 0.03125**0.5, "rmse_loo": 0.5, "r2": 0.875, "r2_loo": 0.0}
    )
    cooking = quality["cooking"]
    assert (cooking["r2"], cooking["r2_loo"]) == (None, None)
    assert cooking["rmse"] == pytest.approx(0.03125**0.5)
    assert list(quality) == ["fraud", "cooking"]


def test_categories_weighted_by_size_give_the_overall_error() -> None:
    rng = np.random.default_rng(0)
    y, fitted, loo, groups = rng.random((30, 2)), rng.random((30, 2)), rng.random((30, 2)), np.arange(30) % 4
    for m, quality in enumerate(category_quality(y, fitted, loo, groups, "abcd")):
        squares = [np.sum(groups == c) * (quality["abcd"[c]]["rmse_loo"] or 0.0) ** 2 for c in range(4)]
        assert sum(squares) == pytest.approx(np.square(y - loo)[:, m].sum())


@pytest.mark.parametrize(
    ("groups", "names", "message"),
    [
        ([0, 1, 2], ["a", "b"], r"every number 0\.\.1, one per name, got \[0, 1, 2\]\. Names: a, b"),
        ([0, 0, 0], ["a", "b"], r"got \[0\]"),
        ([0, 1], ["a", "b"], r"one integer per probe, shape \(3,\), got shape \(2,\)"),
        ([0.0, 1.0, 1.0], ["a", "b"], "one integer per probe.*float64"),
    ],
)
def test_refuses_groups_that_do_not_match_their_names(groups: Any, names: Any, message: str) -> None:
    y = np.zeros((3, 1))
    with pytest.raises(ValueError, match=message):
        category_quality(y, y, y, np.array(groups), names)
    with pytest.raises(ValueError, match="must have one shape"):
        category_quality(y, y[:2], y, np.array([0, 1, 1]), ["a", "b"])


@pytest.mark.parametrize("folds", [2, 3, 10])
def test_folds_are_even_overall_and_in_every_group(folds: int) -> None:
    groups = np.random.default_rng(0).integers(0, 5, 103)
    number = stratified_folds(groups, folds, seed=4)
    for part in (number, *(number[groups == g] for g in range(5))):
        sizes = np.bincount(part, minlength=folds)
        assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(number, stratified_folds(groups, folds, seed=4))
    assert (number != stratified_folds(groups, folds, seed=5)).any()


@pytest.mark.parametrize("folds", [1, 6])
def test_refuses_a_number_of_folds_that_cannot_be(folds: int) -> None:
    with pytest.raises(ValueError, match=rf"between 2 and the number of probes, 5, got {folds}"):
        stratified_folds(np.zeros(5, dtype=int), folds)


def ridge_on(x: Array, y: Array, lam: float) -> Callable[[Index], Callable[[Index], Array]]:
    def fit_fold(train: Index) -> Callable[[Index], Array]:
        fit = fit_ridge(x[train], y[train], lam)
        return lambda rows: predict(x[rows], fit)

    return fit_fold


def test_as_many_folds_as_probes_is_leave_one_out() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(25, 6)), rng.normal(size=(25, 2))
    expected = diagnose(x, y, fit_ridge(x, y, 2.0)).r2_loo
    np.testing.assert_allclose(cv_r2(y, ridge_on(x, y, 2.0), folds=25), expected, atol=1e-10)


def test_each_probe_is_predicted_once_by_a_fit_that_never_saw_it() -> None:
    y = np.arange(23.0)[:, None]
    asked: list[int] = []

    def fit_fold(train: Index) -> Callable[[Index], Array]:
        def predictor(rows: Index) -> Array:
            assert not set(train.tolist()) & set(rows.tolist())
            assert len(train) + len(rows) == 23
            asked.extend(rows.tolist())
            return y[rows]

        return predictor

    np.testing.assert_allclose(cv_r2(y, fit_fold, groups=np.arange(23) % 3), [1.0])
    assert sorted(asked) == list(range(23))


def test_choosing_features_on_all_probes_shows_and_choosing_in_every_fold_does_not() -> None:
    """Noise features picked for their correlation look predictive unless the pick is made again in every fold."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 2000)), rng.normal(size=(60, 1))

    def pick(rows: Index) -> Index:
        return np.argsort(-np.abs(x[rows].T @ (y[rows] - y[rows].mean()))[:, 0])[:10]

    def honest(train: Index) -> Callable[[Index], Array]:
        chosen = pick(train)
        fit = fit_ridge(x[train][:, chosen], y[train], 1.0)
        return lambda rows: predict(x[rows][:, chosen], fit)

    peeking = ridge_on(x[:, pick(np.arange(60))], y, 1.0)
    assert cv_r2(y, peeking)[0] > 0.4
    assert cv_r2(y, honest)[0] < 0.0


def test_predicting_the_training_mean_scores_just_below_zero() -> None:
    y = np.random.default_rng(0).normal(size=(50, 1))
    score = cv_r2(y, lambda train: lambda rows: np.full((len(rows), 1), y[train].mean()))
    assert -0.2 < score[0] <= 0.0


def test_refuses_predictions_of_the_wrong_shape_or_not_finite_and_groups_of_another_length() -> None:
    y = np.arange(20.0)[:, None]
    with pytest.raises(ValueError, match=r"fold 0: .* finite values of shape \(2, 1\), got shape \(2,\), 0 not finite"):
        cv_r2(y, lambda train: lambda rows: y[rows, 0])
    with pytest.raises(ValueError, match=r"fold 0: .* got shape \(2, 1\), 2 not finite"):
        cv_r2(y, lambda train: lambda rows: np.full((len(rows), 1), np.nan))
    with pytest.raises(ValueError, match="groups must have one entry per probe, 20, got 15"):
        cv_r2(y, lambda train: lambda rows: y[rows], groups=np.zeros(15, dtype=int))
