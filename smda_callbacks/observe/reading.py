"""One pass over the probes of a live model: residual stream at the SAE's hook, and log-probabilities of openings."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import HookSite, captured, unwrap
from smda_callbacks.observe.batches import ProbeBatch, ProbeBatches
from smda_callbacks.observe.divided import InStep, device_of, gathered_anew, unbroken
from smda_callbacks.observe.features import Encoder, Readout, pool
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.preference import choice_log_probs, score_edges
from smda_callbacks.records import Array

logger = logging.getLogger("smda_callbacks")

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
) -> Reading:
    """Read every probe once, leaving no trace in the model.

    Args:
        model: what the trainer trains, adapters included; called as a whole, so its autocast applies.
        encode: the features to read.
        readout: where features are read: ``last`` prompt token, or ``mean``/``max`` over the prompt's own tokens.
        visit: called with every batch as it is read, for those who want gradients too.

    Raises:
        NotFiniteError: NaN or inf in activations or log-probabilities; says how many probes.
    """
    return assemble(read_parts(model, batches, batches.batches, site, encode, readout=readout, visit=visit), batches)


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
) -> list[Part]:
    """Read the batches ``wanted`` of ``batches``; the rest as :func:`read`, which puts the parts together.

    ``in_step``: for a model that is divided over processes.
    """
    one_pass = tree_pass if tree_in_one_pass(model) else _cached_pass
    device = device_of(model)

    def one(batch: ProbeBatch) -> Part:
        with unbroken("a forward pass over probes") if in_step is not None else contextlib.nullcontext():
            batch = batch.to(device)
            stream, edges = one_pass(model, batch, batches, site)
        pre, gate = _features(stream, batch, encode, readout)
        if visit is not None:
            visit(batch, pre, gate, edges)
        last = stream[:, -1].detach().float().clone()  # a view would keep the whole stream
        return Part(batch.index, last, pre.detach(), gate.detach(), edges.detach())

    with measuring(model, gradients=visit is not None), gathered_anew(model):
        if in_step is not None:
            return in_step.rounds_of(one, wanted, spare=batches.batches[-1])
        if visit is not None:  # a visitor may have seen half of what it wants of a batch
            return [one(batch) for batch in wanted]
        return [part for batch in wanted for part in in_memory(one, batch)]


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


def in_memory(read_one: Callable[[ProbeBatch], Part], batch: ProbeBatch) -> list[Part]:
    """The parts of a batch, read at once, or in halves of halves where memory does not suffice."""
    try:
        return [read_one(batch)]
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(batch.index) == 1:
            raise
    # Outside of the handler: the exception would hold on to what the failed pass has allocated.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    rows = len(batch.index)
    logger.warning(
        "out of memory with %d probes at once; they are read in two halves. measure.batch_size: %d avoids the attempt",
        rows,
        max(rows // 2, 1),
    )
    return [
        part for half in (batch.rows(0, rows // 2), batch.rows(rows // 2, rows)) for part in in_memory(read_one, half)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, on CUDA or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def tree_in_one_pass(model: nn.Module) -> bool:
    """Whether the openings can be read in the prompt's own pass: the attention takes masks of our own."""
    return getattr(unwrap(model).config.get_text_config(), "_attn_implementation", None) in MASK_ATTENTION


def _features(stream: Tensor, batch: ProbeBatch, encode: Encoder, readout: Readout) -> tuple[Tensor, Tensor]:
    stream = stream[:, -1:] if readout == "last" else stream
    pre, gate = encode(stream)
    return pool(pre, gate, batch.span, readout)


def tree_pass(model: Any, batch: ProbeBatch, batches: ProbeBatches, site: HookSite) -> tuple[Tensor, Tensor]:
    """Prompt and tree in one pass. Returns the stream ``[row, width + 1, d]`` and edge log-probs ``[row, edge]``."""
    nodes = len(batches.tree.tokens)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": masks(model, batch),
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    with captured(model, site) as seen:
        if batches.tree.prior is not None:
            edges = score_edges(model, inputs, batches.tree)
        else:
            edges = _edge_log_probs(model(**inputs, logits_to_keep=nodes).logits[:, -nodes:], batches)
    return seen[0][:, : batch.width + 1], edges


def masks(model: nn.Module, batch: ProbeBatch) -> Tensor | dict[str, Tensor]:
    """The batch's mask as this model takes it: windows cut by position, not by column, and per layer type if mixed."""
    config = unwrap(model).config.get_text_config()

    def typed(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)

    window = getattr(config, "sliding_window", None)
    if window is None or batch.input_ids.shape[1] <= window:
        return typed(batch.attends)
    distance = batch.position_ids.unsqueeze(2) - batch.position_ids.unsqueeze(1)
    near = typed(batch.attends & (distance < window).unsqueeze(1))
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        return {"full_attention": typed(batch.attends), "sliding_attention": near}
    return near


def _cached_pass(model: Any, batch: ProbeBatch, batches: ProbeBatches, site: HookSite) -> tuple[Tensor, Tensor]:
    """The same for attention without custom masks: the prompt once into a cache, then a row per branch of the tree."""
    tree, rows, end = batches.tree, len(batch.index), batch.width + 1
    mask = batch.attends[:, 0, batch.width, :end].long()
    with captured(model, site) as seen:
        output = model(
            input_ids=batch.input_ids[:, :end],
            attention_mask=mask,
            position_ids=batch.position_ids[:, :end],
            use_cache=True,
            logits_to_keep=1,
        )
    logits = [output.logits[:, -1:]]
    branches = [tree.ancestors(node) for node in range(1, len(tree.tokens)) if node not in tree.parents]
    if branches:
        depth = max(map(len, branches))
        tokens = torch.tensor([[tree.tokens[k] for k in line] + [0] * (depth - len(line)) for line in branches])
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(branches))
        positions = batch.lengths.repeat_interleave(len(branches)).unsqueeze(1) + torch.arange(
            depth, device=mask.device
        )
        after = model(
            input_ids=tokens.to(mask.device).repeat(rows, 1),
            attention_mask=torch.cat(
                [mask.repeat_interleave(len(branches), 0), mask.new_ones(rows * len(branches), depth)], dim=1
            ),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=depth,
        ).logits[:, -depth:]
        after = after.reshape(rows, len(branches), depth, -1)
        place = {node: (b, d) for b, line in enumerate(branches) for d, node in enumerate(line)}
        logits += [after[:, place[node][0], place[node][1]].unsqueeze(1) for node in range(1, len(tree.tokens))]
    return seen[0][:, :end], _edge_log_probs(torch.cat(logits, dim=1), batches)


def _edge_log_probs(logits: Tensor, batches: ProbeBatches) -> Tensor:
    """``logits [row, node, vocabulary]`` -> log P(edge's token | edge's node), ``[row, edge]`` float32.

    Row by row: a second tensor of the size of the logits costs more to allocate than to compute.
    """
    nodes = torch.from_numpy(batches.tree.edge_nodes).to(logits.device)
    tokens = torch.from_numpy(batches.tree.edge_tokens).to(logits.device)
    return torch.stack([row.float().log_softmax(dim=-1)[nodes, tokens] for row in logits])


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
