"""A model that FSDP2 divides over two processes is read as one process reads it, and none waits for one that left.

Accelerate takes FSDP2 on the CPU only with a little help (``fsdp_on_cpu``); transformers' own way needs none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smda_callbacks.records import PATHWAYS
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers import divided_checks as checks
from tests.helpers.divided import SETUPS
from tests.helpers.tiny import tiny_model
from tests.helpers.torchrun import Found, found_by, torchrun

#: How a model is divided -> how many of its 72 weights are, and how many of its 42 trained ones. ``loading``: by
#: transformers, as it loads the model, before the adapter; ``kept``: weights stay gathered after a forward pass.
WAYS = {"accelerate": (72, 42), "kept": (72, 42), "loading": (30, 0)}


@pytest.fixture(
    scope="module", params=[way if way == "accelerate" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(way: str, sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp(way)
    tiny_model().save_pretrained(out / "tiny")
    return found_by("tests.helpers.divided", sae_folder, out, way)


@pytest.fixture(scope="module")
def alone(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunStore:
    return checks.run_alone(sae_folder, tmp_path_factory.mktemp("alone"))


def test_training_is_bit_for_bit_the_one_without(found: Found, way: str) -> None:
    checks.check_training_is_untouched(found.notes, "failing", WAYS[way])


def test_the_store_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    together = RunStore.open(found.out / "store")
    assert together.manifest["model"] == alone.manifest["model"]
    checks.check_store_is_that_of_one_process(together, alone, "the model's weights are divided over processes")


def test_the_noise_floor_is_that_of_one_process(found: Found, alone: RunStore) -> None:
    """Though FSDP2 may have kept weights gathered."""
    checks.check_noise_is_that_of_one_process(RunStore.open(found.out / "store"), alone)
    for note in found.notes:
        assert note["moved"] == [True] * len(note["moved"])


def test_a_process_that_fails_costs_the_window_and_nobody_waits(found: Found) -> None:
    store = RunStore.open(found.out / "failing")
    checks.check_faults_cost_windows(store, found.said)
    windows = store.windows()
    total = sum(w.shift[part] for w in windows if w.status == "ok" for part in PATHWAYS)
    np.testing.assert_allclose(total, windows[-1].coef - store.baseline.coef, atol=1e-12)


def test_processes_that_would_make_different_numbers_of_passes_are_refused(found: Found) -> None:
    text = "the processes have different numbers of batches to read. Next step: give every process the same"
    assert found.notes[0]["differ"].startswith(text)
    assert found.notes[1]["differ"].startswith(f"the main process stopped: ProcessError: {text}")


@pytest.mark.slow
def test_training_is_bit_for_bit_the_one_without_however_it_is_set_up(sae_folder: Path, tmp_path: Path) -> None:
    """Rounding to bf16, checkpointing by FSDP2 and by the trainer, accumulation, DoRA, tied weights."""
    done = torchrun("tests.helpers.divided", sae_folder, tmp_path, "set-ups", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    checks.check_set_ups(tmp_path, len(SETUPS))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_pass_that_breaks_off_on_one_process_ends_the_run(rank: int, sae_folder: Path, tmp_path: Path) -> None:
    """The others wait for its weights, and nothing can be sent to them there: it must not try to go on."""
    done = torchrun("tests.helpers.divided", sae_folder, tmp_path, f"broken{rank}", cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "a forward pass over probes failed on this process (OutOfMemoryError: no memory left)" in done.stderr
    assert "lower measure.batch_size" in done.stderr
    assert list(tmp_path.glob("*.pt")) == []
