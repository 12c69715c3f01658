"""The two factors multiply to the slopes, however the probes are cut into batches."""

from __future__ import annotations

import numpy as np
import pytest

from smda_callbacks.maths.functionals import FunctionalSet, functional_set, slopes
from smda_callbacks.maths.local_slopes import local_slopes, mixing
from smda_callbacks.maths.pathways import State

N, D = 24, 5


def problem(behaviours: int, target: str, attributed: list[int] | None) -> tuple[FunctionalSet, State, np.ndarray]:
    rng = np.random.default_rng(behaviours)
    pre = rng.normal(0.3, 1.0, (N, D))
    y = rng.uniform(0.05, 0.95, (N, behaviours))
    state = State(pre, (pre > 0).astype(float), np.log(y / (1 - y)) if target == "logit" else y)
    functionals = functional_set(
        behaviours=["refusal", "hedging"][:behaviours],
        categories=["fraud", "theft", "cooking"],
        refuse=[True, True, False],
        groups=np.arange(N) % 3,
        features=10 + np.arange(D),
        attributed=attributed,
        target=target,  # type: ignore[arg-type]
        gating=True,
    )
    return functionals, state, rng.uniform(0.5, 2.0, D)


@pytest.mark.parametrize("behaviours", [1, 2])
@pytest.mark.parametrize("target", ["probability", "logit"])
@pytest.mark.parametrize("attributed", [None, [3, 1], []])
@pytest.mark.parametrize("batch", [N, 7])
def test_factors_multiply_to_the_slopes(behaviours: int, target: str, attributed: list[int] | None, batch: int) -> None:
    functionals, state, scale = problem(behaviours, target, attributed)
    expected = slopes(functionals, state, scale=scale, lam=3.0).y
    order = np.random.default_rng(0).permutation(N)
    found = np.zeros_like(expected)
    mix = mixing(functionals, state, scale=scale, lam=3.0)
    for start in range(0, N, batch):
        rows = order[start : start + batch]
        local = local_slopes(functionals, rows, state.x[rows], state.y[rows], scale=scale)
        found[:, rows] = np.einsum("kb,bim->kim", mix, local)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)
