"""What a run has to be for its steps to be kept; anything else is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.lora import AttributionError, LoraSite, lora_sites
from smda_callbacks.observe.probe_gradients import check_differentiable
from smda_callbacks.observe.updates import check_optimizer
from smda_callbacks.sinks import trajectory as layout
from smda_callbacks.training.engine import check_model, check_training
from smda_callbacks.training.trajectory_options import TrajectoryOptions
from smda_callbacks.training.trajectory_state import inner

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
        check_differentiable(model)
    except AttributionError as error:
        why = str(error).partition(" Next step")[0].rstrip(".")
        raise AttributionError(f"the run's steps cannot be kept: {why}. {_NEXT}") from error
    _check_groups(trainer, optimizer)
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
        "the base model is quantised": _is_quantised(model),
        "a mixture of experts' router adds a loss of its own (router_aux_loss_coef)": _has_router_loss(trainer, model),
    }
    for text, holds in faults.items():
        if holds:
            raise AttributionError(f"{text}, so the run's steps cannot be kept. {_NEXT}")


def _is_quantised(model: nn.Module) -> bool:
    base: Any = unwrap(model)
    named = getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None) is not None
    return bool(named) or not all(each.is_floating_point() for each in model.parameters())


def _has_router_loss(trainer: Any, model: nn.Module) -> bool:
    # TRL's trainer asks for the router's loss itself; other trainers leave it to the model's configuration.
    config: Any = unwrap(model).config.get_text_config()
    own = getattr(config, "output_router_logits", False) and getattr(config, "router_aux_loss_coef", 0.0)
    return bool(own) or bool(getattr(trainer, "aux_loss_enabled", False))


def _check_groups(trainer: Any, optimizer: Any) -> None:
    """Refuse an optimizer that the trainer did not make: it makes another when the run is gone through again."""
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    trained = [(name in decayed, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    wanted = [[id(weight) for decays, weight in trained if decays is first] for first in (True, False)]
    found = [[id(weight) for weight in group["params"]] for group in inner(optimizer).param_groups]
    kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    own = type(inner(optimizer)) is kind and all(
        bool(group.get(name)) == bool(settings.get(name))
        for group in inner(optimizer).param_groups
        for name in ("fused", "foreach")
    )
    if found != wanted or not own or trainer.optimizer_cls_and_kwargs is not None:
        raise AttributionError(
            f"the optimizer ({type(inner(optimizer)).__name__}, groups of {[len(each) for each in found]} weights) is "
            f"not the one that the trainer makes of its arguments ({kind.__name__}, groups of "
            f"{[len(each) for each in wanted]}), so the run's steps cannot be kept. {_NEXT}"
        )


def estimate(sites: tuple[LoraSite, ...], optimizer: Any, args: Any, steps: int, every: int) -> int:
    """Bytes that a trajectory will take at most, or nearly so."""
    weights = sum(site.weight.numel() * site.weight.element_size() for site in sites)
    moments = 2 if not isinstance(inner(optimizer), torch.optim.SGD) else 1
    rows = int(args.per_device_train_batch_size) * int(args.gradient_accumulation_steps)
    tokens = rows * (getattr(args, "max_length", None) or 1024)
    return (steps // every + 2) * weights * (1 + moments) + steps * (tokens * 3 * 8 + 8192)
