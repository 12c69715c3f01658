"""One pass over the probes of a live model: residual stream at the SAE's hook, and log-probabilities of openings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import HookSite, unwrap
from smda_callbacks.observe.batches import ProbeBatch, ProbeBatches
from smda_callbacks.observe.divided import InStep, device_of, gathered_anew, is_divided, unbroken
from smda_callbacks.observe.features import Encoder, Readout, pool
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.memory import in_memory
from smda_callbacks.observe.passes import cached_pass, tree_pass, with_states
from smda_callbacks.observe.preference import choice_log_probs
from smda_callbacks.observe.savings import NO_SAVING, Saving
from smda_callbacks.observe.trials import Savings
from smda_callbacks.records import Array

#: Attention implementations that take a four-dimensional mask, so that the tree is read in the prompt's own pass.
MASK_ATTENTION = ("sdpa", "eager")


class NotFiniteError(RuntimeError):
    """The model's activations or probabilities hold NaN or inf: nothing may be computed from them."""


@dataclass(frozen=True)
class Reading:
    """What one pass saw. ``hidden`` is the residual stream at the last prompt token, float32, on the model's device."""

    hidden: Tensor  # [probe, d_in]
    pre: Tensor  # [probe, feature]
    gate: Tensor  # [probe, feature]
    log_probs: Array  # [probe, opening], float64, natural log


@dataclass(frozen=True)
class Part:
    """What one batch showed; ``index`` are its probe numbers."""

    index: Tensor  # [row]
    hidden: Tensor  # [row, d_in] float32
    pre: Tensor  # [row, feature]
    gate: Tensor  # [row, feature]
    edges: Tensor  # [row, edge] log P of the tree's edges

    def to(self, device: torch.device) -> Part:
        """The same on another device, in memory of its own."""
        return Part(**{name: tensor.to(device, copy=True) for name, tensor in vars(self).items()})


#: Sees a batch while it is being read, with a graph behind it: the batch, its features' pre-activations and gates
#: ``[row, feature]``, and log P of the tree's edges ``[row, edge]``.
Visitor = Callable[[ProbeBatch, Tensor, Tensor, Tensor], None]


def read(
    model: nn.Module,
    batches: ProbeBatches,
    site: HookSite,
    encode: Encoder,
    *,
    readout: Readout = "last",
    visit: Visitor | None = None,
    savings: Savings | None = None,
) -> Reading:
    """Read every probe once, leaving no trace in the model.

    Args:
        model: what the trainer trains, adapters included; called as a whole, so its autocast applies.
        encode: the features to read.
        readout: where features are read: ``last`` prompt token, or ``mean``/``max`` over the prompt's own tokens.
        visit: called with every batch as it is read, for those who want gradients too.
        savings: what need not be computed again, or at all; None computes everything.

    Raises:
        NotFiniteError: NaN or inf in activations or log-probabilities; says how many probes.
    """
    parts = read_parts(model, batches, batches.batches, site, encode, readout=readout, visit=visit, savings=savings)
    return assemble(parts, batches)


def read_parts(
    model: nn.Module,
    batches: ProbeBatches,
    wanted: Sequence[ProbeBatch],
    site: HookSite,
    encode: Encoder,
    *,
    readout: Readout = "last",
    visit: Visitor | None = None,
    in_step: InStep | None = None,
    savings: Savings | None = None,
) -> list[Part]:
    """Read the batches ``wanted`` of ``batches``; the rest as :func:`read`, which puts the parts together.

    ``in_step``: for a model that is divided over several processes. One that is divided is read without savings.
    """
    savings = None if is_divided(model) else savings
    one_pass = tree_pass if tree_in_one_pass(model) else cached_pass
    device = device_of(model)

    def one(batch: ProbeBatch) -> Part:
        with unbroken("a forward pass over probes") if in_step is not None else contextlib.nullcontext():
            batch = batch.to(device)
            stream, edges = one_pass(model, batch, batches, site, saving)
        pre, gate = _features(stream, batch.span[:, saving.skip :], encode, readout)
        if visit is not None:
            visit(batch, pre, gate, edges)
        last = stream[:, -1].detach().float().clone()  # a view would keep the whole stream
        return Part(batch.index, last, pre.detach(), gate.detach(), edges.detach())

    with measuring(model, gradients=visit is not None), gathered_anew(model):
        saving = begin_saving(savings, model, batches, site, readout, gradients=visit is not None)
        if in_step is not None:
            return in_step.rounds_of(one, wanted, spare=batches.batches[-1])
        if visit is not None:  # a visitor may have seen half of what it wants of a batch
            return [one(batch) for batch in wanted]
        return [part for batch in wanted for part in in_memory(one, batch, saving.lower)]


def assemble(parts: Sequence[Part], batches: ProbeBatches) -> Reading:
    """The reading that ``parts`` are, in the order of the probes.

    Raises:
        NotFiniteError: NaN or inf in activations or log-probabilities; says how many probes.
        RuntimeError: not every probe is in one part; processes that share a reading disagree on the batches.
    """
    numbers, order = torch.cat([part.index for part in parts]).sort()
    if numbers.tolist() != list(range(batches.n_probes)):
        raise RuntimeError(
            f"a reading holds {len(numbers)} rows, which are not the {batches.n_probes} probes once each. Next step: "
            "give every process the same configuration."
        )
    columns = ([getattr(part, name) for part in parts] for name in ("hidden", "pre", "gate", "edges"))
    hidden, pre, gate, edges = (torch.cat(column)[order] for column in columns)
    log_probs = opening_log_probs(edges.double().cpu().numpy(), batches)
    _check_finite(hidden, log_probs)
    return Reading(hidden, pre, gate, log_probs)


def tree_in_one_pass(model: nn.Module) -> bool:
    """Whether the openings can be read in the prompt's own pass: the attention takes masks of our own."""
    return getattr(unwrap(model).config.get_text_config(), "_attn_implementation", None) in MASK_ATTENTION


def begin_saving(
    savings: Savings | None,
    model: nn.Module,
    batches: ProbeBatches,
    site: HookSite,
    readout: Readout,
    *,
    gradients: bool,
) -> Saving:
    """What a reading that begins now may leave out; called within :func:`measuring`."""
    if savings is None or not tree_in_one_pass(model):
        return NO_SAVING
    device = device_of(model)

    def one_pass(batch: ProbeBatch, saving: Saving) -> tuple[Tensor, Tensor]:
        return tree_pass(model, batch.to(device), batches, site, saving)

    def states(saving: Saving, batch: ProbeBatch) -> Saving:
        return with_states(model, batch.to(device), batches, saving)

    return savings.begin(model, batches, readout, one_pass, states, gradients=gradients)


def _features(stream: Tensor, span: Tensor, encode: Encoder, readout: Readout) -> tuple[Tensor, Tensor]:
    stream = stream[:, -1:] if readout == "last" else stream
    pre, gate = encode(stream)
    return pool(pre, gate, span, readout)


def opening_log_probs(edges: Array, batches: ProbeBatches) -> Array:
    """``edges [row, edge]``, log P of the tree's edges -> log P of its openings ``[row, opening]``."""
    tree = batches.tree
    found = np.stack([edges[:, list(path)].sum(axis=1) for path in tree.paths], axis=1)
    return found if tree.prior is None else choice_log_probs(found, tree.prior)


def _check_finite(hidden: Tensor, log_probs: Array) -> None:
    bad_hidden = int((~torch.isfinite(hidden)).any(dim=1).sum())
    bad_probs = int((np.isnan(log_probs) | np.isposinf(log_probs)).any(axis=1).sum())
    if bad_hidden or bad_probs:
        raise NotFiniteError(
            f"NaN or inf in the activations of {bad_hidden} and in the probabilities of {bad_probs} of {len(hidden)} "
            "probes. The reading is recorded as not finite and booked nowhere. Next step: look at the loss and the "
            "gradient norm of this step."
        )
