"""What a feature is about: the probes that activate it, the tokens that it promotes, a link to its dashboard."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.preference import has_language_head
from smda_callbacks.observe.probes import ProbeSet
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.observe.sharding import Team, whole_weights
from smda_callbacks.records import Array, FeatureLabel


def label_features(
    handle: SAEHandle,
    model: nn.Module,
    tokenizer: Any,
    probes: ProbeSet,
    features: np.ndarray,
    x: Array,
    *,
    top: int = 5,
    team: Team | None = None,
) -> tuple[FeatureLabel, ...]:
    """Labels of ``features`` (SAE indices) from their activations ``x [probe, feature]`` and decoder directions.

    Promoted tokens are the largest entries of W_dec[feature] @ W_U, the direct path to the logits without the final
    norm: a hint, not a measurement. A reward model promotes none.
    """
    promoted, suppressed = _token_effects(handle, model, tokenizer, features, top, team)
    labels = []
    for column, feature in enumerate(features):
        order = np.argsort(-x[:, column], kind="stable")[:top]
        labels.append(
            FeatureLabel(
                feature=int(feature),
                top_probes=tuple((probes.probes[i].id, float(x[i, column])) for i in order if x[i, column] > 0),
                promoted=promoted[column],
                suppressed=suppressed[column],
                url=f"https://neuronpedia.org/{handle.neuronpedia_id}/{feature}" if handle.neuronpedia_id else None,
            )
        )
    return tuple(labels)


def _token_effects(
    handle: SAEHandle, model: nn.Module, tokenizer: Any, features: np.ndarray, top: int, team: Team | None
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    if not has_language_head(model):
        return [()] * len(features), [()] * len(features)
    [unembedding] = whole_weights(model, [unwrap(model).get_output_embeddings().weight], team, keep=lambda whole: whole)
    with torch.no_grad():
        directions = handle.sae.W_dec[torch.as_tensor(features, device=handle.sae.W_dec.device)]
        effects = directions.to(unembedding.device, unembedding.dtype) @ unembedding.T
        special = torch.zeros(effects.shape[1], dtype=torch.bool, device=effects.device)
        special[tokenizer.all_special_ids] = True  # <pad> and the like are never said: they say nothing of a feature
        high = effects.masked_fill(special, -torch.inf).topk(top, dim=1).indices.tolist()
        low = (-effects).masked_fill(special, -torch.inf).topk(top, dim=1).indices.tolist()
    return _words(tokenizer, high), _words(tokenizer, low)


def _words(tokenizer: Any, rows: list[list[int]]) -> list[tuple[str, ...]]:
    return [tuple(tokenizer.decode([token]) for token in row) for row in rows]
