"""Reading back what :mod:`smda_callbacks.training.trajectory` recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smda_callbacks.observe.optimizer_rules import AdamWRule, Moments, Rule, SGDRule
from smda_callbacks.observe.sequences import Sequence, split_batch
from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.sinks.files import damaged, missing
from smda_callbacks.training.trajectory_state import COUNT, MOMENTS, WEIGHT


@dataclass(frozen=True)
class RunState:
    """Trained weights and the optimizer's state after ``step`` steps; per weight, in its shape.

    ``slots``: what the optimizer keeps of a weight, by its own names, the number of steps (``step``) among it.
    """

    step: int
    weights: tuple[Tensor, ...]
    slots: tuple[Mapping[str, Tensor], ...]

    def moments(self) -> tuple[Moments, ...]:
        """The same for :mod:`smda_callbacks.observe.metagradient`."""
        return tuple(
            Moments(weight, own.get("exp_avg", own.get("momentum_buffer")), own.get("exp_avg_sq"))
            for weight, own in zip(self.weights, self.slots, strict=True)
        )


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of training got. ``random``: random state before it, by device. ``pairs``: per example."""

    inputs: Mapping[str, Any]
    random: Mapping[str, Tensor]
    pairs: tuple[int, ...]
    examples: tuple[Sequence, ...]


@dataclass(frozen=True)
class RecordedStep:
    """What one optimizer step was made of. ``groups``: settings of the optimizer's groups. ``seconds``: it took."""

    number: int
    batches: tuple[MicroBatch, ...]
    groups: tuple[Mapping[str, Any], ...]
    seconds: float

    @property
    def pairs(self) -> tuple[int, ...]:
        """Numbers of the pairs, example by example."""
        return tuple(pair for batch in self.batches for pair in batch.pairs)


def read_state(folder: Path, step: int) -> RunState:
    """The recorded state after ``step`` steps. Raises StoreError if the file is missing or damaged."""
    tensors, _ = _read(layout.state_file(folder, step))
    return state_of(step, tensors)


def state_of(step: int, tensors: Mapping[str, Tensor]) -> RunState:
    """The state behind the tensors of :func:`~smda_callbacks.training.trajectory.state_tensors`."""
    count = sum(name.startswith(f"{WEIGHT}/") for name in tensors)
    slots = tuple(
        {name: tensors[f"{name}/{k}"] for name in (*MOMENTS, COUNT) if f"{name}/{k}" in tensors} for k in range(count)
    )
    return RunState(step, tuple(tensors[f"{WEIGHT}/{k}"] for k in range(count)), slots)


def read_step(folder: Path, number: int) -> RecordedStep:
    """What step ``number`` was made of. Raises StoreError if the file is missing or damaged."""
    path = layout.step_file(folder, number)
    tensors, text = _read(path)
    try:
        found = json.loads(text["step"])
        batches = tuple(_batch(k, each, tensors) for k, each in enumerate(found["batches"]))
        return RecordedStep(number, batches, tuple(found["groups"]), float(found["seconds"]))
    except (KeyError, ValueError, TypeError) as error:
        raise damaged(path, error) from error


def read_pairs(folder: Path, number: int) -> tuple[tuple[int, ...], float]:
    """The pairs of step ``number``, example by example, and the seconds that it took; tensors are not read."""
    path = layout.step_file(folder, number)
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["step"])
        return tuple(pair for each in found["batches"] for pair in each["pairs"]), float(found["seconds"])
    except FileNotFoundError as error:
        raise missing(path) from error
    except (SafetensorError, KeyError, ValueError) as error:
        raise damaged(path, error) from error


def rules_at(meta: Mapping[str, Any], state: RunState, step: RecordedStep) -> tuple[Rule, ...]:
    """The optimizer's arithmetic in the step that starts at ``state``, per weight."""
    return tuple(
        _rule(meta["optimizer"], step.groups[group], own)
        for group, own in zip(meta["groups"], state.slots, strict=True)
    )


def _rule(optimizer: str, group: Mapping[str, Any], own: Mapping[str, Tensor]) -> Rule:
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if optimizer == "SGD":
        return SGDRule(lr, decay, float(group["momentum"]))
    count = int(own[COUNT]) if COUNT in own else 0
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return AdamWRule(lr, decay, beta1, beta2, float(group["eps"]), count + 1)


def _batch(number: int, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MicroBatch:
    prefix, random = f"{number}/", f"{number}.random/"
    inputs = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    state = {name.removeprefix(random): each for name, each in tensors.items() if name.startswith(random)}
    given = {**inputs, **entry["plain"]}
    return MicroBatch(given, state, tuple(entry["pairs"]), tuple(split_batch(given)))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise missing(path) from error
    except SafetensorError as error:
        raise damaged(path, error) from error


def same(first: RunState, second: RunState) -> bool:
    """Whether two states are equal bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(first.weights, second.weights, strict=True)) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first.slots, second.slots, strict=True)
    )
