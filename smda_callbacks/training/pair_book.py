"""The books of a window's pairs, put together from what an engine found; and what is noted beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smda_callbacks.maths.ledger import close_books
from smda_callbacks.observe.features import pool
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import LoraSite
from smda_callbacks.records import Array, PairBook, PolicyRecord
from smda_callbacks.training.ghost import Entries, Parts, StepUpdate


def pair_book(
    parts: Parts,
    change: Array,
    *,
    engine: Literal["ghost", "exact"],
    intended: Callable[[int], list[int]],
    **noted: Any,
) -> PairBook:
    """Books that close: shares, momentum, decay and what is left over sum to ``change [functional]``.

    Args:
        intended: of a pair's number, the positions of the features that it is about.
        noted: the further fields of a :class:`PairBook`; its ``seconds`` are zero.
    """
    ids, share, effect, size = _by_pair(parts.own, len(change))
    later_ids, later_share, later_effect, later_size = _by_pair(parts.later, len(change))
    return PairBook(
        engine=engine,
        ids=ids,
        share=share,
        effect=effect,
        later_ids=later_ids,
        later_share=later_share,
        later_effect=later_effect,
        later_size=later_size,
        lines=close_books(change, share, later_share, momentum=parts.momentum, decay=parts.decay),
        size=size,
        intended=np.array([intended(int(number)) for number in ids], dtype=np.int64),
        seconds=0.0,
        **noted,
    )


def _by_pair(entries: Sequence[Entries], functionals: int) -> tuple[NDArray[np.int64], Array, Array, Array]:
    """Entries of equal pairs added up: numbers ascending, shares, effects, sizes."""
    numbers = np.array([number for each in entries for number in each.ids], dtype=np.int64)
    ids, place = np.unique(numbers, return_inverse=True)

    def gather(part: Callable[[Entries], Array], shape: tuple[int, ...]) -> Array:
        total = np.zeros((len(ids), *shape))
        if len(numbers):
            np.add.at(total, place, np.concatenate([part(each) for each in entries]))
        return total

    return (
        ids,
        gather(lambda each: each.share, (functionals,)),
        gather(lambda each: each.effect, (functionals,)),
        gather(lambda each: each.size, ()),
    )


def intended_features(prompt: Tensor | None, instrument: Instrument, policy: PolicyRecord, most: int) -> list[int]:
    """Positions of the features that a pair's own prompt activates most, by activation times |coefficient|.

    ``prompt``: residual stream at its read-out span ``[token, d_in]``. As many as ``most`` or the policy has; -1 where
    fewer are active, or the prompt is not known.
    """
    most = min(most, len(policy.features))
    if prompt is None:
        return [-1] * most
    with torch.no_grad():
        pre, gate = instrument.encode(prompt.unsqueeze(0))
        span = torch.ones(pre.shape[:2], dtype=torch.bool, device=pre.device)
        pre, gate = pool(pre, gate, span, instrument.readout)
    active = (pre * gate)[0].double().cpu().numpy() / policy.scale
    weight = active * np.abs(policy.coef).sum(axis=1)
    order = np.argsort(-weight, kind="stable")[:most]
    return [int(place) if weight[place] > 0 else -1 for place in order]


def update_error(sites: Sequence[LoraSite], start: Sequence[Tensor], steps: Sequence[StepUpdate]) -> float:
    """Share of the real update since the weights ``start`` that its parts miss: rounding, where AdamW divides tiny
    gradients by themselves."""
    missed = moved = 0.0
    for number, site in enumerate(sites):
        real = (site.weight.detach().flatten() - start[number]).double()
        parts = [step.sites[number] for step in steps]
        told = sum((p.shares().sum(dim=0) + p.momentum() + p.decay()).double() for p in parts)
        missed += float((real - told).square().sum())
        moved += float(real.square().sum())
    return (missed / moved) ** 0.5 if moved else 0.0
