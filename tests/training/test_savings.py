"""A whole run with savings books what the run without them books, and lets go of what it kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from smda_callbacks.observe.savings import SavingOptions
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.ghost import Ghost
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


def test_what_is_kept_gives_way_to_gradients(plan: Plan, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second window's end has memory for gradients only if no more than half of what was kept is."""
    sink, read, kept = MemorySink(), Ghost.read, list[int]()

    def reading(self: Ghost, model: Any) -> Any:
        kept.append(self._read.args[0].savings.lower.bytes)  # type: ignore[attr-defined]
        if len(kept) >= 3 and kept[-1] > kept[2] / 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(self, model)

    monkeypatch.setattr(Ghost, "read", reading)
    attribution = AttributionOptions(engine="ghost")
    given = replace(plan, attribution=attribution, make_sinks=lambda _: [sink], on_error="warn")
    trainer(MeasuringCallback(given), **TOP).train()
    assert kept[2] > 0
    assert all(each <= kept[2] / 2 for each in kept[3:])
    assert [window.status for window in sink.windows] == ["ok"] * 4
    assert [window.pairs is not None for window in sink.windows] == [True, False, True, True]
