"""Pairs of two processes (DDP, gloo): each captures its own, the main one attributes them all, none waits in vain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smda_callbacks.observe.divided import BrokenPassError
from smda_callbacks.observe.sharding import Team, join_team
from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.ghost import Ghost
from smda_callbacks.training.monitor import Monitor
from tests.helpers.pair_processes import pair_plan
from tests.helpers.processes import STEPS, train
from tests.helpers.torchrun import Found, found_by


@pytest.fixture(scope="module")
def found(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by("tests.helpers.pair_processes", sae_folder, tmp_path_factory.mktemp("pairs"))


def test_training_is_bit_for_bit_the_one_without(found: Found) -> None:
    for note in found.notes:
        for case in ("watched", "every", "failing", "gradients"):
            for a, b in zip(note[case], note["without"], strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), case


def test_the_books_are_those_of_one_process_that_trains_on_the_same_rows(
    found: Found, sae_folder: Path, tmp_path: Path
) -> None:
    plan = pair_plan(sae_folder, [StoreSink(tmp_path / "store")])
    train(tmp_path / "out", MeasuringCallback(plan), rows_per_process=4, dropout=0.0)
    alone, together = RunStore.open(tmp_path / "store"), RunStore.open(found.out / "store")
    assert together.manifest["attribution"]["engine"] == "ghost"
    assert "several processes" in together.manifest["attribution"]["why"]
    names = [{pair.id: pair.rows for w in store.windows() for pair in w.pairs_seen} for store in (alone, together)]
    for a, b in zip(alone.windows(), together.windows(), strict=True):
        assert a.pairs is not None
        assert b.pairs is not None
        assert b.pairs.capture_error < 1e-6
        for kind in ("", "later_"):
            rows = [
                [names[k][number] for number in getattr(book, f"{kind}ids").tolist()]
                for k, book in enumerate((a.pairs, b.pairs))
            ]
            assert sorted(rows[0]) == sorted(rows[1])
            orders = [sorted(range(len(each)), key=each.__getitem__) for each in rows]  # ids are given as pairs are met
            for quantity in ("share", "effect"):
                one, two = (
                    getattr(book, kind + quantity)[order]
                    for book, order in zip((a.pairs, b.pairs), orders, strict=True)
                )
                np.testing.assert_allclose(two, one, atol=2e-3 * max(np.abs(one).max(initial=0.0), 1e-12))
    assert len(together.windows()) == STEPS


def test_gradients_are_those_that_one_process_takes_of_all_probes(found: Found) -> None:
    (errors,) = found.notes[0]["errors"]
    assert len(errors) == STEPS
    assert all(len(of_reading) > 20 for of_reading in errors)  # functionals
    assert max(map(max, errors)) < 1e-5


def test_each_process_takes_the_gradients_of_its_own_batches(found: Found) -> None:
    readings = 6  # at the start, and before and after every window that is attributed: 0 | 1 | 2 | 3 | 4 | 5
    whole = []
    for rank, note in enumerate(found.notes):
        batches = note["visited"]["scores"]
        own = batches[: len(batches) // readings]
        assert len(own) == (3, 2)[rank]
        assert batches == own * readings
        assert note["visited"]["features"] == batches  # all functionals of features are renewed
        whole += own
    assert sorted(probe for batch in whole for probe in batch) == list(range(24))


def test_the_ledger_holds(found: Found) -> None:
    checks = verify(RunStore.open(found.out / "store"))
    assert all(check.ok for check in checks)
    assert any("ledger" in check.name for check in checks)


def test_windows_between_attributed_ones_are_left_alone(found: Found) -> None:
    windows = RunStore.open(found.out / "every").windows()
    assert [w.pairs is not None for w in windows] == [k % 2 == 0 for k in range(STEPS)]
    full = RunStore.open(found.out / "store").windows()
    for k in range(0, STEPS, 2):
        (a, b) = (windows[k].pairs, full[k].pairs)
        assert a is not None
        assert b is not None
        assert len(a.ids) == len(b.ids) == 4


def test_a_process_that_fails_costs_its_window_and_nobody_waits(found: Found) -> None:
    windows = RunStore.open(found.out / "failing").windows()
    assert [w.status for w in windows] == ["ok"] * STEPS
    assert [w.pairs is not None for w in windows] == [True] + [False] * 4
    wanted = [
        "process 1: RuntimeError: take is out of luck",
        "process 1: RuntimeError: to is out of luck",
        "RuntimeError: before_step is out of luck",
        "process 1: RuntimeError: attach is out of luck",
    ]
    for window, text in zip(windows[1:], wanted, strict=True):
        assert text in str(window.unattributed)


def test_gradients_that_fail_on_another_process_cost_the_pairs_of_their_window_only(found: Found) -> None:
    windows = RunStore.open(found.out / "gradients").windows()
    for window, text in zip(windows, ("local_slopes", "pool"), strict=False):
        assert window.status == "ok"
        assert window.pairs is None
        assert f"process 1: RuntimeError: {text} is out of luck" in str(window.unattributed)
    assert windows[2].pairs is not None
    assert windows[3].status == "failed"  # on the main process, whose reading it was
    assert windows[3].error == "RuntimeError: local_slopes is out of luck"
    assert windows[4].pairs is not None
    full = RunStore.open(found.out / "store").windows()
    assert full[2].pairs is not None
    np.testing.assert_array_equal(windows[2].pairs.share, full[2].pairs.share)
    assert len(windows[4].pairs.ids) == 8  # of steps 4 and 5


def test_sums_are_left_alone_where_processes_hold_different_tensors(found: Found) -> None:
    assert found.notes[0]["sums"] == [[3.0] * 4, [30.0] * 2]
    for note in found.notes:
        assert "different sizes" in note["different"]


def test_a_process_that_breaks_off_in_the_middle_of_a_sum_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait there and cannot be told: nothing may take it for a window that is lost."""
    team = Team(0, 2, None)

    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch.distributed, "reduce", broken)
    monkeypatch.setattr(team, "agree", lambda left: True)
    ghost, attributor, monitor = (object.__new__(kind) for kind in (Ghost, Attributor, Monitor))
    ghost.last, ghost.read = None, lambda model: team.add_up([torch.ones(1)])
    attributor.engine, attributor.options, attributor._sites = ghost, AttributionOptions(), ()
    attributor._window = attributor._fault = attributor._off = None
    attributor._number, monitor.attributor = 0, attributor
    with pytest.raises(BrokenPassError, match="the others wait for it"):
        attributor.read(torch.nn.Module())
    with pytest.raises(BrokenPassError, match="the others wait for it"):
        monitor._open_window(torch.nn.Module())


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_groups_are_made_and_let_go_of_in_an_order_that_all_bear(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group that only sees who is there goes when another one connects all: by then all have left it."""
    made: list[str] = []

    def new_group(**given: Any) -> str:
        made.append(given.get("backend", "training's own"))
        return f"{made[-1]} {len(made)}"

    given: dict[str, Any] = {
        "is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: 1, "new_group": new_group,
        "get_backend": lambda: backend, "destroy_process_group": lambda group: made.append(f"without {group}"),
    }  # fmt: skip
    for name, function in given.items():
        monkeypatch.setattr(torch.distributed, name, function)
    team = join_team()
    assert team is not None
    assert made[:3] == ["gloo", "gloo", "without gloo 1"]
    assert made[3:] == (["training's own"] if backend == "nccl" else [])
    assert team._devices == ("training's own 4" if backend == "nccl" else team._group)


def test_pairs_are_known_through_several_epochs(found: Found) -> None:
    windows = RunStore.open(found.out / "epochs").windows()  # eight rows, two a step: four steps an epoch
    assert [None if w.pairs is None else len(w.pairs.ids) for w in windows] == [2] * STEPS


def test_what_the_main_process_raises_ends_the_others_in_time(found: Found) -> None:
    assert found.notes[0]["raised"] == "before_step is out of luck"
    assert found.notes[1]["raised"] == "the main process stopped: RuntimeError: before_step is out of luck"
    assert all(note["waited"] < 60 for note in found.notes)
