"""Trainings that break off in mid-step, and hooks that fail: model and training stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.records import LINES
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.monitor import Monitor
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.row_identity import training_runs
from tests.training.conftest import CHECKPOINTING

Make = Callable[..., Any]


class Broken(RuntimeError):
    """The training broke off on purpose."""


def hooks(model: nn.Module) -> int:
    """How many hooks of this library there are on the model and its parts."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    found = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return sum(getattr(hook, "func", hook).__module__.startswith("smda_callbacks") for hook in found)


def break_off(run: Any, step: int) -> PairCapture:
    """Let a training raise in a step, between its forward and its backward pass; returns its capture."""
    real, calls, found = run.compute_loss, list[int](), list[PairCapture]()

    def loss(*given: Any, **options: Any) -> Any:
        value = real(*given, **options)
        calls.append(1)
        if len(calls) == step:
            callback = next(each for each in run.callback_handler.callbacks if isinstance(each, MeasuringCallback))
            found.append(callback.monitor.attributor._capture)  # type: ignore[union-attr]
            raise Broken
        return value

    run.compute_loss = loss
    with pytest.raises(Broken):
        run.train()
    run.compute_loss = real
    return found[0]


def watched(plan: Plan) -> MeasuringCallback:
    return MeasuringCallback(replace(plan, attribution=AttributionOptions(engine="ghost")))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_next_forward_pass_after_a_broken_training_takes_all_hooks_off(
    checkpointing: bool, plan: Plan, trainer: Make
) -> None:
    run = trainer(watched(plan), **{CHECKPOINTING: checkpointing})
    capture = break_off(run, 2)
    assert hooks(run.model) > 2
    assert capture._examples
    run.model.train()
    ids = torch.tensor([[1, 7, 8, 9]])
    run.model(input_ids=ids, labels=ids).loss.backward()
    assert hooks(run.model) == 0
    assert not capture._examples
    assert not any(capture._parts)


def test_another_training_of_the_model_is_not_looked_at(plan: Plan, trainer: Make) -> None:
    first = trainer(watched(plan))
    capture = break_off(first, 2)
    second = trainer(model=first.model, peft=False)
    second.train()
    assert hooks(first.model) == 0
    assert not capture._examples


def test_between_steps_nothing_is_captured(plan: Plan, trainer: Make) -> None:
    callback = watched(plan)
    run = trainer(callback)
    real, seen = callback.on_step_end, list[int]()

    def on_step_end(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(args, state, control, **kwargs)
        assert callback.monitor is not None
        assert callback.monitor.attributor is not None
        capture = callback.monitor.attributor._capture
        known = len(capture._examples)
        ids = torch.tensor([[1, 7, 8, 9]])
        torch.autograd.grad(kwargs["model"](input_ids=ids).logits.sum(), capture.sites[0].weight)
        assert len(capture._examples) == known
        seen.append(state.global_step)

    callback.on_step_end = on_step_end  # type: ignore[method-assign]
    run.train()
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["_with_prompt", "_keep_prompts"])
def test_a_hook_that_fails_costs_the_window_s_pairs_and_not_the_training(
    where: str, plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("broken hook")

    monkeypatch.setattr(PairCapture, where, fail)
    trainer(MeasuringCallback(replace(watched(plan).plan, on_error="warn")), max_steps=2).train()
    assert [window.status for window in sink.windows] == ["ok", "ok"]
    assert [window.pairs for window in sink.windows] == [None, None]


def test_whether_a_training_runs_is_told_by_the_stack_of_its_own_thread(plan: Plan, trainer: Make) -> None:
    found: list[Callable[[], bool]] = []
    elsewhere: list[bool] = []
    run = trainer(max_steps=1)
    real = run.compute_loss

    def loss(*given: Any, **options: Any) -> Any:
        found.append(training_runs())
        assert found[0]()
        return real(*given, **options)

    run.compute_loss = loss
    run.train()
    assert not found[0]()
    thread = threading.Thread(target=lambda: elsewhere.append(found[0]()))
    thread.start()
    thread.join()
    assert elsewhere == [True]
    assert training_runs()()  # outside of a training there is none that could break off


def test_pairs_of_a_window_that_fails_are_booked_once_by_the_next(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else fails in a window fails before its pairs are booked."""
    real, calls = Monitor._health, list[int]()

    def health(monitor: Monitor, reading: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return real(monitor, reading)

    monkeypatch.setattr(Monitor, "_health", health)
    trainer(MeasuringCallback(replace(watched(plan).plan, on_error="warn")), max_steps=3).train()
    assert [window.status for window in sink.windows] == ["ok", "failed", "ok"]
    first, _, last = sink.windows
    assert first.pairs is not None
    assert last.pairs is not None
    assert len(last.pairs.ids) == 2 * len(first.pairs.ids)
    assert {pair.id for pair in last.pairs_seen} == set(last.pairs.ids.tolist())
    assert set(last.pairs.later_ids.tolist()) <= {*first.pairs.ids.tolist(), *last.pairs.ids.tolist()}
    share = last.pairs.share.sum(axis=0) + last.pairs.later_share.sum(axis=0)
    total = share + sum(last.pairs.lines[name] for name in LINES)
    np.testing.assert_allclose(total, last.pairs.lines["measured"], atol=1e-12)
