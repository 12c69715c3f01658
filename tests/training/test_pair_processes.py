"""Pairs of two processes (DDP, gloo): each captures its own, the main one attributes them all, none waits in vain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.callback import MeasuringCallback
from tests.helpers.pair_processes import pair_plan
from tests.helpers.processes import STEPS, train
from tests.helpers.torchrun import Found, found_by


@pytest.fixture(scope="module")
def found(sae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by("tests.helpers.pair_processes", sae_folder, tmp_path_factory.mktemp("pairs"))


def test_training_is_bit_for_bit_the_one_without(found: Found) -> None:
    for note in found.notes:
        for case in ("watched", "every", "failing"):
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


def test_pairs_are_known_through_several_epochs(found: Found) -> None:
    windows = RunStore.open(found.out / "epochs").windows()  # eight rows, two a step: four steps an epoch
    assert [None if w.pairs is None else len(w.pairs.ids) for w in windows] == [2] * STEPS


def test_what_the_main_process_raises_ends_the_others_in_time(found: Found) -> None:
    assert found.notes[0]["raised"] == "before_step is out of luck"
    assert found.notes[1]["raised"] == "the main process stopped: RuntimeError: before_step is out of luck"
    assert all(note["waited"] < 60 for note in found.notes)
