"""A run that is stopped and gone on with is the run that never stopped."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from smda_callbacks.observe.sae import load_sae
from smda_callbacks.records import WindowRecord
from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.files import StoreError, list_steps
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.resume import NOTE
from tests.helpers.equal import assert_same
from tests.helpers.stopping import (
    ROWS,
    STEPS,
    Stop,
    make_plan,
    make_trainer,
    train,
    whole_checkpoints,
)
from tests.helpers.tiny import many_probes, save_sae, tiny_sae
from tests.helpers.torchrun import torchrun

CARRY = AttributionOptions("ghost", renew=None, momentum="carry")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(save_sae(tiny_sae(), tmp_path_factory.mktemp("sae") / "sae"))


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(folder, plan)
    return folder


@pytest.fixture(scope="module")
def every_second(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a window for two steps."""
    folder = tmp_path_factory.mktemp("second") / "out"
    train(folder, replace(plan, every=2))
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "out"))


def held(folder: Path) -> RunStore:
    """The only store in ``folder``, of which everything that is checked holds."""
    assert [path.name for path in folder.glob("smda*")] == ["smda"]
    store = RunStore.open(folder / "smda")
    failed = [check for check in verify(store) if not check.ok]
    assert failed == []
    return store


def timeless(window: WindowRecord) -> WindowRecord:
    """A window without the wall times that it took."""
    pairs = None if window.pairs is None else replace(window.pairs, seconds=0.0)
    return replace(window, seconds=0.0, pairs=pairs)


def assert_same_windows(found: Sequence[WindowRecord], expected: Sequence[WindowRecord]) -> None:
    assert [(each.first_step, each.step) for each in found] == [(each.first_step, each.step) for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same(timeless(one), timeless(other), f"window {one.step}")


# ------------------------------------------------------------------------------------------------ every step, once


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_gone_on_with_from_any_checkpoint_is_bit_for_bit_the_run_that_never_stopped(
    step: int, whole: Path, plan: Plan, copy: Callable[[Path], Path]
) -> None:
    """Windows after the checkpoint are there already, as after a kill: they are set aside and measured again."""
    folder = copy(whole)
    train(folder, plan, start=step)
    expected, store = RunStore.open(whole / "smda"), held(folder)
    assert_same_windows(store.windows(), expected.windows())
    assert [window.step for window in store.windows() if window.noise is not None] == [4]
    assert_same(store.start, expected.start)
    assert store.end is not None
    assert store.end.step == STEPS
    assert store.windows()[-1].health is not None  # its overlap with the start was compared above


def test_a_checkpoint_of_the_last_step_adds_what_the_trainer_does_there(
    whole: Path, plan: Plan, copy: Callable[[Path], Path]
) -> None:
    """In the middle of an epoch transformers makes one more step before it looks at ``max_steps``."""
    folder = copy(whole)
    train(folder, plan, start=STEPS)
    found = held(folder).windows()
    assert [window.step for window in found] in (list(range(1, STEPS + 1)), list(range(1, STEPS + 2)))
    assert_same_windows(found[:STEPS], RunStore.open(whole / "smda").windows())


@pytest.mark.parametrize(("step", "saved"), [(3, True), (4, False)])
def test_a_training_that_broke_off_is_gone_on_with(
    step: int, saved: bool, whole: Path, plan: Plan, tmp_path: Path
) -> None:
    train(tmp_path, plan, Stop(step, saved=saved))
    assert list_steps(tmp_path / "smda")[-1] == step
    train(tmp_path, plan, start=3)
    assert_same_windows(held(tmp_path).windows(), RunStore.open(whole / "smda").windows())


def test_a_run_may_be_stopped_twice(whole: Path, plan: Plan, tmp_path: Path) -> None:
    train(tmp_path, plan, Stop(2))
    train(tmp_path, plan, Stop(4), start=2)
    train(tmp_path, plan, start=4)
    assert_same_windows(held(tmp_path).windows(), RunStore.open(whole / "smda").windows())


def test_a_run_that_ended_is_made_longer(plan: Plan, tmp_path: Path) -> None:
    """``max_steps`` grew: the end that the store knew of is set aside."""
    constant = {"lr_scheduler_type": "constant"}
    train(tmp_path / "long", plan, **constant)
    train(tmp_path / "out", plan, max_steps=4, **constant)
    train(tmp_path / "out", plan, start=4, **constant)
    store = held(tmp_path / "out")
    assert_same_windows(store.windows(), RunStore.open(tmp_path / "long" / "smda").windows())
    assert store.end is not None
    assert (store.end.step, (store.path / "superseded-1-end.json").exists()) == (STEPS, True)


def test_pairs_keep_their_numbers_and_are_described_once(whole: Path, plan: Plan, copy: Callable[[Path], Path]) -> None:
    folder = copy(whole)
    train(folder, plan, start=2)
    described = [pair for window in held(folder).windows() for pair in window.pairs_seen]
    assert len({pair.id for pair in described}) == len(described)
    assert {pair.rows for pair in described} <= {(row,) for row in range(len(ROWS))}


def test_momentum_of_steps_before_the_checkpoint_goes_to_the_line_of_momentum(plan: Plan, tmp_path: Path) -> None:
    """The gradients behind it are lost with the process; what it did is the same to rounding, and booked to nobody."""
    carrying = replace(plan, attribution=CARRY)
    train(tmp_path / "whole", carrying)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    train(tmp_path / "out", carrying, start=3)
    expected, found = ([window.pairs for window in held(tmp_path / name).windows()[3:]] for name in ("whole", "out"))
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert_same(one.ids, other.ids)
        assert_same(one.share, other.share)
        assert_same(one.lines["measured"], other.lines["measured"])
        booked, before = (book.lines["momentum"] + book.later_share.sum(axis=0) for book in (one, other))
        np.testing.assert_allclose(booked, before, rtol=1e-5, atol=1e-9)
    assert found[0] is not None
    assert len(found[0].later_ids) == 0
    assert found[1] is not None
    assert len(found[1].later_ids) > 0


# ------------------------------------------------------------------------------------- stops inside a window


@pytest.mark.parametrize("step", [1, 3, 5])
def test_the_window_that_was_open_at_the_checkpoint_spans_it(
    step: int, every_second: Path, plan: Plan, copy: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Only what its pairs did is not known; the windows after it are whole again."""
    folder = copy(every_second)
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        train(folder, replace(plan, every=2), start=step)
    assert "it is not attributed to pairs" in caplog.text
    expected, found = RunStore.open(every_second / "smda").windows(), held(folder).windows()
    cut = [window for window in expected if window.first_step <= step < window.step]
    bare = [replace(window, pairs=None, pairs_seen=()) if window in cut else window for window in expected]
    whys = [window.unattributed for window in found if window.first_step <= step < window.step]
    assert re.search(rf"window open at step {step}, that of a checkpoint, began after step {step - 1}", whys[0] or "")
    found = [replace(window, unattributed=None) if window.unattributed in whys else window for window in found]
    assert [window.pairs is None for window in found] == [window in cut for window in expected]
    described = {pair.id: pair for window in found for pair in window.pairs_seen}
    for one, other in zip(found, bare, strict=True):  # pairs of the cut window are described where they come next
        assert_same(timeless(replace(one, pairs_seen=())), timeless(replace(other, pairs_seen=())))
    booked = {int(number) for window in found if window.pairs for number in window.pairs.ids}
    assert booked <= set(described)


def test_a_checkpoint_at_the_end_of_a_window_needs_no_arrays(every_second: Path) -> None:
    assert [(every_second / f"checkpoint-{k}" / "smda.safetensors").exists() for k in (1, 2, 3)] == [True, False, True]


@pytest.mark.parametrize("engine", ["off", "exact"])
def test_what_is_done_at_every_second_window_keeps_its_turn(engine: Any, plan: Plan, tmp_path: Path) -> None:
    sparse = replace(plan, health_every=2, attribution=AttributionOptions(engine, every=2))
    train(tmp_path / "whole", sparse)
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    train(tmp_path / "out", sparse, start=3)
    assert_same_windows(held(tmp_path / "out").windows(), held(tmp_path / "whole").windows())


# --------------------------------------------------------------------------------------------- and other checkpoints


def test_the_trainers_own_state_has_no_trace_of_the_library(whole: Path) -> None:
    for path in whole.glob("checkpoint-*/trainer_state.json"):
        assert "smda" not in path.read_text().lower()
        assert list(json.loads(path.read_bytes())["stateful_callbacks"]) == ["TrainerControl"]


def test_a_checkpoint_goes_on_without_the_library(whole: Path, copy: Callable[[Path], Path]) -> None:
    folder = copy(whole)
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    weights = load_file(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    for name, value in load_file(whole / f"checkpoint-{STEPS}" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(weights[name], value)


def test_a_checkpoint_without_a_note_starts_a_new_store(
    plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        train(tmp_path, plan, start=2)
    assert "training goes on at step 2, but as a new run" in caplog.text
    assert "written without the callback" in caplog.text
    store = held(tmp_path)
    assert (store.baseline.step, [window.step for window in store.windows()]) == (2, [3, 4, 5, 6])
    train(tmp_path, plan, start=4)  # and that one is gone on with
    again = held(tmp_path)
    assert (again.baseline.step, [window.step for window in again.windows()]) == (2, [3, 4, 5, 6])
    assert again.manifest["run_id"] == store.manifest["run_id"]


@pytest.mark.parametrize("closed", [False, True])
def test_a_kill_between_a_checkpoint_and_its_note_costs_nothing(
    closed: bool, whole: Path, plan: Plan, copy: Callable[[Path], Path]
) -> None:
    """The store that was left open and has the step is recognised by what it read there; a closed one is left alone."""
    folder = copy(whole)
    (folder / "checkpoint-3" / NOTE).unlink()
    if not closed:
        (folder / "smda" / "end.json").unlink()
    train(folder, plan, start=3)
    assert sorted(path.name for path in folder.glob("smda*")) == (["smda", "smda-2"] if closed else ["smda"])
    if not closed:
        found, expected = held(folder).windows(), RunStore.open(whole / "smda").windows()
        assert [each.step for each in found] == [each.step for each in expected]
        for one, other in zip(found, expected, strict=True):  # the loss of the step before is not known
            assert_same(timeless(replace(one, trainer={})), timeless(replace(other, trainer={})))


def test_a_store_left_open_is_not_taken_for_another_run(whole: Path, plan: Plan, copy: Callable[[Path], Path]) -> None:
    folder = copy(whole)
    (folder / "checkpoint-3" / NOTE).unlink()
    (folder / "smda" / "end.json").unlink()
    path = folder / "checkpoint-3" / "adapter_model.safetensors"
    from safetensors.torch import load_file as load_tensors
    from safetensors.torch import save_file

    save_file({name: value + 0.05 * torch.ones_like(value) for name, value in load_tensors(path).items()}, path)
    train(folder, plan, start=3)
    assert sorted(path.name for path in folder.glob("smda*")) == ["smda", "smda-2"]


# ------------------------------------------------------------------------------------------------- another run


def _other(plan: Plan, what: str, folder: Path) -> tuple[Plan, dict[str, Any]]:
    if what == "probes":
        return replace(plan, probes=many_probes(26)), {}
    if what == "SAE":
        sae = save_sae(tiny_sae(seed=1), folder / "other")
        return replace(plan, load_sae=lambda: load_sae(sae)), {}
    if what == "attribution":
        return replace(plan, attribution=AttributionOptions(engine="off")), {}
    if what == "behaviour section":
        return replace(plan, config={"behaviour": {"readout": "mean"}}), {}
    return replace(plan, reopen_sinks=None), {}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("probes", "probes of the run in .* differ from those here"),
        ("SAE", "the SAE of the run in .* differ from those here"),
        ("attribution", "the engine and functionals and level of the attribution differ"),
        ("behaviour section", "the behaviour section of the configuration of the run"),
    ],
)
def test_another_run_gets_a_store_of_its_own_and_the_log_says_why(
    what: str, words: str, whole: Path, plan: Plan, copy: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(whole)
    other, options = _other(plan, what, folder)
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        train(folder, other, start=4, **options)
    assert re.search("training goes on at step 4, but as a new run with a store of its own: .*" + words, caplog.text)
    assert [window.step for window in RunStore.open(folder / "smda-2").windows()] == [5, 6]
    assert_same_windows(RunStore.open(folder / "smda").windows(), RunStore.open(whole / "smda").windows())


def test_a_store_that_is_gone_or_behind_is_not_gone_on_with(
    whole: Path, plan: Plan, copy: Callable[[Path], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy(whole)
    (folder / "smda" / "steps" / "000000004.safetensors").unlink()
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        train(folder, plan, start=4)
    assert "is not as it was at the checkpoint: last_ok is 3 there and 4 in the checkpoint" in caplog.text
    shutil.rmtree(folder / "smda")
    shutil.rmtree(folder / "smda-2")
    (folder / "checkpoint-3" / NOTE).write_text((whole / "checkpoint-3" / NOTE).read_text())
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        train(folder, plan, start=3)
    assert "smda is no run store" in caplog.text


def test_a_folder_that_was_moved_is_gone_on_with(whole: Path, plan: Plan, tmp_path: Path) -> None:
    """The note names the store from the checkpoint's folder, wherever that is."""
    moved = shutil.copytree(whole, tmp_path / "elsewhere" / "deep")
    trainer_folder = tmp_path / "new output"
    from smda_callbacks.training.callback import MeasuringCallback

    trainer = make_trainer(trainer_folder, MeasuringCallback(plan))
    trainer.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert_same_windows(held(moved).windows(), RunStore.open(whole / "smda").windows())
    assert not list(trainer_folder.glob("smda*"))
    assert json.loads((trainer_folder / "checkpoint-4" / NOTE).read_bytes())["store"] == str(moved / "smda")


# ---------------------------------------------------------------------------------------------------- kill -9


class Trainings:
    """Trainings that go on in one folder, each a process of its own."""

    def __init__(self, folder: Path, steps: int) -> None:
        command = [sys.executable, "-m", "tests.helpers.stopping", str(folder), str(steps)]
        self.log = (folder / "log.txt").open("w")
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, bufsize=1
        )
        while self._line() != "ready":
            pass

    def run(self, moment: Callable[[], None] | None = None) -> int:
        """Train, and kill it when ``moment`` has passed. Returns the exit code: -9 where it was killed."""
        assert self.server.stdin is not None
        self.server.stdin.write("go\n")
        while not (said := self._line()).isdigit():  # the trainer's own prints
            pass
        if moment is not None:
            moment()
            os.kill(int(said), signal.SIGKILL)
        while not (said := self._line()).lstrip("-").isdigit():
            pass
        return int(said)

    def _line(self) -> str:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, Path(self.log.name).read_text()[-3000:]
        return line.strip()

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.log.close()


def _check_killed(folder: Path) -> int:
    """Every store in the folder opens; windows follow on; none of a step with a whole checkpoint is missing."""
    reached = 0
    for path in sorted(folder.glob("smda*")):
        try:
            store = RunStore.open(path)
        except StoreError as error:  # killed while it was being made: no step was measured
            if "half-written" not in str(error) or list_steps(path)[1:]:
                raise
            continue
        steps = [window.step for window in store.windows()]
        assert steps == list(range(store.baseline.step + 1, store.baseline.step + 1 + len(steps)))
        reached = max(reached, *steps, store.baseline.step)
    saved = whole_checkpoints(folder)
    assert reached >= (saved[-1] if saved else 0)
    return reached


def _reached(folder: Path) -> int:
    return max((list_steps(path)[-1] for path in folder.glob("smda*") if list_steps(path)), default=0)


def _kill_loop(folder: Path, kills: int, steps: int) -> list[int]:
    """Kill a training so often, at random moments; let it end; check all. Returns the steps reached at each kill."""
    rng, reached = random.Random(0), []
    trainings = Trainings(folder, steps)

    def moment() -> None:
        """While it starts, or at any point of some step within reach; the machine's speed does not matter."""
        now = _reached(folder)
        target = now + rng.randint(-2, 9)
        if target < now:
            time.sleep(rng.uniform(0.05, 0.8))
        until = time.monotonic() + 60
        while _reached(folder) < target and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.1))

    try:
        for _ in range(kills):
            assert trainings.run(moment) == -signal.SIGKILL
            reached.append(_check_killed(folder))
        assert trainings.run() == 0, (folder / "log.txt").read_text()[-3000:]
    finally:
        trainings.close()
    stores = [path for path in folder.glob("smda*") if (path / "end.json").exists()]
    assert len(stores) == 1
    store = RunStore.open(stores[0])
    assert [check for check in verify(store) if not check.ok] == []
    assert [(window.first_step, window.step) for window in store.windows()] == [(k, k) for k in range(1, steps + 1)]
    return reached


def test_two_kills_leave_no_hole(tmp_path: Path) -> None:
    _kill_loop(tmp_path, kills=2, steps=26)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_four_kills_leave_no_hole(tmp_path: Path) -> None:
    reached = _kill_loop(tmp_path, kills=24, steps=350)
    assert len(set(reached)) > 5
    print(f"steps reached at the kills: {reached}")


def test_the_cadence_of_the_overhead_budget_is_gone_on_with(plan: Plan, tmp_path: Path) -> None:
    """A budget so small that nothing but the first step and the last fits into it, however often training starts."""
    small = replace(plan, overhead_budget=1e-6)
    train(tmp_path, small, max_steps=4)
    note = json.loads((tmp_path / "checkpoint-3" / NOTE).read_bytes())["budget"]
    assert 0 < note["spent"] < note["elapsed"]
    assert len(note["last"]) == 1
    train(tmp_path, small, start=3, max_steps=6)
    assert [(each.first_step, each.step) for each in held(tmp_path).windows()] == [(1, 1), (2, 6)]
    edit = json.loads((tmp_path / "checkpoint-4" / NOTE).read_bytes())
    del edit["budget"]  # as the notes of earlier versions
    (tmp_path / "checkpoint-4" / NOTE).write_text(json.dumps(edit))
    train(tmp_path, small, start=4, max_steps=6)
    assert [(each.first_step, each.step) for each in held(tmp_path).windows()] == [(1, 1), (2, 5), (6, 6)]


# --------------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_of_two_processes_is_gone_on_with_by_two_others(way: str, tmp_path: Path) -> None:
    """Stopped after a checkpoint, killed later than its checkpoint, and stopped inside a window."""
    sae = save_sae(tiny_sae(), tmp_path / "sae")
    for part in ("begin", "go on"):
        done = torchrun("tests.helpers.resuming", sae, tmp_path, way, part, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-4000:]
    whole, pairwise = (held(tmp_path / name).windows() for name in ("whole", "pairwise"))
    assert [window.step for window in whole] == list(range(1, STEPS + 1))
    assert done.stderr.count("going on at step") == 3
    assert list_steps(tmp_path / "stopped" / "smda") == list(range(STEPS + 1))
    for name, expected in (("stopped", whole), ("killed", whole), ("inside", pairwise)):
        assert_same_windows(held(tmp_path / name).windows(), expected)
        assert RunStore.open(tmp_path / name / "smda").end is not None
    assert (tmp_path / "whole" / "checkpoint-3" / "pytorch_model_fsdp.bin").exists() == (way == "fsdp")
