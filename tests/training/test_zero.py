"""A model under DeepSpeed's ZeRO on two processes is read as one process reads it. Needs deepspeed (0.19)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers import divided_checks as checks
from tests.helpers.tiny import tiny_model
from tests.helpers.torchrun import Found, found_by, torchrun

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


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(way: str, sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp(way)
    tiny_model().save_pretrained(out / "tiny")
    return found_by("tests.helpers.zero", sae_folder, out, way)


@pytest.fixture(scope="module")
def alone(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    """The run of one process without DeepSpeed."""
    return checks.run_alone(sae_folder, tmp_path_factory.mktemp("alone"))


def test_training_is_bit_for_bit_the_one_without(found: Found, way: str) -> None:
    name = "failing" if "failing" in found.notes[0] else "watched"
    checks.check_training_is_untouched(found.notes, name, WAYS[way])


def test_the_store_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    together = RunStore.open(found.out / "store")
    checks.check_store_is_that_of_one_process(together, alone, "DeepSpeed steps inside the backward pass")


def test_the_noise_floor_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    """Though DeepSpeed keeps small weights gathered."""
    checks.check_noise_is_that_of_one_process(RunStore.open(found.out / "store"), alone)


def test_a_process_that_fails_costs_the_window_and_nobody_waits(found: Found) -> None:
    if "failing" not in found.notes[0]:
        pytest.skip("faults are tried where the trainer's arguments ask for ZeRO-3")
    checks.check_faults_cost_windows(RunStore.open(found.out / "failing"), found.said)


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
    checks.check_set_ups(tmp_path, 5)
