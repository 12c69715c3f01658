"""Trainings made again with pairs left out: a bare loop that does what TRL's trainer does, and its record, Run.

A pair's weight multiplies its loss; 0 leaves it out. Order, padding and denominators stay those of the whole training,
so that nothing changes but the pair. With all weights 1 the loop is TRL's training (tests/recipes/test_retrain.py).
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import disable_progress_bars as quiet_datasets
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, SchedulerType, TrainerCallback
from trl import SFTTrainer

from recipes.evidence.setups import Hyper, Setup
from smda_callbacks.cli.quickstart_run import arguments, as_chat
from smda_callbacks.maths.functionals import Slopes
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.training.audit_pairs import AuditPair

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Batch:
    """One optimizer step's examples as TRL collates them. ``pairs``: which pair every row is."""

    pairs: tuple[int, ...]
    input_ids: Tensor  # [row, token], right-padded
    attention_mask: Tensor  # [row, token]
    labels: Tensor  # [row, token]; -100 where nothing is learnt

    @property
    def tokens(self) -> int:
        """Learnt tokens: the denominator of the step's loss (TRL's num_items_in_batch)."""
        return int((self.labels[:, 1:] != -100).sum())


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step: its batch and rate, and the weights and AdamW's moments as they were before it, ``[N]``.

    ``gradient``: of the batch's loss, not clipped; ``clip``: what it was multiplied by; ``number``: from 1.
    """

    number: int
    lr: float
    batch: Batch
    weights: Tensor
    first: Tensor
    second: Tensor
    gradient: Tensor
    clip: float


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training with all pairs, and everything that a method of attribution may ask for.

    The N trained weights are those of ``names`` (LoRA matrices sorted by name, which is the order of
    ``observe.lora.lora_sites`` and of ``observe.noise.trained_parameters``), flattened one after the other.

    ``queries [K, N]``: gradient of every target at the final weights, gates of the SAE held. ``slopes``: the same by
    what the probes show, see ``recipes.evidence.queries.surrogate`` for the targets as a function of a model.
    """

    setup: Setup
    order: int
    pairs: tuple[AuditPair, ...]  # tokens: .input_ids, .trained (what the loss is on), .prompt_ids
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    final: Tensor  # [N]
    targets: tuple[str, ...]  # K names, such as refusal:harmful, refusal:fraud, feature:85:x, feature:85:y
    queries: Tensor  # [K, N]
    slopes: Slopes
    seconds: float  # of the training

    def model(self, weights: Tensor | None = None) -> Any:
        """A model of its own in evaluation mode, with these weights; None: the final ones."""
        model, _ = self.setup.adapted()
        put(model, self.final if weights is None else weights)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        return self.setup.load()[1]


# The loop -----------------------------------------------------------------------------------------------------------


def losses(model: Any, batch: Batch) -> Tensor:
    """Per row the summed cross-entropy of its learnt tokens, ``[row]``; logits are computed for no others."""
    base = model.get_base_model()
    stream = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
    learnt = batch.labels[:, 1:] != -100
    logits = base.lm_head(stream[:, :-1][learnt])
    each = F.cross_entropy(logits, batch.labels[:, 1:][learnt], reduction="none")
    return torch.zeros(len(learnt), dtype=each.dtype).index_add(0, learnt.nonzero()[:, 0], each)


def train(model: Any, batches: Sequence[Batch], hyper: Hyper, weights: Array) -> Iterator[Step]:
    """Train ``model`` in place with AdamW, pair p's loss times ``weights[p]``; yields every step after it was made."""
    parameters = trained_parameters(model)
    flat = tied(parameters)
    first, second = torch.zeros_like(flat), torch.zeros_like(flat)
    factors = torch.from_numpy(np.asarray(weights)).to(flat)
    for number, batch in enumerate(batches, start=1):
        lr = rate(number, len(batches), hyper)
        loss = (losses(model, batch) * factors[list(batch.pairs)]).sum() / batch.tokens
        gradient = torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])
        clip = min(1.0, hyper.max_grad_norm / (float(gradient.norm()) + 1e-6)) if hyper.max_grad_norm else 1.0
        step = Step(number, lr, batch, flat.clone(), first, second, gradient, clip)
        first, second = adamw(flat, first, second, gradient * clip, step, hyper)
        yield step


@torch.no_grad()
def adamw(
    flat: Tensor, first: Tensor, second: Tensor, gradient: Tensor, step: Step, hyper: Hyper
) -> tuple[Tensor, Tensor]:
    """One step of AdamW on ``flat`` in place, as torch.optim.AdamW makes it; returns the new moments."""
    beta1, beta2 = hyper.betas
    flat.mul_(1 - step.lr * hyper.weight_decay)
    first = first.lerp(gradient, 1 - beta1)
    second = (second * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (second.sqrt() / math.sqrt(1 - beta2**step.number)).add_(hyper.eps)
    flat.addcdiv_(first, denominator, value=-step.lr / (1 - beta1**step.number))
    return first, second


def rate(number: int, total: int, hyper: Hyper) -> float:
    """Learning rate of step ``number`` (from 1) of transformers' linear schedule: the first of a warm-up is 0."""
    done, warm = number - 1, warmup_steps(total, hyper)
    if done < warm:
        return hyper.learning_rate * done / warm
    return hyper.learning_rate * max(0.0, (total - done) / max(1, total - warm))


def warmup_steps(total: int, hyper: Hyper) -> int:
    return math.ceil(hyper.warmup * total)


def tied(parameters: Sequence[Tensor]) -> Tensor:
    """One flat tensor whose parts the parameters are from now on."""
    flat = torch.cat([each.detach().flatten() for each in parameters])
    at = 0
    for each in parameters:
        each.data = flat[at : at + each.numel()].view(each.shape)
        at += each.numel()
    return flat


def put(model: Any, weights: Tensor) -> None:
    """Overwrite the trained weights of ``model`` with the flat ``weights``."""
    at = 0
    with torch.no_grad():
        for each in trained_parameters(model):
            each.copy_(weights[at : at + each.numel()].view(each.shape))
            at += each.numel()


def flat_weights(model: Any) -> Tensor:
    """A copy of the trained weights, ``[N]``."""
    return torch.cat([each.detach().flatten() for each in trained_parameters(model)])


def layout(model: Any) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names and shapes of the trained weights, in the order of the flat tensor."""
    sites = lora_sites(model)
    return tuple(site.name for site in sites), tuple(tuple(site.weight.shape) for site in sites)


# The real training --------------------------------------------------------------------------------------------------


def trl_trainer(setup: Setup, order: int, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> SFTTrainer:
    """TRL's trainer of this setup; ``order`` seeds the order of the pairs, and nothing else."""
    hyper, (model, tokenizer) = setup.hyper, setup.load()
    args = arguments(folder, order)
    args.seed = hyper.adapter_seed  # TRL draws the adapter's weights after seeding
    args.num_train_epochs, args.per_device_train_batch_size = hyper.epochs, hyper.batch
    args.learning_rate, args.lr_scheduler_type = hyper.learning_rate, SchedulerType.LINEAR
    args.warmup_steps = warmup_steps(hyper.steps(len(setup.rows)), hyper)
    args.adam_beta1, args.adam_beta2, args.adam_epsilon = *hyper.betas, hyper.eps
    args.weight_decay, args.max_grad_norm, args.max_length = hyper.weight_decay, hyper.max_grad_norm, hyper.max_length
    args.report_to = []
    quiet_datasets()
    torch.manual_seed(hyper.adapter_seed)
    with warnings.catch_warnings():
        # Transformers reads its own deprecated names.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([as_chat(dict(row)) for row in setup.rows]),
            processing_class=tokenizer,
            peft_config=setup.lora(),
            callbacks=list(callbacks),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def recorded_batches(setup: Setup, order: int) -> tuple[tuple[Batch, ...], Tensor]:
    """The batches of TRL's own training of this order, as its model got them, and the weights that it ended at."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(setup, order, Path(folder))
        number = {each.input_ids: k for k, each in enumerate(setup.pairs(trainer.processing_class))}
        found: list[Batch] = []

        def keep(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
            names = ("input_ids", "attention_mask", "labels")
            tensors = {name: kwargs[name].detach().clone() for name in names}
            rows = zip(tensors["input_ids"], tensors["attention_mask"].bool(), strict=True)
            found.append(Batch(tuple(number[tuple(ids[real].tolist())] for ids, real in rows), **tensors))

        trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
        trainer.train()
        return tuple(found), flat_weights(trainer.model)
