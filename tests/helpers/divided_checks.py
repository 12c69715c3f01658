"""What every run of two processes that divide a model is held to: the run of one, and the one without the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smda_callbacks.records import PATHWAYS
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.callback import MeasuringCallback
from tests.helpers.divided import STEPS
from tests.helpers.processes import make_plan, train


def run_alone(sae_folder: Path, folder: Path) -> RunStore:
    """The run of one process that holds the whole model, with the same rows in a step."""
    plan = make_plan(sae_folder, [StoreSink(folder / "store")])
    train(folder / "out", MeasuringCallback(plan), rows_per_process=2, dropout=0.0)
    return RunStore.open(folder / "store")


def check_training_is_untouched(notes: tuple[dict[str, Any], ...], name: str, divided: tuple[int, int]) -> None:
    """Weights after every step, on both processes, bit for bit those of the run without the callback."""
    first, second = notes
    for a, b in ((first[name], first["without"]), (second[name], first["without"])):
        assert len(a) == len(b) == STEPS
        assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
    assert not torch.equal(first["without"][0][-1], first["without"][1][-1])
    assert first["divided"] == second["divided"] == divided


def check_store_is_that_of_one_process(together: RunStore, alone: RunStore, why_no_pairs: str) -> None:
    """Policy, baseline and windows, to rounding; the model's hash is over weights put together."""
    for name in ("hash", "class"):
        assert together.manifest["model"][name] == alone.manifest["model"][name]
    assert together.probes == alone.probes
    assert together.manifest["attribution"]["engine"] == "off"
    assert why_no_pairs in together.manifest["attribution"]["why"]
    np.testing.assert_array_equal(together.policy.features, alone.policy.features)
    labels = [(each.promoted, each.suppressed) for each in together.policy.labels]
    assert labels == [(each.promoted, each.suppressed) for each in alone.policy.labels]
    np.testing.assert_allclose(together.policy.coef, alone.policy.coef, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(together.baseline.snapshot.y, alone.baseline.snapshot.y, rtol=1e-5)
    assert [w.status for w in together.windows()] == ["ok"] * STEPS
    for a, b in zip(together.windows(), alone.windows(), strict=True):
        assert (a.step, a.first_step) == (b.step, b.first_step)
        assert a.trainer["learning_rate"] == b.trainer["learning_rate"]
        assert a.update_rms == pytest.approx(b.update_rms, rel=1e-5)
        np.testing.assert_allclose(a.snapshot.y, b.snapshot.y, rtol=1e-4)
        np.testing.assert_allclose(a.snapshot.x, b.snapshot.x, rtol=1e-4, atol=1e-4)
        for part in PATHWAYS:
            np.testing.assert_allclose(a.shift[part], b.shift[part], atol=1e-3 * np.abs(alone.policy.coef).max())


def check_noise_is_that_of_one_process(together: RunStore, alone: RunStore) -> None:
    """Parts of weights are moved, and forward passes see it."""
    noise = together.noise
    assert noise is not None
    assert alone.noise is not None
    for part in PATHWAYS:
        expected = alone.noise.random[part]
        np.testing.assert_allclose(noise.random[part], expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(noise.behaviour_random, alone.noise.behaviour_random, rtol=1e-3)


def check_faults_cost_windows(store: RunStore, said: str) -> None:
    """After a pass, before the first one, by numbers that are not finite, and on the main process."""
    windows = store.windows()
    assert [w.status for w in windows] == ["failed", "failed", "not_finite", "failed", "ok"]
    text = "ProcessError: not every process could read its probes. process 1: RuntimeError: out of"
    assert [windows[k].error for k in (0, 1)] == [f"{text} sorts", f"{text} luck"]
    assert "NaN or inf in the activations of 10 " in str(windows[2].error)  # the two batches of process 1
    assert windows[3].error == "RuntimeError: out of luck"
    assert said.count("a measurement failed") == 1


def check_set_ups(folder: Path, count: int) -> None:
    """What both processes noted of every set-up: trained as without the callback, divided, all windows read."""
    for rank in range(2):
        found = torch.load(folder / f"{rank}.pt")
        assert len(found) == count
        for name, (same, divided, statuses) in found.items():
            assert same, name
            assert divided > 0, name
            assert statuses == (["ok"] * STEPS if rank == 0 else []), name
