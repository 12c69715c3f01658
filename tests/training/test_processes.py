"""Several processes: two of them, over gloo, read together what one reads, and none waits for one that failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from smda_callbacks.observe.noise import RandomMoves
from smda_callbacks.observe.reading import Part, assemble
from smda_callbacks.observe.sharding import Move, Team
from smda_callbacks.records import PATHWAYS
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.callback import MeasuringCallback
from tests.helpers.equal import assert_same
from tests.helpers.processes import STEPS, make_plan, train
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.helpers.torchrun import Found, found_by


@pytest.fixture(scope="module")
def found(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by("tests.helpers.processes", sae_folder, tmp_path_factory.mktemp("processes"))


def assert_equal(first: Sequence[Sequence[torch.Tensor]], second: Sequence[Sequence[torch.Tensor]]) -> None:
    assert len(first) == len(second) == STEPS
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_training_is_bit_for_bit_the_one_without(found: Found) -> None:
    first, second = found.notes
    for case in ("watched", "failing"):
        for note in found.notes:
            assert_equal(note[case], note["without"])
    assert_equal(first["without"], second["without"])
    assert not torch.equal(first["without"][0][-1], first["without"][1][-1])


def test_a_reading_together_is_bit_for_bit_one_alone(found: Found) -> None:
    assert found.notes[0]["same"] == [True] * STEPS


def test_the_store_is_that_of_one_process(found: Found, sae_folder: Path, tmp_path: Path) -> None:
    one = StoreSink(tmp_path / "store")
    train(tmp_path / "out", MeasuringCallback(make_plan(sae_folder, [one])), rows_per_process=2, dropout=0.0)
    alone, together = RunStore.open(tmp_path / "store"), RunStore.open(found.out / "store")
    # Before the first step nothing differs, to the last bit.
    assert_same(together.policy, alone.policy)
    assert_same(together.noise, alone.noise)
    assert_same(together.baseline.snapshot, alone.baseline.snapshot)
    assert_same(together.probes, alone.probes)
    # Gradients are summed in another order from then on.
    assert [w.status for w in together.windows()] == ["ok"] * STEPS
    assert [w.step for w in together.windows() if w.noise is not None] == [4]
    for a, b in zip(together.windows(), alone.windows(), strict=True):
        assert (a.step, a.first_step) == (b.step, b.first_step)
        np.testing.assert_allclose(a.snapshot.y, b.snapshot.y, rtol=1e-4)
        np.testing.assert_allclose(a.snapshot.x, b.snapshot.x, rtol=1e-4, atol=1e-4)
        for part in PATHWAYS:
            np.testing.assert_allclose(a.shift[part], b.shift[part], atol=1e-3 * np.abs(alone.policy.coef).max())
    # The floor measured again in the middle of the training: both processes made the same random moves.
    again, single = together.window(4).noise, alone.window(4).noise
    np.testing.assert_allclose(again.behaviour_random, single.behaviour_random, rtol=1e-2)
    np.testing.assert_allclose(again.random["shift_y"], single.random["shift_y"], rtol=1e-2)
    assert not np.allclose(again.behaviour_random, together.noise.behaviour_random, rtol=1e-2)


def test_a_process_that_fails_costs_the_window_and_nobody_waits(found: Found) -> None:
    store = RunStore.open(found.out / "failing")
    windows = store.windows()
    assert [w.status for w in windows] == ["ok", "failed", "not_finite", "failed", "ok"]
    assert windows[1].error == (
        "ProcessError: not every process could read its probes. process 1: RuntimeError: out of luck"
    )
    assert "NaN or inf in the activations of 10 " in windows[2].error  # the two batches of process 1
    assert windows[3].error == "RuntimeError: out of luck"  # of the main process itself
    total = sum(w.shift[part] for w in windows if w.status == "ok" for part in PATHWAYS)
    np.testing.assert_allclose(total, windows[-1].coef - store.baseline.coef, atol=1e-12)


def test_a_process_that_fails_before_training_stops_all(found: Found) -> None:
    text = "not every process could read its probes. process 1: RuntimeError: out of luck"
    assert found.notes[0]["refused"] == text
    assert found.notes[1]["refused"] == f"the main process stopped: ProcessError: {text}"


def test_a_callback_on_one_process_only_is_refused_in_time(found: Found) -> None:
    assert "give the callback to the trainer on every process" in found.notes[0]["absent"]
    assert "absent" not in found.notes[1]


def test_a_model_that_is_divided_over_processes_is_refused_by_name(found: Found) -> None:
    for note in found.notes:
        assert "lm_head.weight and others are divided over processes as tensor or expert" in note["divided"]
        assert "Allowed: one process, DDP, FSDP2" in note["divided"]


@pytest.mark.parametrize(("items", "size"), [(5, 2), (4, 3), (1, 2)])
def test_every_item_is_dealt_to_one_process(items: int, size: int) -> None:
    shares = [Team(rank, size, None).share(list(range(items))) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_random_update_is_the_same_whoever_asks_for_it_and_when() -> None:
    def weights(*draws: int) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(50))
        moves = RandomMoves([parameter])
        for draw in draws:
            with moves.applied(Move(0.5, 7, draw)):
                moved = parameter.detach().clone()
            assert torch.equal(parameter, torch.zeros(50))
        return moved

    last = weights(0, 1, 2)
    assert torch.equal(last.abs(), torch.full((50,), 0.5))
    assert not torch.equal(last, weights(0, 1))
    for order in ((2,), (0, 2), (0, 1, 2, 2), (2, 0, 1, 2)):
        assert torch.equal(weights(*order), last)


def test_parts_that_are_not_every_probe_once_are_refused(sae_folder: Path) -> None:
    plan = make_plan(sae_folder)
    batches = plan.instrument(tiny_model(), tiny_tokenizer(), plan.load_sae()).batches
    rows = [Part(batch.index, *(torch.zeros(len(batch.index), 3),) * 4) for batch in batches.batches]
    for parts in (rows[1:], [*rows, rows[0]]):
        with pytest.raises(RuntimeError, match=r"which are not the 24 probes once each"):
            assemble(parts, batches)
