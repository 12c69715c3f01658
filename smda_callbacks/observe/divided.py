"""Models whose weights are divided over processes, by FSDP2 or by DeepSpeed's ZeRO-3: every process holds a part, and a
forward pass gathers the rest.

So a forward pass is something that all processes do at the same time, as often as each other. What looks at a weight
puts it together, which is such an act too; what moves weights moves each process's own part, alike everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smda_callbacks.observe.zero3 import gathered, is_zero3, own_piece_of, zero3_fault

Item = TypeVar("Item")
Found = TypeVar("Found")


class BrokenPassError(RuntimeError):
    """This process broke off what the others go on with and cannot be told of: it must end, or they wait for ever."""


class LeftError(RuntimeError):
    """A reading was given up, because another process could not go on with it."""


#: Each process says how many batches it has yet to read, below zero where it cannot; all hear whether all say the same.
Agree = Callable[[int], bool]


@dataclass(frozen=True)
class InStep:
    """A reading whose forward passes all processes make at the same time: ``rounds`` batches each, own ones or not."""

    rounds: int
    agree: Agree

    def rounds_of(self, read_one: Callable[[Item], Found], wanted: Sequence[Item], *, spare: Item) -> list[Found]:
        """What ``read_one`` finds in each of ``wanted``, and a pass over ``spare`` in every round that is left.

        That one is made for the others' sake. A batch is not halved where memory does not suffice: none could follow.

        Raises:
            LeftError: another process could not go on.
        """
        found = []
        for number in range(self.rounds):
            if not self.agree(self.rounds - number):
                raise LeftError("another process could not go on")
            each = read_one(wanted[number] if number < len(wanted) else spare)
            found += [each] if number < len(wanted) else []
        return found


def is_part(tensor: Tensor) -> bool:
    """Whether ``tensor`` is this process's part of a larger one."""
    return hasattr(tensor, "placements") or is_zero3(tensor)


def is_divided(model: nn.Module) -> bool:
    """Whether a forward pass of ``model`` takes all processes."""
    return any(is_part(parameter) for parameter in model.parameters())


def division_fault(model: nn.Module) -> str | None:
    """How the weights of ``model`` are divided, where it is in a way that cannot be read; None where it can."""
    if any(type(module).__name__.endswith("FullyShardedDataParallel") for module in model.modules()):
        return "FSDP1 keeps the model's weights in flat pieces"
    divided = [(name, parameter) for name, parameter in model.named_parameters() if is_part(parameter)]
    if not divided or any(is_zero3(parameter) for _, parameter in divided):
        return zero3_fault(divided)
    sharded = any(map(_is_unit, model.modules()))
    for name, parameter in divided:
        if not sharded or not _over_all_processes(parameter):
            return f"{name} and others are divided over processes as tensor or expert parallelism does"
    return None


def shape_of(tensor: Any) -> torch.Size:
    """The shape of the whole tensor."""
    shape: torch.Size = tensor.ds_shape if is_zero3(tensor) else tensor.shape
    return shape


def _is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the weights of ``module`` at its forward pass."""
    return hasattr(module, "reshard") and hasattr(module, "unshard")


def _over_all_processes(parameter: Any) -> bool:
    """Whether it is divided once, over all processes or over those of each replica (HSDP)."""
    cuts = sum(placement.is_shard() for placement in parameter.placements)
    return cuts == 1 and parameter.device_mesh.size() == dist.get_world_size()


def device_of(model: nn.Module) -> torch.device:
    """Where ``model`` computes: its weights may lie on the CPU meanwhile (FSDP2 with CPU offload)."""
    first: Any = next(model.parameters())
    kind = first.device_mesh.device_type if hasattr(first, "device_mesh") else first.device.type
    if kind == first.device.type:
        return torch.device(first.device)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def put_together(tensor: Any) -> Tensor:
    """The whole tensor of a part; all processes call it at the same time. Others come back as they are."""
    if not is_part(tensor):
        found: Tensor = tensor
        return found
    with torch.no_grad(), unbroken("putting a weight together"):
        if is_zero3(tensor):
            return gathered(tensor)
        whole: Tensor = tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
        return whole


@torch.no_grad()
def own_part(tensor: Any) -> Tensor:
    """What this process holds of ``tensor``, in the same memory."""
    if is_zero3(tensor):
        piece: Tensor = tensor.ds_tensor
        return piece
    part: Tensor = tensor.to_local() if is_part(tensor) else tensor
    return part


def part_like(whole: Tensor, tensor: Any) -> Tensor:
    """The part of ``whole``, which is the same on every process, that this process holds of ``tensor``; no messages."""
    if is_zero3(tensor):
        return own_piece_of(whole, tensor)
    if not is_part(tensor):
        return whole
    mesh = tensor.device_mesh
    along, placement = next((k, each) for k, each in enumerate(tensor.placements) if each.is_shard())
    pieces, number = whole.chunk(mesh.size(along), dim=placement.dim), mesh.get_local_rank(along)
    return pieces[number] if number < len(pieces) else whole.narrow(placement.dim, 0, 0)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights: FSDP2 keeps some after a forward pass, and would not see that parts have moved."""
    if not (dist.is_available() and dist.is_initialized()):  # all modules are many, and this is asked at every reading
        return
    module: Any
    for module in model.modules():
        if _is_unit(module):
            module.reshard()


@contextlib.contextmanager
def gathered_anew(model: nn.Module) -> Iterator[None]:
    """Context in which forward passes begin with the weights as they are; what they gathered is let go of."""
    reshard(model)
    try:
        yield
    finally:
        reshard(model)


@contextlib.contextmanager
def unbroken(what: str) -> Iterator[None]:
    """Context of what all processes do together: an error in it cannot be told to the others.

    Raises:
        BrokenPassError: in place of any error.
    """
    try:
        yield
    except Exception as error:
        raise BrokenPassError(
            f"{what} failed on this process ({type(error).__name__}: {error}). The model is divided over processes, "
            "and the others wait here for this one, so training ends. Next step: where memory did not suffice, lower "
            "measure.batch_size; or train without the callback."
        ) from error
