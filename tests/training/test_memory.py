"""Watching a long run takes no more memory at its end than at its beginning."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from smda_callbacks.records import Alert, RunEnd, RunStart, WindowRecord
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.plan import Plan

STEPS, EVERY = 2000, 10


class Counting:
    """A sink that keeps nothing but a number."""

    def __init__(self) -> None:
        self.windows = self.attributed = 0

    def open(self, start: RunStart) -> None: ...

    def write(self, window: WindowRecord) -> None:
        self.windows += 1
        self.attributed += window.pairs is not None

    def alert(self, alert: Alert) -> None: ...

    def close(self, end: RunEnd) -> None: ...


class Meter(TrainerCallback):
    """Bytes that Python and numpy hold, and that this process has in memory, every hundred steps."""

    def __init__(self) -> None:
        self.traced: list[int] = []
        self.resident: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history.clear()  # the trainer's own, which grows with every log
        if state.global_step % 100 == 0:
            gc.collect()
            self.traced.append(tracemalloc.get_traced_memory()[0])
            with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
                self.resident.append(int(file.read().split()[1]) * 4096)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_over_two_thousand_steps(plan: Plan, trainer: Any) -> None:
    sink, meter = Counting(), Meter()
    plan = replace(plan, make_sinks=lambda _: [sink], every=EVERY)
    run = trainer(MeasuringCallback(plan), meter, max_steps=STEPS, per_device_train_batch_size=1, logging_steps=STEPS)
    tracemalloc.start()
    try:
        run.train()
    finally:
        tracemalloc.stop()
    assert (sink.windows, sink.attributed) == (STEPS // EVERY, STEPS // EVERY)
    settled = slice(5, None)  # every pair was seen, momentum is followed as far as it ever is
    for name, values, limit in (("traced", meter.traced, 200), ("resident", meter.resident, 20_000)):
        hundreds = np.arange(len(values))[settled]
        slope = np.polyfit(hundreds, np.array(values[settled], dtype=float), 1)[0] / 100
        assert slope < limit, f"{name} memory grows by {slope:.0f} bytes per step"
