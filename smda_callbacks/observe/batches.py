"""Probes as tensors, once per run: same batches and padding at every reading, so that readings differ only by weights.

Layout of a row, with the prompt's last token and the tree of openings in columns that are the same for all rows::

    prompt[:-1]   padding   prompt[-1]   node 1  node 2 ...
    <------ width ------>   <------ 1 + nodes ----------->

so one ``logits_to_keep`` gives every next-token distribution that is needed, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smda_callbacks.observe.prefixes import PrefixTree
from smda_callbacks.observe.probes import ProbeError, ProbeSet


@dataclass(frozen=True)
class ProbeBatch:
    """Rows of similar length. ``index`` are probe numbers, ``lengths`` prompt lengths in tokens."""

    index: Tensor  # [row]
    lengths: Tensor  # [row]
    input_ids: Tensor  # [row, width + 1 + nodes]
    position_ids: Tensor  # [row, width + 1 + nodes]
    attends: Tensor  # [row, 1, width + 1 + nodes, width + 1 + nodes] bool
    span: Tensor  # [row, width + 1] bool: the prompt's own tokens, without the start that all probes share

    @property
    def width(self) -> int:
        """Columns before the last prompt token."""
        return self.span.shape[1] - 1

    def rows(self, start: int, stop: int) -> ProbeBatch:
        """The rows ``start`` to ``stop - 1`` alone, in the same columns."""
        return ProbeBatch(**{name: tensor[start:stop] for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> ProbeBatch:
        """The same batch on another device."""
        return ProbeBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class ProbeBatches:
    """All probes of a set, tokenized and batched, with the tree of openings behind each prompt."""

    batches: tuple[ProbeBatch, ...]
    tree: PrefixTree
    n_probes: int
    n_tokens: int  # real tokens: prompts and tree nodes, without padding
    shared: int = 0  # length of the start that all prompts share

    @property
    def padding(self) -> float:
        """Share of the columns that hold no token."""
        return 1.0 - self.n_tokens / sum(batch.input_ids.numel() for batch in self.batches)


def chat_prompt(
    tokenizer: Any, text: str, *, system: str | None = None, template: Mapping[str, Any] | None = None
) -> str:
    """The prompt as the model sees it, up to where its answer begins.

    Raises:
        ProbeError: the tokenizer has no chat template.
    """
    if tokenizer is None:
        raise ProbeError(
            "there is no tokenizer, so prompts cannot be made. Next step: give the trainer processing_class=tokenizer."
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ProbeError(
            "the tokenizer has no chat template, so the place where the answer begins is unknown. Next step: use a "
            "chat model, or set tokenizer.chat_template before training."
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    prompt: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(template or {})
    )
    return prompt


def answer_lead(
    tokenizer: Any, text: str, *, system: str | None = None, template: Mapping[str, Any] | None = None
) -> str:
    """What the template puts between the generation prompt and an answer's first character; mostly nothing.

    Llama-2 style templates put a space there: training answers start with it, so openings must be scored behind it.
    """
    prompt = chat_prompt(tokenizer, text, system=system, template=template)
    marker = "ANSWER"
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": text}, {"role": "assistant", "content": marker}]
    whole: str = tokenizer.apply_chat_template(messages, tokenize=False, **(template or {}))
    lead, found, _ = whole.removeprefix(prompt).partition(marker)
    return lead if found and whole.startswith(prompt) and not lead.strip() else ""


def response_encoder(tokenizer: Any, prompt: str, lead: str = "") -> Callable[[str], list[int]]:
    """Tokens of a response's opening as they stand behind ``prompt`` and ``lead``, not in isolation.

    The function raises ProbeError when the opening changes the prompt's own tokens: it cannot be scored then.
    """
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def encode(opening: str) -> list[int]:
        full = tokenizer(prompt + lead + opening, add_special_tokens=False)["input_ids"]
        if full[: len(head)] != head:
            raise ProbeError(
                f"opening {opening!r} is not representable behind this chat template: it merges with the template's "
                "last token. Next step: remove it, or change the opening's first characters."
            )
        return list(full[len(head) :])

    return encode


def tokenize_probes(
    tokenizer: Any,
    probes: ProbeSet,
    *,
    context: int | None,
    reserve: int = 0,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ProbeError: no chat template, or a prompt (plus ``reserve`` tokens for openings) longer than ``context``.
    """
    prompts = [chat_prompt(tokenizer, probe.text, system=system, template=template) for probe in probes.probes]
    ids: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    for probe, tokens in zip(probes.probes, ids, strict=True):
        if context is not None and len(tokens) + reserve > context:
            raise ProbeError(
                f"probe {probe.id!r} has {len(tokens)} tokens and needs {reserve} more for the openings, but the "
                f"model's context is {context}. Next step: shorten or remove it."
            )
    return ids


def make_batches(ids: Sequence[Sequence[int]], tree: PrefixTree, *, batch_size: int = 64, pad: int = 0) -> ProbeBatches:
    """Batch prompts by length (longest first, so that running out of memory shows at once), in a fixed order."""
    order = sorted(range(len(ids)), key=lambda row: (-len(ids[row]), row))
    shared = _shared_start(ids)
    batches = tuple(
        _batch([order[k] for k in range(at, min(at + batch_size, len(order)))], ids, tree, shared, pad)
        for at in range(0, len(order), batch_size)
    )
    tokens = sum(map(len, ids)) + len(ids) * (len(tree.tokens) - 1)
    return ProbeBatches(batches, tree, len(ids), tokens, shared)


def _batch(rows: list[int], ids: Sequence[Sequence[int]], tree: PrefixTree, shared: int, pad: int) -> ProbeBatch:
    lengths = torch.tensor([len(ids[row]) for row in rows])
    width, nodes = int(lengths.max()) - 1, len(tree.tokens) - 1
    input_ids = torch.full((len(rows), width + 1 + nodes), pad)
    for k, row in enumerate(rows):
        input_ids[k, : len(ids[row]) - 1] = torch.tensor(ids[row][:-1])
        input_ids[k, width] = ids[row][-1]
    input_ids[:, width + 1 :] = torch.tensor(tree.tokens[1:], dtype=torch.long)
    column = torch.arange(width)
    real = column < (lengths - 1).unsqueeze(1)  # [row, width]
    positions = torch.cat(
        [column.expand(len(rows), -1) * real, (lengths - 1).unsqueeze(1) + torch.tensor(tree.depths)], dim=1
    )
    span = torch.cat([real & (column >= shared), torch.ones(len(rows), 1, dtype=torch.bool)], dim=1)
    return ProbeBatch(torch.tensor(rows), lengths, input_ids, positions, _attends(real, tree), span)


def _attends(real: Tensor, tree: PrefixTree) -> Tensor:
    """Who sees whom: prompt tokens causally, tree nodes their prompt and their ancestors, padding only itself."""
    rows, width = real.shape
    size = width + len(tree.tokens)
    mask = torch.zeros(rows, size, size, dtype=torch.bool)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask[:, :width, :width] = causal & real.unsqueeze(1) & real.unsqueeze(2)
    mask[:, width:, :width] = real.unsqueeze(1)
    for node in range(len(tree.tokens)):
        mask[:, width + node, [width, *(width + other for other in tree.ancestors(node))]] = True
    mask |= torch.eye(size, dtype=torch.bool)
    return mask.unsqueeze(1)


def _shared_start(ids: Sequence[Sequence[int]]) -> int:
    """Length of the start that all prompts share (BOS, system header): its activations are outliers, pooled nowhere."""
    shortest = min(map(len, ids)) - 1
    first = np.array(ids[0][:shortest])
    same = np.array([list(row[:shortest]) for row in ids]) == first
    differs = np.flatnonzero(~same.all(axis=0))
    return int(differs[0]) if len(differs) else shortest
