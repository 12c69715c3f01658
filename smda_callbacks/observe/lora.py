"""The LoRA matrices that training changes, and hooks that see what goes into them and which gradient comes back.

A LoRA matrix W is a linear layer, so the gradient of one example is the sum over its tokens of (gradient of the output)
⊗ (input): one training backward pass holds the gradients of all its examples, and only their sum is usually kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class AttributionError(ValueError):
    """Something about this run that pairs cannot be attributed under."""


@dataclass(frozen=True)
class LoraSite:
    """One trained LoRA matrix: the linear layer ``module`` with weight ``[out, in]``."""

    name: str
    module: nn.Linear

    @property
    def weight(self) -> Tensor:
        return self.module.weight


#: Called with (number of the site, its input ``[row, token, in]``, the gradient of its output ``[row, token, out]``).
Consumer = Callable[[int, Tensor, Tensor], None]


def lora_sites(model: nn.Module) -> tuple[LoraSite, ...]:
    """Every trained LoRA matrix of ``model``, in the order of their names; any number of adapters, rsLoRA included.

    Raises:
        AttributionError: something else is trained, or a matrix is more than a plain linear layer (DoRA, embeddings,
            ``modules_to_save``, bias, full fine-tuning); names it.
    """
    owners = {id(m.weight): (name, m) for name, m in model.named_modules() if _is_lora_linear(name, m)}
    dora = _variants(model)
    sites, others = [], []
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            continue
        if id(parameter) in owners and not any(name.startswith(prefix) for prefix in dora):
            sites.append(LoraSite(*owners[id(parameter)]))
        else:
            others.append(name)
    if others or not sites:
        kinds = sorted({_kind(name, dora) for name in others}) or ["nothing"]
        raise AttributionError(
            f"training changes {', '.join(kinds)} ({len(others)} tensors, such as {others[0] if others else 'none'}), "
            "for which gradients of single pairs are not known. Allowed: the matrices of LoRA and rsLoRA on linear "
            "layers. Next step: leave it out of the LoraConfig, or set attribution.engine: off."
        )
    return tuple(sites)


def _is_lora_linear(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and (".lora_A." in name or ".lora_B." in name) and module.bias is None


def _variants(model: nn.Module) -> tuple[str, ...]:
    """Names of LoRA layers that are computed otherwise than as ``B(A(x))``, such as DoRA."""
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "lora_variant", None))


def _kind(name: str, variants: tuple[str, ...]) -> str:
    if any(name.startswith(prefix) for prefix in variants):
        return "a DoRA layer or another variant of LoRA"
    if "modules_to_save" in name:
        return "modules_to_save"
    if "lora_embedding" in name:
        return "LoRA on an embedding"
    return "a bias" if name.endswith("bias") else "LoRA on something else" if "lora_" in name else "full weights"


@contextlib.contextmanager
def tapped(sites: tuple[LoraSite, ...], consume: Consumer) -> Iterator[Tap]:
    """Context in which every backward pass hands input and output gradient of every site to ``consume``."""
    tap = Tap(sites, consume)
    tap.attach()
    try:
        yield tap
    finally:
        tap.detach()


class Tap:
    """Hooks on all sites. They change no number: they only look.

    ``listening``: whether the pass that goes on is of interest; ``recomputed``: the model recomputes its forward pass
    in the backward pass, so that inputs are to be taken from there: those of the first pass would stay in memory.
    ``lowest``: numbers of the sites seen so far whose input needs no gradient. A backward pass to their weights goes
    through the outputs of all sites; gradients of the other weights, which cost about as much again, it can spare.
    """

    def __init__(
        self,
        sites: tuple[LoraSite, ...],
        consume: Consumer,
        *,
        listening: Callable[[], bool] = lambda: True,
        recomputed: bool = False,
    ) -> None:
        self.sites, self.consume, self.listening, self.recomputed = sites, consume, listening, recomputed
        self.lowest: set[int] = set()
        self._inputs: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}  # gradients that came before the input
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Hook all sites; does nothing where that is done."""
        if self._handles:
            return
        for number, site in enumerate(self.sites):
            if self.recomputed:
                self._handles.append(site.module.register_forward_pre_hook(partial(self._recompute, number)))
                self._handles.append(site.module.register_forward_hook(partial(self._after_recompute, number)))
            else:
                self._handles.append(site.module.register_forward_hook(partial(self._after, number)))

    def detach(self) -> None:
        """Remove all hooks and forget what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.forget()

    def forget(self) -> None:
        """Let go of what was seen."""
        self._inputs, self._waiting = {}, {}

    # The graph keeps the input for the gradient of the weight anyway, for as long as it keeps this hook.
    def _after(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad and self.listening():
            if not args[0].requires_grad:
                self.lowest.add(number)
            output.register_hook(partial(self._arrived, number, args[0].detach()))

    def _arrived(self, number: int, seen: Tensor, gradient: Tensor) -> None:
        if self.listening():
            self.consume(number, seen, gradient.detach())

    # Under gradient checkpointing a forward pass comes twice, and the recomputation stops before the last modules are
    # through: inputs are taken on the way in, and gradients at the outputs of whichever pass is in the graph.
    def _recompute(self, number: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or not self.listening():
            return
        if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
            return
        seen, gradient = args[0].detach(), self._waiting.pop(number, None)
        if gradient is not None:
            self.consume(number, seen, gradient)
        else:
            self._inputs[number] = seen

    def _after_recompute(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad and self.listening():
            output.register_hook(partial(self._arrived_in_recompute, number))

    def _arrived_in_recompute(self, number: int, gradient: Tensor) -> None:
        if not self.listening():
            return
        seen = self._inputs.pop(number, None)
        if seen is not None:
            self.consume(number, seen, gradient.detach())
        else:
            self._waiting[number] = gradient.detach()


def per_row(seen: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a site's weight for every row of a batch: ``[row, token, in]``, ``[row, token, out]`` ->
    ``[row, out * in]`` float32 (float64 for float64 models)."""
    seen, gradient = _at_least_float32(seen), _at_least_float32(gradient)
    # The recomputation of gradient checkpointing calls this inside of training's autocast, which would round to bf16.
    if torch.is_autocast_enabled(seen.device.type):
        with torch.autocast(seen.device.type, enabled=False):
            return per_row(seen, gradient)
    if seen.shape[2] < gradient.shape[2]:  # on CPU, twice as fast with the short side (the rank) first
        return torch.bmm(seen.transpose(1, 2), gradient).transpose(1, 2).flatten(1)
    return torch.bmm(gradient.transpose(1, 2), seen).flatten(1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
