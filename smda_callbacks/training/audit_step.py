"""One pair, one update: a LoRA adapter that is put on a model, moved by a pair alone, put back, and taken off again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.noise import UpdateMeter, trained_parameters
from smda_callbacks.training.audit_pairs import AuditPair, LossOn

Optimizer = Literal["adamw_torch", "sgd"]


class AuditError(ValueError):
    """An audit that cannot be made as asked."""


@dataclass(frozen=True)
class AuditOptions:
    """The update that every pair makes alone.

    Args:
        learning_rate, steps, optimizer: of the update; AdamW with the usual constants and no weight decay.
        repeats: every pair again from this many starts, each with LoRA weights of its own seed.
        rank, alpha, target_modules: of the LoRA adapter, dropout 0. ``all-linear``, a regular expression, or names.
        max_grad_norm: gradients are clipped to it; 0: never.
        max_length, loss_on: see :func:`smda_callbacks.training.audit_pairs.tokenize_pairs`.
        seed: of the first start; the others follow.

    Raises:
        AuditError: a value out of range.
    """

    learning_rate: float = 2e-4
    steps: int = 1
    optimizer: Optimizer = "adamw_torch"
    repeats: int = 1
    rank: int = 16
    alpha: float = 32
    target_modules: str | tuple[str, ...] = "all-linear"
    max_grad_norm: float = 1.0
    max_length: int = 1024
    loss_on: LossOn = "completion"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "steps", "repeats", "rank", "alpha", "max_length"):
            if not getattr(self, name) > 0:
                raise AuditError(f"{name} of an audit must be above 0, got {getattr(self, name)}.")
        if self.max_grad_norm < 0:
            raise AuditError(f"max_grad_norm of an audit must be at least 0, got {self.max_grad_norm}.")
        for name, kind in (("optimizer", Optimizer), ("loss_on", LossOn)):
            if getattr(self, name) not in get_args(kind):
                raise AuditError(f"{name} {getattr(self, name)!r} is unknown. Allowed: {', '.join(get_args(kind))}.")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of every repeat."""
        return tuple(self.seed + k for k in range(self.repeats))


@dataclass(frozen=True)
class Adapter:
    """A model with a LoRA adapter, and the values that its weights start from in every repeat."""

    model: Any
    parameters: list[nn.Parameter]
    starts: tuple[tuple[Tensor, ...], ...]  # [repeat][parameter]

    @torch.no_grad()
    def reset(self, repeat: int) -> None:
        """Back to the start of a repeat, bit for bit."""
        for parameter, value in zip(self.parameters, self.starts[repeat], strict=True):
            parameter.copy_(value)
            parameter.grad = None


@contextlib.contextmanager
def fresh_adapter(model: nn.Module, options: AuditOptions) -> Iterator[Adapter]:
    """Context in which ``model`` carries a LoRA adapter of its own, as ``get_peft_model`` makes it after seeding torch.

    Afterwards the model is what it was, bit for bit: modules, weights, train/eval flags, buffers, ``requires_grad``;
    and so is the random state.

    Raises:
        AuditError: the model has an adapter already, or the target modules are not in it.
    """
    if getattr(model, "peft_config", None):
        raise AuditError(
            "the model has an adapter already, and an audit puts one of its own on a plain model. Next step: merge it "
            "(merge_and_unload), save the result, and audit that."
        )
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped: Any = None
    with measuring(model):
        try:
            starts = []
            for seed in options.seeds:
                if wrapped is not None:
                    wrapped.unload()
                wrapped = _wrapped(model, options, seed)
                parameters = trained_parameters(wrapped)
                starts.append(tuple(parameter.detach().clone() for parameter in parameters))
            yield Adapter(wrapped.eval(), parameters, tuple(starts))
        finally:
            if wrapped is not None:
                wrapped.unload()
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)


def _wrapped(model: nn.Module, options: AuditOptions, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = options.target_modules
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        target_modules=names if isinstance(names, str) else list(names),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # Transformers reads its own deprecated names.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            return get_peft_model(model, config)
    except ValueError as error:
        raise AuditError(
            f"no LoRA adapter fits this model: {error} Next step: set audit.target_modules to all-linear, or to names "
            "of linear modules that the model has."
        ) from error


def train_on(adapter: Adapter, pair: AuditPair, repeat: int, options: AuditOptions) -> tuple[float, float]:
    """Move the adapter from the start of ``repeat`` by this pair alone, with an optimizer of its own, in train mode.

    Dropout of the model itself, where it has any, draws the same numbers for every pair.

    Returns:
        The loss before the update, and the root mean square change per trained weight.
    """
    adapter.reset(repeat)
    meter = UpdateMeter(adapter.model)
    device = adapter.parameters[0].device
    ids = torch.tensor([pair.input_ids], device=device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(~torch.tensor([pair.trained], device=device), -100),
    }
    with measuring(adapter.model), torch.enable_grad():
        torch.manual_seed(options.seeds[repeat])
        adapter.model.train()
        loss = _update(adapter, batch, options)
    return loss, meter.rms()


def _update(adapter: Adapter, batch: dict[str, Tensor], options: AuditOptions) -> float:
    optimizer = make_optimizer(adapter.parameters, options)
    losses = []
    for _ in range(options.steps):
        loss = adapter.model(**batch, use_cache=False).loss
        loss.backward()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(adapter.parameters, options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses[0]


def make_optimizer(parameters: Sequence[nn.Parameter], options: AuditOptions) -> torch.optim.Optimizer:
    """A fresh optimizer of the audit."""
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=options.learning_rate)
    return torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
