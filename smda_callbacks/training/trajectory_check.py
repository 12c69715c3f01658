"""What a run has to be for its steps to be kept; anything else is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from smda_callbacks.observe.lora import AttributionError, LoraSite, lora_sites
from smda_callbacks.observe.updates import check_optimizer
from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.training.engine import check_model, check_training
from smda_callbacks.training.trajectory_options import TrajectoryOptions

_NEXT = "Next step: change that, or set trajectory.keep: false."


def check_recordable(
    options: TrajectoryOptions, folder: Path | None, trainer: Any, model: nn.Module, optimizer: Any, *, steps: int
) -> None:
    """Refuse a run that could not be gone through again, whose loss is not the plain one, or that takes too much room.

    ``folder``: where it would be recorded, None without a run store; ``steps``: how many there will be.

    Raises:
        AttributionError, TrajectoryError: names what, and what to do.
    """
    if folder is None:
        raise AttributionError(f"trajectory.keep needs a run store, and this run has none. {_NEXT}")
    if trainer is None:
        raise AttributionError(f"the trainer is not known, so the run's steps cannot be kept. {_NEXT}")
    _check_trainer(trainer, model)
    try:
        check_training(trainer.args, None)
        check_model(model)
        sites = lora_sites(model)
        check_optimizer(optimizer, sites)
    except AttributionError as error:
        why = str(error).partition(" Next step")[0].rstrip(".")
        raise AttributionError(f"the run's steps cannot be kept: {why}. {_NEXT}") from error
    layout.check_room(folder, estimate(sites, optimizer, trainer.args, steps, options.every), options.max_gib)


def _check_trainer(trainer: Any, model: nn.Module) -> None:
    args = trainer.args
    kind = f"{type(trainer).__module__.partition('.')[0]}.{type(trainer).__name__}"
    faults = {
        f"the trainer is {kind}; only transformers.Trainer and trl.SFTTrainer themselves are gone through again": (
            kind not in ("transformers.Trainer", "trl.SFTTrainer")
        ),
        "training runs on several processes": args.world_size > 1,
        "labels are smoothed (label_smoothing_factor)": bool(getattr(args, "label_smoothing_factor", 0.0)),
        f"the loss is {getattr(args, 'loss_type', None)}": getattr(args, "loss_type", None)
        not in (None, "nll", "chunked_nll"),
        "the loss is a function of the user's own (compute_loss_func)": trainer.compute_loss_func is not None,
        "NEFTune draws noise": bool(getattr(args, "neftune_noise_alpha", None)),
        "Liger kernels compute the loss": bool(getattr(args, "use_liger_kernel", False)),
        "the trainer has no tokenizer (processing_class)": not hasattr(trainer.processing_class, "save_pretrained"),
        "the model has several adapters": len(getattr(model, "peft_config", {})) > 1,
    }
    for text, holds in faults.items():
        if holds:
            raise AttributionError(f"{text}, so the run's steps cannot be kept. {_NEXT}")


def estimate(sites: tuple[LoraSite, ...], optimizer: Any, args: Any, steps: int, every: int) -> int:
    """Bytes that a trajectory will take at most, or nearly so."""
    weights = sum(site.weight.numel() * site.weight.element_size() for site in sites)
    moments = 2 if not isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.SGD) else 1
    rows = int(args.per_device_train_batch_size) * int(args.gradient_accumulation_steps)
    tokens = rows * (getattr(args, "max_length", None) or 1024)
    return (steps // every + 2) * weights * (1 + moments) + steps * (tokens * 3 * 8 + 8192)
