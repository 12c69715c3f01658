"""Forward passes over a batch of probes: the stream at the SAE's hook, and log-probabilities of the tree's edges."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from smda_callbacks.observe.activations import HookSite, captured, unwrap
from smda_callbacks.observe.batches import ProbeBatch, ProbeBatches
from smda_callbacks.observe.preference import score_edges
from smda_callbacks.observe.savings import NO_SAVING, Saving, last_tokens

#: Logits whose probabilities are computed at once: on a CPU what its cache holds, on a GPU what keeps it busy.
AT_ONCE_ON_CPU, AT_ONCE = 2**18, 2**26


def tree_pass(
    model: Any, batch: ProbeBatch, batches: ProbeBatches, site: HookSite, saving: Saving = NO_SAVING
) -> tuple[Tensor, Tensor]:
    """Prompt and tree in one pass. Returns the stream ``[row, token, d]`` and edge log-probs ``[row, edge]``.

    The tokens are those of the prompt, ``width + 1``, without the ``saving.skip`` that all probes share; with read-out
    ``last`` and a site among the layers that are kept, the last one only.
    """
    nodes = len(batches.tree.tokens)
    inputs = {**_inputs(model, batch, saving.skip), **saving.inputs()}
    with (
        saving.lower_layers(model, batch, site) as lower,
        captured(model, site) as seen,
        saving.trimmed(model, site, nodes),
    ):
        if batches.tree.prior is not None:
            edges = score_edges(model, inputs, batches.tree)
        else:
            edges = _edge_log_probs(model(**inputs, logits_to_keep=nodes).logits[:, -nodes:], batches)
    if lower.site is not None:
        return lower.site, edges
    stream = seen[0][:, : batch.width + 1 - saving.skip]
    lower.keep(stream[:, -1:] if saving.readout == "last" else stream)
    return stream, edges


def prompt_pass(model: Any, batch: ProbeBatch, site: HookSite, saving: Saving = NO_SAVING) -> Tensor:
    """The residual stream ``[row, token, d]`` of the prompts alone, computed no further than the hook.

    Trimmed, with read-out ``last``, it is right at the last token only: the hook's layer computes its MLP for no other.
    """
    end = batch.width + 1
    prompt = ProbeBatch(
        batch.index, batch.lengths, batch.input_ids[:, :end], batch.position_ids[:, :end],
        batch.attends[:, :, :end, :end], batch.span,
    )  # fmt: skip
    seen = _Stop()
    last_only = saving.trim and site.kind == "resid_post" and saving.readout == "last"
    with (
        saving.lower_layers(model, batch, site, end=end) as lower,
        captured(model, site, into=seen),
        last_tokens(model, site.layer, 1) if last_only else contextlib.nullcontext(),
        contextlib.suppress(_Enough),
    ):
        if lower.site is not None:
            return lower.site
        model(**_inputs(model, prompt, 0))
    return seen[0]


class _Enough(Exception):
    """Ends a forward pass when the hook was reached."""


class _Stop(list[Tensor]):
    def append(self, stream: Tensor) -> None:
        super().append(stream)
        raise _Enough


def with_states(model: Any, batch: ProbeBatch, batches: ProbeBatches, saving: Saving) -> Saving:
    """``saving`` with keys and values of the ``saving.skip`` tokens that all probes share, from a pass over them.

    All layers are computed: rows whose lower layers are not kept need them, and it is one short row.
    """
    skip, cache = saving.skip, DynamicCache()
    start = ProbeBatch(
        batch.index[:1], batch.lengths[:1], batch.input_ids[:1, :skip], batch.position_ids[:1, :skip],
        batch.attends[:1, :, :skip, :skip], batch.span[:1, :skip],
    )  # fmt: skip
    # Only its keys and values are wanted; the head works for one token, as it must for some.
    few = {"logits_to_keep": 1} if batches.tree.prior is None else {}
    model(**_inputs(model, start, 0) | {"use_cache": True}, past_key_values=cache, **few)
    layers: list[Any] = cache.layers
    return replace(saving, states={k: (each.keys, each.values) for k, each in enumerate(layers)})


def _inputs(model: nn.Module, batch: ProbeBatch, skip: int) -> dict[str, Any]:
    """The model's arguments for the columns from ``skip`` on, which may attend to all."""
    mask = masks(model, batch)
    behind = {k: each[:, :, skip:] for k, each in mask.items()} if isinstance(mask, dict) else mask[:, :, skip:]
    return {
        "input_ids": batch.input_ids[:, skip:],
        "attention_mask": behind,
        "position_ids": batch.position_ids[:, skip:],
        "use_cache": False,
    }


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


def cached_pass(
    model: Any, batch: ProbeBatch, batches: ProbeBatches, site: HookSite, saving: Saving = NO_SAVING
) -> tuple[Tensor, Tensor]:
    """The same for attention without custom masks: the prompt once into a cache, then a row per branch of the tree.

    There are no savings here.
    """
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

    A few rows at a time: a second tensor of the size of the logits costs more to allocate than to compute.
    """
    nodes = torch.from_numpy(batches.tree.edge_nodes).to(logits.device)
    tokens = torch.from_numpy(batches.tree.edge_tokens).to(logits.device)
    rows = max(1, (AT_ONCE if logits.is_cuda else AT_ONCE_ON_CPU) // logits[0].numel())
    return torch.cat([few.float().log_softmax(dim=-1)[:, nodes, tokens] for few in logits.split(rows)])
