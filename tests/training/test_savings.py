"""A whole run with savings books what the run without them books, and lets go of what it kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smda_callbacks.observe.savings import SavingOptions
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan

TOP = {"lora": {"layers_to_transform": [1, 2], "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}}


@pytest.mark.parametrize("engine", ["ghost", "exact"])
def test_a_run_with_savings_is_the_run_without(engine: Any, plan: Plan, trainer: Any) -> None:
    runs: list[MemorySink] = []
    for savings in (SavingOptions(0, False, False), SavingOptions(1.0, False, False), SavingOptions()):
        sink = MemorySink()
        callback = MeasuringCallback(
            replace(
                plan,
                savings=savings,
                system="Be kind, and say it in a few short words.",
                attribution=AttributionOptions(engine=engine),
                make_sinks=lambda _, sink=sink: [sink],  # type: ignore[misc]
            )
        )
        trainer(callback, **TOP).train()
        runs.append(sink)
    assert [window.status for window in runs[0].windows] == ["ok"] * 4
    moved = max(np.abs(window.shift["shift_y"]).max() for window in runs[0].windows)
    for sink, tolerance in zip(runs[1:], (0.0, 0.01), strict=True):
        for one, other in zip(runs[0].windows, sink.windows, strict=True):
            assert np.abs(one.snapshot.y - other.snapshot.y).max() <= tolerance * 1e-3
            assert np.abs(one.shift["shift_y"] - other.shift["shift_y"]).max() <= tolerance * moved
            share, saved = (np.asarray(each.pairs.share) for each in (one, other))
            assert np.abs(share).max() > 0
            assert np.abs(share - saved).max() <= max(tolerance, 1e-5) * np.abs(share).max()
