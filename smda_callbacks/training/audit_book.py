"""The book of a pair that was alone in its update: what it did, and which features it intended.

A pair intends the features that are active on its own prompt, where its answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from smda_callbacks.observe.activations import captured
from smda_callbacks.observe.features import pool
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.records import LINES, Array, PairBook, PolicyRecord
from smda_callbacks.training.audit_pairs import AuditPair


def strongest(x: NDArray[np.float64], policy: PolicyRecord, most: int) -> NDArray[np.int64]:
    """Positions of the features with the largest activation times absolute coefficient, all behaviours together.

    Args:
        x: activations ``[feature]``; features that are not active are never intended.

    Returns:
        ``[most]`` (or one per feature, if that is less), strongest first, -1 where fewer are active.
    """
    weight = x / policy.scale * np.abs(policy.coef).sum(axis=1)
    order = np.argsort(-weight, kind="stable")[:most]
    return np.where(weight[order] > 0, order, -1).astype(np.int64)


class Intent:
    """Reads the prompts of pairs on the model as it is when it is asked, each once."""

    def __init__(self, instrument: Instrument, policy: PolicyRecord, pairs: Sequence[AuditPair], most: int) -> None:
        self.instrument, self.policy, self.pairs, self.most = instrument, policy, pairs, most
        self._shared = shared_start([pair.prompt_ids for pair in pairs])
        self._found: dict[int, NDArray[np.int64]] = {}

    def of(self, place: int, model: nn.Module) -> NDArray[np.int64]:
        """What the pair at ``place`` intends, ``[most]`` positions in the policy's features."""
        if place not in self._found:
            self._found[place] = strongest(self._activations(place, model), self.policy, self.most)
        return self._found[place]

    def _activations(self, place: int, model: nn.Module) -> NDArray[np.float64]:
        ids = torch.tensor([self.pairs[place].prompt_ids], device=next(model.parameters()).device)
        with measuring(model), captured(model, self.instrument.handle.site) as seen:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
            stream = seen[0].float()
            last = self.instrument.readout == "last"
            pre, gate = self.instrument.encode(stream[:, -1:] if last else stream)
            span = torch.ones_like(ids, dtype=torch.bool)
            span[:, : min(self._shared, ids.shape[1] - 1)] = False
            pre, gate = pool(pre, gate, span, self.instrument.readout)
        return (gate * pre)[0].double().cpu().numpy()


def shared_start(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the start that all prompts share, which is of the template and pooled nowhere; 0 for one prompt."""
    if len(prompts) < 2:
        return 0
    columns = zip(*prompts, strict=False)
    return next((k for k, column in enumerate(columns) if len(set(column)) > 1), min(map(len, prompts)))


def alone(pair: int, moved: Array, size: float, intended: np.ndarray, seconds: float) -> PairBook:
    """The book of a window that one pair made: share and effect are what was measured, and the lines are empty."""
    nothing = np.zeros_like(moved)
    none = np.zeros((0, len(moved)))
    return PairBook(
        engine="exact",
        ids=np.array([pair], dtype=np.int64),
        share=moved[None].copy(),
        effect=moved[None].copy(),
        later_ids=np.zeros(0, dtype=np.int64),
        later_share=none,
        later_effect=none,
        later_size=np.zeros(0),
        lines={**dict.fromkeys(LINES, nothing), "measured": moved},
        size=np.array([size]),
        intended=intended[None],
        seconds=seconds,
        held_bytes=0,
        capture_error=0.0,
        update_error=0.0,
    )
