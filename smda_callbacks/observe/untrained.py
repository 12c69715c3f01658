"""Which layers of a model no training changes, and whether they are still what they were."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import decoder_layers, unwrap
from smda_callbacks.observe.divided import is_part

#: Elements of a tensor that its sum is taken over: enough to see a merged adapter, too few to cost anything.
SAMPLED = 256


#: Every module with the number of its decoder layer, -1 outside of all; a walk over a model's tree is not for nothing.
Placed = list[tuple[nn.Module, int]]


def placed_modules(model: nn.Module) -> Placed:
    layers = list(decoder_layers(model))
    number = {id(module): k for k in reversed(range(len(layers))) for module in layers[k].modules()}
    return [(module, number.get(id(module), -1)) for module in model.modules()]


def lowest_trained(placed: Placed, late: set[int]) -> int:
    """The lowest decoder layer that holds a trained weight or an adapter; 0 where nothing below it is safely fixed.

    That is: something before the layers is trained (embeddings, soft prompts), nothing is trained at all (whatever
    moves such a model does so unseen), or weights are divided, offloaded or in a compiled graph. ``late``: parameters
    that act after the layers (:func:`after_layers`).
    """
    trained, adapted = set(), set()
    for module, number in placed:
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            return 0
        # An adapter that is not trained can be merged, switched off or weighed anew without a trace in its weights.
        if "base_layer" in module._modules and not {id(each) for each in module.parameters()} <= late:
            adapted.add(number)
        for parameter in _present(module._parameters):
            if is_part(parameter) or hasattr(parameter, "ds_id") or parameter.is_meta:
                return 0
            if parameter.requires_grad and id(parameter) not in late:
                trained.add(number)
            elif parameter.requires_grad:
                trained.add(max(number for _, number in placed))  # after all layers: the last is computed anyway
    return max(min(trained | adapted), 0) if trained else 0


def after_layers(model: nn.Module) -> set[int]:
    """Parameters that act after the last layer only: heads and the last norm, unless tied to what comes before."""
    inner = unwrap(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    norms = [getattr(decoder, name, None) for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm")]
    late = [each for each in (head, getattr(inner, "score", None), *norms) if isinstance(each, nn.Module)]
    early = {id(parameter) for parameter in inner.get_input_embeddings().parameters()}
    return {id(parameter) for module in late for parameter in module.parameters()} - early


def _hooks(module: nn.Module, late: set[int]) -> list[int]:
    """Numbers of a module's hooks, no two of which are the same; none of what acts after the last layer only."""
    found = [*module._forward_hooks, *module._forward_pre_hooks]
    own = {id(each) for each in module.parameters()} if found else set()
    return [] if own and own <= late else found


def _present(tensors: dict[str, Any]) -> list[Tensor]:
    return [each for each in tensors.values() if each is not None]


@dataclass(frozen=True)
class Weights:
    """What the stream below layer ``first`` depends on, in a form that can be compared with later."""

    first: int
    parameters: tuple[tuple[Any, int, int], ...]  # (weak reference, memory, version)
    sums: Tensor  # [tensor] float64; sees what is written past autograd, as through .data
    setting: tuple[Any, ...]

    @staticmethod
    def below(model: nn.Module, first: int, placed: Placed, late: set[int]) -> Weights:
        """Of all of ``model`` but its layers from ``first`` on. Buffers count by their sums: readings put them back."""
        lower = [(module, number) for module, number in placed if number < first]
        parameters = {id(p): p for module, _ in lower for p in _present(module._parameters) if id(p) not in late}
        buffers = [each for module, _ in lower for each in _present(module._buffers)]
        # Hooks of the model as a whole are those that look at training batches, which come and go.
        hooks = tuple(key for module, _ in lower if module is not model for key in _hooks(module, late))
        device = next(iter(parameters.values())).device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        config = unwrap(model).config.get_text_config()
        setting = (autocast, hooks, getattr(config, "_attn_implementation", None), id(vars(model).get("forward")))
        return Weights(
            first,
            tuple((weakref.ref(each), each.data_ptr(), each._version) for each in parameters.values()),
            torch.stack([_sum(each).to(device) for each in (*parameters.values(), *buffers)]).cpu(),
            setting,
        )

    def same_as(self, other: Weights) -> bool:
        """Whether nothing that counts has changed. Objects are compared alive: memory may be given out again."""
        return (
            (self.first, self.setting) == (other.first, other.setting)
            and len(self.parameters) == len(other.parameters)
            and all(
                a[0]() is not None and a[0]() is b[0]() and a[1:] == b[1:]
                for a, b in zip(self.parameters, other.parameters, strict=True)
            )
            and torch.equal(self.sums, other.sums)
        )


def _sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].double().sum()
