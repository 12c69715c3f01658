"""A model under DeepSpeed's ZeRO on two processes is read as one process reads it. Needs deepspeed (0.19)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
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
from tests.helpers.divided import STEPS
from tests.helpers.processes import make_plan, train
from tests.helpers.tiny import tiny_model
from tests.helpers.torchrun import torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

#: How a training is set up -> how many of its 72 weights are divided, and how many of its 42 trained ones.
WAYS = {
    "zero1": (0, 0),
    "zero2": (0, 0),
    "zero3": (72, 42),
    "kept": (72, 42),
    "default": (72, 42),
    "loading": (72, 42),
    "launched": (72, 42),
}


@dataclass(frozen=True)
class Found:
    """What the processes left: their notes by rank, a folder with the stores, and what they said."""

    way: str
    notes: tuple[dict[str, Any], ...]
    out: Path
    said: str


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module", params=WAYS)
def found(request: pytest.FixtureRequest, sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp(request.param)
    tiny_model().save_pretrained(out / "tiny")
    done = torchrun("tests.helpers.zero", sae_folder, out, request.param, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    return Found(request.param, tuple(torch.load(out / f"{rank}.pt") for rank in range(2)), out, done.stderr)


@pytest.fixture(scope="module")
def alone(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The run of one process without DeepSpeed, with the same rows in a step."""
    folder = tmp_path_factory.mktemp("alone")
    plan = make_plan(sae_folder, [StoreSink(folder / "store")])
    train(folder / "out", MeasuringCallback(plan), rows_per_process=2, dropout=0.0)
    return RunStore.open(folder / "store")


def test_training_is_bit_for_bit_the_one_without(found: Found) -> None:
    first, second = found.notes
    name = "failing" if "failing" in first else "watched"
    for a, b in ((first[name], first["without"]), (second[name], first["without"])):
        assert len(a) == len(b) == STEPS
        assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))
    assert not torch.equal(first["without"][0][-1], first["without"][1][-1])
    assert first["divided"] == second["divided"] == WAYS[found.way]


def test_the_store_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    together = RunStore.open(found.out / "store")
    assert together.manifest["model"]["hash"] == alone.manifest["model"]["hash"]  # over weights put together
    assert together.manifest["model"]["class"] == alone.manifest["model"]["class"]
    assert together.probes == alone.probes
    assert together.manifest["attribution"]["engine"] == "off"
    assert "DeepSpeed steps inside the backward pass" in together.manifest["attribution"]["why"]
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


def test_the_noise_floor_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    """Pieces of weights are moved, and forward passes see it, though DeepSpeed keeps small weights gathered."""
    noise = RunStore.open(found.out / "store").noise
    assert noise is not None
    assert alone.noise is not None
    for part in PATHWAYS:
        expected = alone.noise.random[part]
        np.testing.assert_allclose(noise.random[part], expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_allclose(noise.behaviour_random, alone.noise.behaviour_random, rtol=1e-3)


def test_a_process_that_fails_costs_the_window_and_nobody_waits(found: Found) -> None:
    """After a pass, before the first one, by numbers that are not finite, and on the main process."""
    if "failing" not in found.notes[0]:
        pytest.skip("faults are tried where the trainer's arguments ask for ZeRO-3")
    windows = RunStore.open(found.out / "failing").windows()
    assert [w.status for w in windows] == ["failed", "failed", "not_finite", "failed", "ok"]
    text = "ProcessError: not every process could read its probes. process 1: RuntimeError: out of"
    assert [windows[k].error for k in (0, 1)] == [f"{text} sorts", f"{text} luck"]
    assert "NaN or inf in the activations of 10 " in str(windows[2].error)  # the two batches of process 1
    assert windows[3].error == "RuntimeError: out of luck"
    assert found.said.count("a measurement failed") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_that_breaks_off_on_one_process_ends_the_run(rank: int, sae_folder: Path, tmp_path: Path) -> None:
    """The others wait for its pieces, and nothing can be sent to them there: it must not try to go on."""
    done = torchrun("tests.helpers.zero", sae_folder, tmp_path, f"broken{rank}", cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "a forward pass over probes failed on this process (OutOfMemoryError: no memory left)" in done.stderr
    assert list(tmp_path.glob("*.pt")) == []


def test_training_is_bit_for_bit_the_one_without_however_it_is_set_up(sae_folder: Path, tmp_path: Path) -> None:
    """bf16, checkpointing, accumulation, DoRA, tied weights."""
    done = torchrun("tests.helpers.zero", sae_folder, tmp_path, "set-ups", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 5
        for name, (same, divided, statuses) in found.items():
            assert same, name
            assert divided > 0, name
            assert statuses == (["ok"] * STEPS if rank == 0 else []), name
