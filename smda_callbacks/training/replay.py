"""Going through a recorded run again: the trainer's own step, from a recorded state, on the recorded inputs."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.observe.example_losses import example_losses
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.metagradient import TrajectoryStep
from smda_callbacks.observe.sequences import IGNORED
from smda_callbacks.sinks.trajectory import TrajectoryError, TrajectoryFolder
from smda_callbacks.training.borrowed import Borrowed
from smda_callbacks.training.rebuild import rebuild_trainer
from smda_callbacks.training.trajectory_read import (
    MicroBatch,
    RecordedStep,
    RunState,
    read_state,
    read_step,
    rules_at,
    state_of,
)
from smda_callbacks.training.trajectory_state import state_tensors


@dataclass(frozen=True)
class Share:
    """A micro-batch, and what its summed loss is divided by."""

    batch: MicroBatch
    denominator: float


class Replay:
    """A recorded run's trainer, made again; it can be put into any recorded state and make any recorded step.

    Args:
        model: the base model, or where it lies, where that is not what the run recorded.
        device: the recorded one if None.

    Raises:
        TrajectoryError: the trainer cannot be made again; says why.
    """

    def __init__(
        self, folder: TrajectoryFolder, *, model: str | Path | nn.Module | None = None, device: str | None = None
    ) -> None:
        self.folder, self.meta = folder, folder.meta
        self.device = torch.device(device or self.meta["device"])
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise TrajectoryError("the run was trained on a GPU and there is none here. Next step: go where one is.")
        self._output = tempfile.TemporaryDirectory(prefix="smda-replay-")
        self._lent = Borrowed(model) if isinstance(model, nn.Module) else None
        try:
            self._rebuild(model)
        except BaseException:
            self.close()
            raise

    def _rebuild(self, model: str | Path | nn.Module | None) -> None:
        folder = self.folder
        first = read_step(folder.path, folder.first + 1)
        start = read_state(folder.path, folder.first)
        self.trainer = rebuild_trainer(folder, model, str(self.device), first, Path(self._output.name))
        self.model: Any = self.trainer.model_wrapped
        self.sites = lora_sites(self.model)
        names = [site.name for site in self.sites]
        if names != list(self.meta["weights"]):
            raise TrajectoryError(
                f"the adapter trains other weights than the run's: {len(names)} here, {len(self.meta['weights'])} "
                "then, or of other names. Next step: go where PEFT and transformers are of the run's versions "
                f"({self.meta['versions'].get('peft')} and {self.meta['versions'].get('transformers')})."
            )
        for site, weight in zip(self.sites, start.weights, strict=True):
            site.weight.data = site.weight.data.to(weight.dtype)
        self.parameters = [site.weight for site in self.sites]

    def close(self) -> None:
        """Remove the trainer's folder, and give a model that was lent back as it was."""
        self._output.cleanup()
        if self._lent is not None:
            self._lent.give_back()

    def place(self, state: RunState) -> None:
        """Put weights and optimizer into a state."""
        optimizer = self._optimizer
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, state.weights, strict=True):
                parameter.copy_(weight)
        order = {id(parameter): k for k, parameter in enumerate(self.parameters)}
        given = [order[id(p)] for group in optimizer.param_groups for p in group["params"]]
        groups = optimizer.state_dict()["param_groups"]
        # Cloned: the optimizer takes tensors over as they are, and its step would change the state.
        slots = {
            place: {name: each.clone() for name, each in state.slots[k].items()}
            for place, k in enumerate(given)
            if state.slots[k]
        }
        optimizer.load_state_dict({"state": slots, "param_groups": groups})

    def step(self, state: RunState, recorded: RecordedStep) -> tuple[RunState, tuple[Tensor, ...]]:
        """The trainer's own step from ``state``: the state after it, and the gradient before clipping, per weight."""
        self.place(state)
        for group, settings in zip(self._optimizer.param_groups, recorded.groups, strict=True):
            group.update({name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})
        trainer, model = self.trainer, self.model
        trainer.current_gradient_accumulation_steps = len(recorded.batches)
        model.zero_grad()
        inputs = [self._inputs(batch) for batch in recorded.batches]
        items = trainer._get_num_items_in_batch(inputs, self.device)
        for batch, given in zip(recorded.batches, inputs, strict=True):
            self._set_random(batch)
            trainer.training_step(model, given, items)
        gradient = tuple(_gradient(parameter) for parameter in self.parameters)
        if self.max_norm > 0:
            trainer.accelerator.clip_grad_norm_(model.parameters(), self.max_norm)
        trainer.optimizer.step()
        after = self._state(recorded.number)
        model.zero_grad()
        return after, gradient

    @property
    def max_norm(self) -> float:
        """What gradients are clipped to; 0: not at all."""
        return float(self.meta["max_grad_norm"])

    def shares(self, recorded: RecordedStep) -> tuple[Share, ...]:
        """The micro-batches of a step with the denominators that its trainer divides by."""
        inputs = [self._inputs(batch) for batch in recorded.batches]
        items = self.trainer._get_num_items_in_batch(inputs, self.device)
        own = [int((each["labels"][..., 1:] != IGNORED).sum()) for each in inputs]
        counts = [float(items)] * len(own) if items is not None else [float(n * len(own)) for n in own]
        return tuple(Share(batch, max(n, 1.0)) for batch, n in zip(recorded.batches, counts, strict=True))

    def losses(self, share: Share) -> Tensor:
        """The plain losses of the examples, with the masks of dropout that training had, ``[example]``."""
        self._set_random(share.batch)
        self.model.train()
        return example_losses(self.model, self._inputs(share.batch), share.batch.examples, share.denominator)

    def walk(self, first: int, last: int) -> Iterator[tuple[RunState, RecordedStep]]:
        """Steps ``first`` + 1 to ``last``, each with the state that it starts from; ``first`` is a recorded state."""
        state = read_state(self.folder.path, first)
        for number in range(first + 1, last + 1):
            recorded = read_step(self.folder.path, number)
            yield state, recorded
            if number < last:
                state, _ = self.step(state, recorded)

    def trajectory_step(self, state: RunState, recorded: RecordedStep) -> TrajectoryStep:
        """A step for :func:`~smda_callbacks.observe.metagradient.influence`."""
        moments = tuple(_on(self.device, each) for each in state.moments())
        rules = rules_at(self.meta, state, recorded)
        return TrajectoryStep(recorded.number, moments, rules, self.max_norm, self.shares(recorded))

    @property
    def _optimizer(self) -> Any:
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)

    def _inputs(self, batch: MicroBatch) -> dict[str, Any]:
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.inputs.items()}

    def _set_random(self, batch: MicroBatch) -> None:
        torch.set_rng_state(batch.random["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(batch.random["cuda"])

    def _state(self, step: int) -> RunState:
        tensors = {
            name: each.detach().cpu().clone() for name, each in state_tensors(self.sites, self._optimizer).items()
        }
        return state_of(step, tensors)


@contextlib.contextmanager
def as_trained(folder: TrajectoryFolder) -> Iterator[None]:
    """Context with as many threads as the run had, which bits depend on; random state comes back at the end."""
    threads, plain, arrays = torch.get_num_threads(), random.getstate(), np.random.get_state()
    torch.set_num_threads(int(folder.meta["threads"]))
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        random.setstate(plain)
        np.random.set_state(arrays)


def _gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().flatten().clone()


def _on(device: torch.device, moments: Any) -> Any:
    tensors = (moments.weight, moments.first, moments.second)
    return type(moments)(*(None if each is None else each.to(device) for each in tensors))
