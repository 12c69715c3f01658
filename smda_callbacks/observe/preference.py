"""Reward models: which opening of an answer they prefer, read from their own scores.

A reward model gives no probability to an answer, but a score s to a text. Trained by pairs as Bradley and Terry (1952)
have it, it prefers the answer a to b with probability sigmoid(s_a - s_b). Among several openings the same model is
Luce's choice (1959): opening o is the preferred one with probability proportional to exp(s_o). Here every list of
openings (refusals, compliances) starts with the same weight, however long it is, so that equal scores give 1/2::

    P(o) = exp(s_o) / n(o)  /  sum of the same over all openings       n(o): length of the list that o stands in

A scorer then sees log P(o) where it sees the log-probability of the opening in a language model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.prefixes import PrefixError, PrefixTree, build_tree
from smda_callbacks.records import Array

#: Stands behind the last token of every opening in the tree: there the text ends and is scored.
END = -1


def has_language_head(model: nn.Module) -> bool:
    """Whether ``model`` gives next-token probabilities."""
    inner = unwrap(model)
    return hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None


def scores_texts(model: nn.Module) -> bool:
    """Whether ``model`` is a classifier on a decoder, with the head ``score``: reward models are."""
    return not has_language_head(model) and isinstance(getattr(unwrap(model), "score", None), nn.Module)


def preference_tree(lists: Sequence[Sequence[str]], encode: Callable[[str], Sequence[int]]) -> PrefixTree:
    """The tree of the openings in ``lists``, whole: the last token of each is a node too, for it is scored there.

    Raises:
        PrefixError: there is one list only, and so nothing to choose between.
    """
    length: dict[str, int] = {}
    for each in lists:
        for text in each:
            length.setdefault(text, len(each))
    if len(lists) < 2:
        raise PrefixError(
            "a reward model's behaviour is a choice between openings, and there is one list of them only. Next step: "
            "give openings to compare with (behaviour.compliances; contrast of a Plan)."
        )

    def whole(text: str) -> list[int]:
        tokens = list(encode(text))
        return [*tokens, END] if tokens else []

    tree = build_tree(list(length), whole)
    return replace(
        tree,
        token_paths=tuple(path[:-1] for path in tree.token_paths),
        prior=tuple(-log(n) for n in length.values()),
    )


def score_edges(model: Any, inputs: dict[str, Any], tree: PrefixTree) -> Tensor:
    """One pass: the model's score where an opening ends, 0 at the tree's other edges; ``[row, edge]`` float32."""
    with scored(model) as seen:
        model(**inputs)
    nodes = torch.from_numpy(tree.edge_nodes).to(seen[0].device)
    ends = torch.from_numpy(tree.edge_tokens == END).to(seen[0].device)
    scores = seen[0][:, -len(tree.tokens) :, 0].float()
    return torch.where(ends, scores[:, nodes], 0.0)


def choice_log_probs(scores: Array, prior: Sequence[float]) -> Array:
    """Scores ``[row, opening]`` -> log P(the opening is the preferred one) ``[row, opening]``; the sum over P is 1."""
    weighted = scores + np.asarray(prior)
    with np.errstate(invalid="ignore"):  # a score that is not finite makes its row NaN, which readings refuse
        weighted = weighted - weighted.max(axis=1, keepdims=True)
        found: Array = weighted - np.log(np.exp(weighted).sum(axis=1, keepdims=True))
    return found


@contextlib.contextmanager
def scored(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context that collects what the model's head gives for every token, ``[row, token, 1]`` per forward pass.

    The model itself keeps that of the last token of a row alone.
    """
    seen: list[Tensor] = []
    handle = unwrap(model).score.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
