"""The headline: training with the callback is, bit for bit, the training without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.trajectory import TrajectoryFolder
from smda_callbacks.training import noise_renewal
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.trajectory_options import TrajectoryOptions
from tests.helpers.tiny import tiny_model
from tests.training.conftest import CHECKPOINTING

MATRIX: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora": {"lora_dropout": 0.3}},
    "accumulation": {"gradient_accumulation_steps": 4, "lora": {"lora_dropout": 0.1}},
    "checkpointing": {CHECKPOINTING: True, "lora": {"lora_dropout": 0.1}},
    "bf16 autocast": {"bf16": True},
    "packing": {"packing": True, "max_length": 64},
    "padding free": {"padding_free": True, "max_length": None},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 1},
    "group by length": {"train_sampling_strategy": "group_by_length"},
    "tight clipping": {"max_grad_norm": 0.01},
    "adapters on the top layers": {
        "lora": {"lora_dropout": 0.3, "layers_to_transform": [2], "target_modules": ["q_proj", "v_proj", "down_proj"]},
    },
    # Training sequences are longer than the context, probes shorter: a probe would reset the rotary frequencies.
    "dynamic rope": {
        "model": {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 30,
        },
    },
}


class Recorder(TrainerCallback):
    """What a user sees of the training: the optimizer's state at every step and the logs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        moments = [value.clone() for s in optimizer.state.values() for value in s.values() if torch.is_tensor(value)]
        weights = [p.detach().clone() for p in kwargs["model"].parameters() if p.requires_grad]
        self.steps.append({str(k): tensor for k, tensor in enumerate([*weights, *moments])})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
        timing |= {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
        self.logs.append({k: v for k, v in kwargs["logs"].items() if k not in timing})


def run(make: Callable[..., Any], case: dict[str, Any], callbacks: list[TrainerCallback]) -> Recorder:
    options = dict(case)
    overrides = options.pop("model", None)
    recorder = Recorder()
    trainer = make(*callbacks, recorder, model=tiny_model(**overrides) if overrides else None, **options)
    trainer.train()
    return recorder


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("engine", ["ghost", "exact"])
def test_weights_optimizer_state_and_logs_are_identical(
    engine: Any, name: str, plan: Plan, sink: MemorySink, trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_renewal, "FIRST", 1)  # the noise floor is measured again after windows 1, 2 and 4
    case = MATRIX[name]
    without = run(trainer, case, [])
    watched = run(trainer, case, [MeasuringCallback(replace(plan, attribution=AttributionOptions(engine=engine)))])
    assert [window.status for window in sink.windows] == ["ok"] * 4
    assert all(window.pairs is not None and window.pairs.engine == engine for window in sink.windows)
    assert [window.step for window in sink.windows if window.noise is not None] == [1, 2, 4]
    assert len(without.steps) == len(watched.steps) == 4
    for a, b in zip(without.steps, watched.steps, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert without.logs == watched.logs


@pytest.mark.parametrize("name", ["accumulation", pytest.param("checkpointing", marks=pytest.mark.slow)])
def test_training_is_identical_where_its_steps_are_kept(name: str, plan: Plan, tmp_path: Path, trainer: Any) -> None:
    kept = replace(
        plan, trajectory=TrajectoryOptions(keep=True), make_sinks=lambda _: [StoreSink(tmp_path / "run")], every=4
    )
    without = run(trainer, MATRIX[name], [])
    watched = run(trainer, MATRIX[name], [MeasuringCallback(kept)])
    assert TrajectoryFolder.open(tmp_path / "run").states == (0, 1, 2, 3, 4)
    for a, b in zip(without.steps, watched.steps, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert without.logs == watched.logs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_is_identical(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    case = {"torch_compile": True, "lora": {"lora_dropout": 0.1}}
    without = run(trainer, case, [])
    watched = run(trainer, case, [MeasuringCallback(plan)])
    assert [window.status for window in sink.windows] == ["ok"] * 4
    for a, b in zip(without.steps, watched.steps, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert without.logs == watched.logs


def test_the_comparison_can_fail(trainer: Any) -> None:
    """A callback that merely draws one random number is caught."""

    class Careless(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.rand(1)

    first = run(trainer, MATRIX["dropout"], [])
    second = run(trainer, MATRIX["dropout"], [Careless()])
    assert any(not torch.equal(a["0"], b["0"]) for a, b in zip(first.steps, second.steps, strict=True))
