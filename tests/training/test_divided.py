"""A model that FSDP2 divides over two processes is read as one process reads it, and none waits for one that left.

Accelerate takes FSDP2 on the CPU only with a little help (``fsdp_on_cpu``); transformers' own way needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smda_callbacks.records import PATHWAYS
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.callback import MeasuringCallback
from tests.helpers.divided import SETUPS, STEPS
from tests.helpers.processes import make_plan, train
from tests.helpers.tiny import tiny_model
from tests.helpers.torchrun import torchrun

#: How a model is divided -> how many of its 72 weights are, and how many of its 42 trained ones. ``loading``: by
#: transformers, as it loads the model, before the adapter; ``kept``: weights stay gathered after a forward pass.
WAYS = {"accelerate": (72, 42), "kept": (72, 42), "loading": (30, 0)}


@dataclass(frozen=True)
class Found:
    """What the processes left: their notes by rank, a folder with the stores, and what they said."""

    way: str
    notes: tuple[dict[str, Any], ...]
    out: Path
    said: str


@pytest.fixture(
    scope="module", params=[way if way == "accelerate" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def found(request: pytest.FixtureRequest, sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp(request.param)
    tiny_model().save_pretrained(out / "tiny")
    done = torchrun("tests.helpers.divided", sae_folder, out, request.param, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    return Found(request.param, tuple(torch.load(out / f"{rank}.pt") for rank in range(2)), out, done.stderr)


@pytest.fixture(scope="module")
def alone(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The run of one process that holds the whole model, with the same rows in a step."""
    folder = tmp_path_factory.mktemp("alone")
    plan = make_plan(sae_folder, [StoreSink(folder / "store")])
    train(folder / "out", MeasuringCallback(plan), rows_per_process=2, dropout=0.0)
    return RunStore.open(folder / "store")


def test_training_is_bit_for_bit_the_one_without(found: Found) -> None:
    first, second = found.notes
    for a, b in ((first["failing"], first["without"]), (second["failing"], first["without"])):
        assert len(a) == len(b) == STEPS
        assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
    assert not torch.equal(first["without"][0][-1], first["without"][1][-1])
    assert first["divided"] == second["divided"] == WAYS[found.way]


def test_the_store_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    together = RunStore.open(found.out / "store")
    assert together.manifest["model"] == alone.manifest["model"]  # its hash is over weights put together
    assert together.probes == alone.probes
    assert together.manifest["attribution"]["engine"] == "off"
    assert "the model's weights are divided over processes" in together.manifest["attribution"]["why"]
    np.testing.assert_array_equal(together.policy.features, alone.policy.features)
    labels = [(each.promoted, each.suppressed) for each in together.policy.labels]
    assert labels == [(each.promoted, each.suppressed) for each in alone.policy.labels]
    np.testing.assert_allclose(together.policy.coef, alone.policy.coef, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(together.baseline.snapshot.y, alone.baseline.snapshot.y, rtol=1e-5)
    assert [w.status for w in together.windows()] == ["ok"] * STEPS
    for a, b in zip(together.windows(), alone.windows(), strict=True):
        assert (a.step, a.first_step) == (b.step, b.first_step)
        assert a.update_rms == pytest.approx(b.update_rms, rel=1e-5)
        np.testing.assert_allclose(a.snapshot.y, b.snapshot.y, rtol=1e-4)
        np.testing.assert_allclose(a.snapshot.x, b.snapshot.x, rtol=1e-4, atol=1e-4)
        for part in PATHWAYS:
            np.testing.assert_allclose(a.shift[part], b.shift[part], atol=1e-3 * np.abs(alone.policy.coef).max())


def test_the_noise_floor_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    """Parts of weights are moved, and forward passes see it, though FSDP2 may have kept them gathered."""
    noise = RunStore.open(found.out / "store").noise
    assert noise is not None
    assert alone.noise is not None
    for part in PATHWAYS:
        expected = alone.noise.random[part]
        np.testing.assert_allclose(noise.random[part], expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(noise.behaviour_random, alone.noise.behaviour_random, rtol=1e-3)
    for note in found.notes:
        assert note["moved"] == [True] * len(note["moved"])


def test_a_process_that_fails_costs_the_window_and_nobody_waits(found: Found) -> None:
    """After a pass, before the first one, by numbers that are not finite, and on the main process."""
    store = RunStore.open(found.out / "failing")
    windows = store.windows()
    assert [w.status for w in windows] == ["failed", "failed", "not_finite", "failed", "ok"]
    text = "ProcessError: not every process could read its probes. process 1: RuntimeError: out of"
    assert [windows[k].error for k in (0, 1)] == [f"{text} sorts", f"{text} luck"]
    assert "NaN or inf in the activations of 10 " in str(windows[2].error)  # the two batches of process 1
    assert windows[3].error == "RuntimeError: out of luck"
    total = sum(w.shift[part] for w in windows if w.status == "ok" for part in PATHWAYS)
    np.testing.assert_allclose(total, windows[-1].coef - store.baseline.coef, atol=1e-12)
    assert found.said.count("a measurement failed") == 1


def test_processes_that_would_make_different_numbers_of_passes_are_refused(found: Found) -> None:
    text = "the processes have different numbers of batches to read. Next step: give every process the same"
    assert found.notes[0]["differ"].startswith(text)
    assert found.notes[1]["differ"].startswith(f"the main process stopped: ProcessError: {text}")


@pytest.mark.slow
def test_training_is_bit_for_bit_the_one_without_however_it_is_set_up(sae_folder: Path, tmp_path: Path) -> None:
    """Rounding to bf16, checkpointing by FSDP2 and by the trainer, accumulation, DoRA, tied weights."""
    done = torchrun("tests.helpers.divided", sae_folder, tmp_path, "set-ups", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(SETUPS)
        for name, (same, divided, statuses) in found.items():
            assert same, name
            assert divided > 0, name
            assert statuses == (["ok"] * STEPS if rank == 0 else []), name


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_pass_that_breaks_off_on_one_process_ends_the_run(rank: int, sae_folder: Path, tmp_path: Path) -> None:
    """The others wait for its weights, and nothing can be sent to them there: it must not try to go on."""
    done = torchrun("tests.helpers.divided", sae_folder, tmp_path, f"broken{rank}", cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "a forward pass over probes failed on this process (OutOfMemoryError: no memory left)" in done.stderr
    assert "lower measure.batch_size" in done.stderr
    assert list(tmp_path.glob("*.pt")) == []
