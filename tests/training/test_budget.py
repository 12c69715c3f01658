"""The cadence that a budget chooses, on a clock of our own and in a real run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.budget import Budget
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.plan import Plan


class Clock:
    """Moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def simulate(share: float | None, every: int, *, step: float, cost: float, steps: int) -> tuple[list[int], Budget]:
    """Steps at which a run measured, where a training step takes ``step`` and a measurement ``cost`` seconds."""
    clock = Clock()
    budget, measured, last = Budget(every, share, clock), [], 0
    budget.begin()
    for number in range(1, steps + 1):
        clock.now += step
        if budget.is_due(number - last):
            clock.now += cost
            budget.note(cost)
            measured.append(number)
            last = number
    return measured, budget


def test_without_a_share_the_cadence_is_every() -> None:
    assert simulate(None, 3, step=1.0, cost=100.0, steps=10)[0] == [3, 6, 9]


def test_a_share_that_is_never_reached_changes_nothing() -> None:
    assert simulate(0.5, 2, step=1.0, cost=0.5, steps=8)[0] == [2, 4, 6, 8]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("cost", [0.2, 3.0])
def test_the_share_is_kept_and_used(share: float, cost: float) -> None:
    measured, budget = simulate(share, 1, step=1.0, cost=cost, steps=2000)
    assert budget.taken is not None
    # The first measurement is made whatever it costs: only then its price is known.
    assert budget.taken <= share + 1e-9
    assert budget.taken > 0.8 * min(share, cost / (1 + cost))
    assert measured[0] == 1


def test_costs_that_grow_are_followed() -> None:
    clock = Clock()
    budget = Budget(1, 0.1, clock)
    budget.begin()
    gaps, last = [], 0
    for number in range(1, 3001):
        clock.now += 1.0
        if budget.is_due(number - last):
            cost = 0.1 if number < 1500 else 1.0
            clock.now += cost
            budget.note(cost)
            gaps.append((number, number - last))
            last = number
    assert max(gap for number, gap in gaps if 100 < number < 1500) <= 2
    assert 8 <= max(gap for number, gap in gaps if number > 2000) <= 12


def test_a_budget_that_goes_on_is_one_that_never_stopped() -> None:
    whole, clock = Budget(1, 0.1, Clock()), Clock()
    whole.clock = clock
    whole.begin()
    clock.now = 10.0
    whole.note(1.5)
    later = Clock()
    later.now = 500.0  # another process's clock
    after = Budget(1, 0.1, later)
    after.go_on(json.loads(json.dumps(whole.state())))
    after.begin()
    for seconds in (1.0, 4.0, 20.0, 21.0, 30.0):
        clock.now, later.now = 10.0 + seconds, 500.0 + seconds
        assert after.taken == whole.taken
        assert after.is_due(1) == whole.is_due(1)
    assert whole.is_due(1)
    fresh = Budget(1, 0.1, later)
    fresh.go_on({})
    fresh.begin()
    assert fresh.taken == 0.0


def test_a_run_keeps_its_budget_and_books_every_step(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    """A budget so small that only the first step and the last are measured: the last window spans what is between."""
    trainer(MeasuringCallback(replace(plan, overhead_budget=1e-6)), max_steps=5).train()
    assert [(window.first_step, window.step) for window in sink.windows] == [(1, 1), (2, 5)]
    assert sink.windows[-1].pairs is not None
