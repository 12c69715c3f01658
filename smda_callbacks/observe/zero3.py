"""Weights as DeepSpeed's ZeRO-3 keeps them: a flat piece on every process; a forward pass gathers the rest.

Nothing of DeepSpeed is imported. What is needed hangs on every parameter: ``ds_tensor`` is this process's piece, and
the truth; what a parameter itself holds is empty, or a copy put together of the pieces, until it is let go of. Written
for, and tested with, DeepSpeed 0.19.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_zero3(tensor: Any) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 has cut into pieces."""
    return hasattr(tensor, "ds_id")


def zero3_fault(parameters: Iterable[tuple[str, Any]]) -> str | None:
    """How ZeRO-3 keeps one of these ``(name, parameter)``, where it is in a way that cannot be read; None if not."""
    for name, each in parameters:
        if not is_zero3(each):
            continue
        if getattr(each, "nvme_swapper", None) is not None:
            return f"DeepSpeed ZeRO-3 keeps {name} and others on NVMe (offload_param)"
        if hasattr(each.ds_tensor, "ds_quant_scale"):
            return f"DeepSpeed ZeRO-3 keeps {name} and others quantised (zero_quantized_nontrainable_weights)"
        if getattr(each, "ds_zero_param_process_group", None) is not None:
            return f"DeepSpeed ZeRO-3 keeps second copies of {name} and others (zero_hpz_partition_size)"
        if dist.get_world_size(each.ds_process_group) != dist.get_world_size():
            return (
                f"DeepSpeed ZeRO-3 divides {name} and others over some of the processes only (MiCS, model parallelism)"
            )
    return None


@torch.no_grad()
def gathered(parameter: Any) -> Tensor:
    """The whole of a parameter, in memory of its own; all processes call it at the same time."""
    piece = parameter.ds_tensor.detach().to(parameter.device)
    pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size(parameter.ds_process_group))]
    dist.all_gather(pieces, piece, group=parameter.ds_process_group)
    return torch.cat(pieces)[: parameter.ds_numel].reshape(parameter.ds_shape)


def own_piece_of(whole: Tensor, parameter: Any) -> Tensor:
    """The piece of ``whole`` that this process holds of ``parameter``; no messages."""
    group = parameter.ds_process_group
    return piece_of(whole, dist.get_rank(group), dist.get_world_size(group))


def piece_of(whole: Tensor, number: int, size: int) -> Tensor:
    """Piece ``number`` of the ``size`` equal ones of ``whole``, flat; the last is filled up with zeros."""
    flat = whole.flatten()
    length = -(-flat.numel() // size)
    piece = flat[number * length : (number + 1) * length]
    return torch.nn.functional.pad(piece, (0, length - piece.numel()))


def let_go(parameters: Iterable[Any]) -> None:
    """Let go of what DeepSpeed has gathered and may keep, so that a forward pass sees pieces that have moved.

    All processes must do it: a weight is gathered again by those that have let go of it. A copy that is still on its
    way is let go of by DeepSpeed, as the next forward pass begins.
    """
    for each in parameters:
        if is_zero3(each) and each.ds_status.name == "AVAILABLE":
            each.partition()
