"""Derivatives of a run's measured change by its final state, against differences of the change itself."""

from __future__ import annotations

import numpy as np
import pytest

from smda_callbacks.maths.end_slopes import end_slopes
from smda_callbacks.maths.functionals import FunctionalSet, functional_set, measured, slopes
from smda_callbacks.maths.pathways import State

N, D, LAM = 14, 4, 3.0
SCALE = np.array([0.5, 1.0, 2.0, 1.5])


def world(target: str, behaviours: int = 2) -> tuple[FunctionalSet, State, State]:
    rng = np.random.default_rng(0)
    functionals = functional_set(
        behaviours=[f"b{m}" for m in range(behaviours)], categories=["theft", "soup"], refuse=[True, False],
        groups=np.arange(N) % 2, features=10 + np.arange(D), attributed=[0, 2], target=target, gating=True,  # type: ignore[arg-type]
    )  # fmt: skip

    def state(shift: float) -> State:
        pre = np.random.default_rng(1).normal(0.3, 1.0, (N, D)) + shift * rng.normal(size=(N, D))
        y = rng.uniform(0.1, 0.9, (N, behaviours))
        return State(pre, (pre > 0).astype(float), y if target == "probability" else np.log(y / (1 - y)))

    return functionals, state(0.0), state(0.7)


@pytest.mark.parametrize("target", ["probability", "logit"])
def test_they_are_the_differences_of_the_measured_change(target: str) -> None:
    functionals, before, after = world(target)
    assert (before.gate != after.gate).any()  # gates did flip over the run
    found = end_slopes(functionals, before, after, scale=SCALE, lam=LAM)

    def change(pre: np.ndarray, y: np.ndarray) -> np.ndarray:
        return measured(functionals, before, State(pre, after.gate, y), scale=SCALE, lam=LAM)

    size = 1e-5
    for i, j in ((0, 0), (3, 2), (7, 1)):
        moved = np.zeros((N, D))
        moved[i, j] = size
        slope = (change(after.pre + moved, after.y) - change(after.pre - moved, after.y)) / (2 * size)
        np.testing.assert_allclose(found.pre[:, i, j], slope, atol=1e-8)
    for i, m in ((0, 0), (5, 1)):
        moved = np.zeros_like(after.y)
        moved[i, m] = size
        slope = (change(after.pre, after.y + moved) - change(after.pre, after.y - moved)) / (2 * size)
        np.testing.assert_allclose(found.y[:, i, m], slope, atol=1e-8)
    assert (np.abs(found.pre).sum(axis=(1, 2)) > 0).sum() == len(functionals.shifts)


def test_the_parts_sum_to_the_slope_of_the_coefficient() -> None:
    functionals, before, after = world("probability")
    found = end_slopes(functionals, before, after, scale=SCALE, lam=LAM)
    at_end = slopes(functionals, after, scale=SCALE, lam=LAM)
    for name in ("feature:10", "feature:12"):
        parts = [functionals.index(f"{name}:{part}") for part in ("x", "y", "gating")]
        np.testing.assert_allclose(found.y[parts].sum(axis=0), at_end.y[parts].sum(axis=0), atol=1e-12)
        np.testing.assert_allclose(found.pre[parts].sum(axis=0), at_end.pre[parts].sum(axis=0), atol=1e-12)


def test_over_a_run_that_went_nowhere_they_are_the_slopes_there() -> None:
    functionals, before, _ = world("probability")
    found = end_slopes(functionals, before, before, scale=SCALE, lam=LAM)
    there = slopes(functionals, before, scale=SCALE, lam=LAM)
    np.testing.assert_allclose(found.y, there.y, atol=1e-12)
    np.testing.assert_allclose(found.pre, there.pre, atol=1e-12)
