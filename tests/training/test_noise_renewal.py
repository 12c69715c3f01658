"""The noise floor follows the model: when it is measured again, what it is then, and what a failure costs."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from smda_callbacks.observe.noise import measure_noise
from smda_callbacks.observe.reading import NotFiniteError
from smda_callbacks.records import PATHWAYS, NoiseFloor, WindowRecord
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training import noise_renewal
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.noise_renewal import NoiseFloorError, NoiseMeter, is_due
from smda_callbacks.training.plan import Plan
from tests.helpers.equal import assert_same

RATE = 5e-3  # of the trainings


def test_the_floor_in_force_is_never_older_than_half_of_the_run() -> None:
    due = [windows for windows in range(1, 1001) if is_due(windows)]
    assert due == [4, 8, 16, 32, 64, 128, 256, 512]
    for windows in range(4, 1001):
        assert windows - max(each for each in due if each <= windows) < windows / 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``measure_noise`` was asked for; it gives back how often it was."""
    found: list[dict[str, Any]] = []

    def ask(*given: Any, **options: Any) -> Any:
        found.append({**options, "step": given[3].step})
        return replace(floor(), draws=len(found))

    monkeypatch.setattr(noise_renewal, "measure_noise", ask)
    return found


def floor() -> NoiseFloor:
    some = np.ones((2, 1))
    return NoiseFloor(1, RATE, dict.fromkeys(PATHWAYS, some), dict.fromkeys(PATHWAYS, some), some, some)


def meter(plan: Plan) -> Any:
    return NoiseMeter(plan, None, None, None)  # type: ignore[arg-type]


def at(step: int) -> Any:
    return SimpleNamespace(step=step)


def test_no_two_floors_of_a_run_share_a_move(plan: Plan, calls: list[dict[str, Any]]) -> None:
    watch = meter(replace(plan, seed=3))
    start = watch.first(None, at(0), RATE)
    for step in range(1, 41):
        watch.renewed(None, at(step), start)
        watch.windows += 1
    assert [call["step"] for call in calls] == [0, 4, 8, 16, 32]
    assert {call["size"] for call in calls} == {RATE}
    seeds = [seed for call in calls for seed in (call["seed"], call["seed"] + 1)]  # a floor takes two
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == 3


@pytest.mark.parametrize("change", [{"noise_draws": 0}, {"renew_noise": False}], ids=str)
def test_a_plan_without_renewals_has_none(plan: Plan, calls: list[dict[str, Any]], change: dict[str, Any]) -> None:
    watch = meter(replace(plan, **change))
    watch.windows = 3
    assert watch.renewed(None, at(4), floor()) is None
    assert calls == []


def test_functionals_without_a_floor_at_the_start_get_none_later(plan: Plan, calls: list[dict[str, Any]]) -> None:
    """Or sums over the run would hold that of some windows only."""
    watch = NoiseMeter(plan, None, None, lambda before, after: np.zeros(2))  # type: ignore[arg-type]
    watch.windows = 3
    watch.renewed(None, at(4), floor())  # type: ignore[arg-type]
    watch.renewed(None, at(4), replace(floor(), functional_random=np.ones(2), functional_rounding=np.ones(2)))  # type: ignore[arg-type]
    assert [call["measure"] is None for call in calls] == [True, False]


def test_what_had_no_floor_at_the_start_gets_none_later(plan: Plan, calls: list[dict[str, Any]]) -> None:
    watch = meter(plan)
    assert watch.first(None, at(0), 0.0) is None  # a learning rate of zero
    watch.windows = 3
    assert watch.renewed(None, at(4), None) is None
    assert calls == []


class Twin(TrainerCallback):
    """Measures the floor at the model of step 4, as the library says that it did; runs after the callback."""

    def __init__(self, watching: MeasuringCallback) -> None:
        self.watching = watching
        self.found: NoiseFloor | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        monitor = self.watching.monitor
        if state.global_step == 4 and monitor is not None:
            assert monitor.attributor is not None
            self.found = measure_noise(
                monitor.instrument, kwargs["model"], monitor.policy, monitor.snapshot,
                size=RATE, draws=2, seed=8, measure=monitor.attributor.measure, start=monitor.start.noise,
            )  # fmt: skip


def timeless(window: WindowRecord) -> WindowRecord:
    """A window without its floor, alerts (which the floor judges) and wall times."""
    assert window.pairs is not None
    return replace(window, noise=None, alerts=(), seconds=0.0, pairs=replace(window.pairs, seconds=0.0))


def test_the_renewed_floor_is_that_of_the_model_as_it_is_and_nothing_else_changes(
    plan: Plan, sink: MemorySink, trainer: Any
) -> None:
    plan = replace(plan, noise_draws=2, attribution=AttributionOptions(engine="ghost"))
    watching = MeasuringCallback(plan)
    twin = Twin(watching)
    trainer(watching, twin, max_steps=6).train()
    assert [window.noise is not None for window in sink.windows] == [False, False, False, True, False, False]
    found, start = sink.windows[3].noise, sink.start.noise
    assert_same(found, twin.found)
    assert found.update_rms == start.update_rms == RATE
    assert found.functional_random.shape == start.functional_random.shape
    assert not np.allclose(found.behaviour_random, start.behaviour_random, rtol=0.05)  # the model has moved
    once = MemorySink()
    trainer(MeasuringCallback(replace(plan, renew_noise=False, make_sinks=lambda _: [once])), max_steps=6).train()
    assert [window.noise for window in once.windows] == [None] * 6
    for one, other in zip(sink.windows, once.windows, strict=True):
        assert_same(timeless(one), timeless(other))


FAULTS = {"memory": RuntimeError("out of memory"), "nan": NotFiniteError("NaN or inf in the activations")}


def failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floors after the first raise."""
    real, count = measure_noise, [0]

    def broken(*given: Any, **options: Any) -> NoiseFloor:
        count[0] += 1
        if count[0] > 1:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(noise_renewal, "measure_noise", broken)
    monkeypatch.setattr(noise_renewal, "FIRST", 1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_costs_the_renewal_only_and_is_told_once(
    name: str, plan: Plan, sink: MemorySink, trainer: Any,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    failing(FAULTS[name], monkeypatch)
    with caplog.at_level(logging.WARNING, logger="smda_callbacks"):
        trainer(MeasuringCallback(replace(plan, on_error="warn"))).train()
    assert [window.status for window in sink.windows] == ["ok"] * 4
    assert all(window.noise is None and window.pairs is not None for window in sink.windows)
    told = [record.message for record in caplog.records if "the noise floor was not measured again" in record.message]
    assert len(told) == 1
    assert str(FAULTS[name]) in told[0]


@pytest.mark.parametrize(("name", "kind"), [("memory", RuntimeError), ("nan", NoiseFloorError)])
def test_on_error_raise_stops_training_there(
    name: str, kind: type[Exception], plan: Plan, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(FAULTS[name], monkeypatch)
    with pytest.raises(kind, match=str(FAULTS[name])):
        trainer(MeasuringCallback(plan)).train()


def test_its_time_is_the_windows(plan: Plan, sink: MemorySink, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure_noise

    def slow(*given: Any, **options: Any) -> NoiseFloor:
        time.sleep(0.4)
        return real(*given, **options)

    monkeypatch.setattr(noise_renewal, "measure_noise", slow)
    monkeypatch.setattr(noise_renewal, "FIRST", 1)
    trainer(MeasuringCallback(plan), max_steps=1).train()
    assert sink.windows[0].noise is not None
    assert sink.windows[0].seconds > 0.4
    assert sink.end.seconds == pytest.approx(sum(window.seconds for window in sink.windows))
