"""Recorded runs of the tiny model, and the same trainings without a pair, made for real."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.instrument import arrays
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.observe.sequences import split_batch
from smda_callbacks.records import RunStart
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.rescore_targets import resolve
from smda_callbacks.training.trajectory_options import TrajectoryOptions
from tests.helpers.pair_training import CHECKPOINTING, user_data
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

STEPS = 6


class Weighted(SFTTrainer):  # type: ignore[misc]
    """The training in which the examples with some key weigh ``1 + more``; all else, denominators too, as it was."""

    key: bytes | None = None
    more = 0.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        examples = split_batch(inputs)
        random, given = torch.get_rng_state(), dict(inputs)
        before = self._gradients()
        loss = super().training_step(model, inputs, num_items_in_batch)
        mine = [each for each in examples if each.key == self.key]
        if mine and self.more:
            after, end = self._gradients(), torch.get_rng_state()
            labels = given["labels"].clone()
            given["labels"] = torch.full_like(labels, -100)
            for each in mine:
                place = (each.row, slice(each.start, each.stop))
                given["labels"][place] = labels[place]
            self._put([torch.zeros_like(each) for each in before])
            torch.set_rng_state(random)
            super().training_step(model, given, num_items_in_batch)
            own = self._gradients()
            self._put([a + self.more * b for a, b in zip(after, own, strict=True)])
            torch.set_rng_state(end)
        return loss

    def _gradients(self) -> list[torch.Tensor]:
        return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in _parameters(self)]

    def _put(self, gradients: list[torch.Tensor]) -> None:
        for each, gradient in zip(_parameters(self), gradients, strict=True):
            each.grad = gradient


def make_trainer(
    folder: Path, *callbacks: TrainerCallback, kind: type[Any] = SFTTrainer, lora: Any = None, model: Any = None,
    adapter: str | None = None, **options: Any,
) -> Any:  # fmt: skip
    """A trainer on a small model, with fewer pairs than steps want. ``adapter``: its name, where the user made it."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "adam_epsilon": 1e-6, "bf16": False, CHECKPOINTING: False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_length": 64, "logging_steps": 100,
        "weight_decay": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    model = model or base_model()
    wanted = LoraConfig(
        **{"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2, "task_type": "CAUSAL_LM", **(lora or {})}
    )
    return kind(
        model=model if adapter is None else get_peft_model(model, wanted, adapter_name=adapter),
        args=SFTConfig(**{**settings, **options}),
        train_dataset=Dataset.from_list(user_data("text", 8).to_list()),
        processing_class=tiny_tokenizer(),
        peft_config=wanted if adapter is None else None,
        callbacks=list(callbacks),
    )


def base_model() -> Any:
    """The model without its adapter."""
    return tiny_model(num_hidden_layers=2)


@dataclass(frozen=True)
class Recorded:
    """A recorded run, its plan, and the trainer's end."""

    run: Path
    plan: Plan
    folder: Path
    options: dict[str, Any]
    weights: list[torch.Tensor]

    @property
    def start(self) -> RunStart:
        return RunStore.open(self.run).start

    def weights_with(self, key: bytes | None, more: float) -> list[torch.Tensor]:
        """The trained weights after the same training in which the examples of this key weigh ``1 + more``."""
        trainer = make_trainer(self.folder / "again", kind=Weighted, **self.options)
        trainer.key, trainer.more = key, more
        trainer.train()
        return trained(trainer)

    def values(self, ends: list[list[torch.Tensor]], targets: tuple[str, ...]) -> np.ndarray:
        """The targets' measured change from the start of the run to each of these weights, ``[end, target]``."""
        trainer = make_trainer(self.folder / "read", **self.options)
        start = self.start
        instrument = self.plan.instrument(trainer.model, tiny_tokenizer(), self.plan.load_sae())
        instrument = instrument.of_features(start.policy.features)
        chosen = resolve(targets, instrument, start.policy)
        first = start.baseline.snapshot
        assert first is not None
        found = []
        for weights in ends:
            with torch.no_grad():
                for parameter, weight in zip(_parameters(trainer), weights, strict=True):
                    parameter.copy_(weight)
            reading = instrument.read(trainer.model)
            after = State(*arrays(reading), instrument.scores(reading))
            found.append(chosen.measured(State(first.pre, first.gate, first.y), after, start.policy))
        return np.array(found)


def record(
    folder: Path, sae: Path, *callbacks: TrainerCallback, keep: dict[str, Any] | None = None, **options: Any
) -> Recorded:
    """Train once, recording. ``callbacks``: called before the one that records."""
    plan = Plan(
        probes=many_probes(16), load_sae=lambda: load_sae(sae),
        distil=DistilOptions(support=4, min_active=3, cv_folds=0, lam=1.0), noise_draws=0, every=100,
        make_sinks=lambda _: [StoreSink(folder / "run")], on_error="raise",
        attribution=AttributionOptions(engine="off"), trajectory=TrajectoryOptions(keep=True, **(keep or {})),
    )  # fmt: skip
    trainer = make_trainer(folder, *callbacks, MeasuringCallback(plan), **options)
    trainer.train()
    return Recorded(folder / "run", plan, folder, options, trained(trainer))


def trained(trainer: Any) -> list[torch.Tensor]:
    """Copies of the trained weights."""
    return [parameter.detach().clone() for parameter in _parameters(trainer)]


def _parameters(trainer: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def sae_in(folder: Path) -> Path:
    """An SAE for the model."""
    return save_sae(tiny_sae("standard", hook_name="blocks.0.hook_resid_post"), folder / "tiny-sae")


__all__ = ["Recorded", "base_model", "make_trainer", "record", "replace", "sae_in", "trained"]
