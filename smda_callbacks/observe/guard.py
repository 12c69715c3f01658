"""Leave no trace: everything that a measurement touches is put back, bit for bit, whatever happens inside."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

_Plain = (bool, int, float, torch.Tensor)


@contextlib.contextmanager
def measuring(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Context in which ``model`` may be read: eval mode, no gradients, and all state restored on leaving.

    ``gradients``: record a graph; whoever asks takes gradients with ``torch.autograd.grad``, which leaves ``.grad`` be.

    Restored: the train/eval flag of every module (not one flag for all: after an evaluation the Trainer leaves
    modules in eval mode on purpose), Python's, numpy's and torch's random state on CPU and CUDA, gradient mode, and
    the buffers and plain attributes of every module. The last matters for dynamic-NTK rotary embeddings, whose
    ``inv_freq`` depends on the lengths seen before: a short probe would change the training that follows.
    """
    modules = list(model.modules())
    flags = [(module, module.training) for module in modules]
    state = _module_state(modules)
    rng = _rng_state()
    for module, _ in flags:
        module.training = False
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, training in flags:
            module.training = training
        _restore_modules(state)
        _restore_rng(rng)


@contextlib.contextmanager
def weights_restored(parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Context in which the values of ``parameters`` may be overwritten; they come back bit for bit."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
    }


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])


def _module_state(
    modules: Sequence[nn.Module],
) -> list[tuple[nn.Module, dict[str, Any], dict[str, tuple[torch.Tensor, Any]]]]:
    saved = []
    for module in modules:
        plain = {
            name: value.clone() if torch.is_tensor(value) else value
            for name, value in vars(module).items()
            if isinstance(value, _Plain) and not name.startswith("_") and name != "training"
        }
        buffers = {name: (b, b.clone()) for name, b in module._buffers.items() if b is not None}
        if plain or buffers:
            saved.append((module, plain, buffers))
    return saved


def _restore_modules(saved: list[tuple[nn.Module, dict[str, Any], dict[str, tuple[torch.Tensor, Any]]]]) -> None:
    with torch.no_grad():
        for module, plain, buffers in saved:
            vars(module).update(plain)
            for name, (tensor, value) in buffers.items():
                tensor.copy_(value)
                module._buffers[name] = tensor
