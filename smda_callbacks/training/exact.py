"""Attribution without approximation: apply every pair's own update, read the probes, put the weights back bit for bit.

A share is the Shapley value of the pair against the rest of the window's update (Shapley 1953): the mean of what the
pair's own update does alone at the start and of what it does last, at the end. An effect is the end as it is minus the
end without what the pair added to the update. Three readings per pair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.lora import LoraSite
from smda_callbacks.observe.updates import SiteUpdate
from smda_callbacks.records import Array
from smda_callbacks.training.ghost import Entries, Parts, StepUpdate

#: A change of the weights: per site ``[out * in]``.
Direction = list[Tensor]

#: The functionals' change between two states, ``[functional]``.
Measure = Callable[[State, State], Array]


@dataclass(frozen=True)
class Exact:
    """The engine. ``measure``: see :func:`smda_callbacks.maths.functionals.measured`."""

    instrument: Instrument
    sites: tuple[LoraSite, ...]
    measure: Measure

    def book(self, model: nn.Module, steps: list[StepUpdate], start: Direction, before: State, after: State) -> Parts:
        """Attribute a window that led from the weights ``start`` to ``model`` as it is now.

        Momentum of earlier steps stays in its own line.
        """
        end = [site.weight.detach().clone().flatten() for site in self.sites]
        pairs = sorted({number for step in steps for number in step.ids})
        share, effect, size = [], [], []
        for pair in pairs:
            own = _sum_of(steps, SiteUpdate.shares, pair)
            share.append(self._share(model, start, end, own, before, after))
            presence = _sum_of(steps, SiteUpdate.effects, pair)
            without = self._at(model, _moved(end, presence, -1.0))
            effect.append(self.measure(without, after))
            size.append(_root_mean_square(presence))
        momentum, decay = (
            self._share(model, start, end, _total(steps, part), before, after)
            for part in (SiteUpdate.momentum, SiteUpdate.decay)
        )
        entries = Entries(tuple(pairs), np.array(share), np.array(effect), np.array(size))
        return Parts((entries,), (), momentum, decay)

    def _share(
        self, model: nn.Module, start: Direction, end: Direction, own: Direction, before: State, after: State
    ) -> Array:
        if not any(bool(each.any()) for each in own):
            return np.zeros_like(self.measure(before, before))
        alone = self.measure(before, self._at(model, _moved(start, own, 1.0)))
        last = self.measure(self._at(model, _moved(end, own, -1.0)), after)
        mean: Array = (alone + last) / 2
        return mean

    def _at(self, model: nn.Module, weights: Direction) -> State:
        """The state of the probes at other weights."""
        parameters = [site.module.weight for site in self.sites]
        with weights_restored(parameters):
            with torch.no_grad():
                for parameter, value in zip(parameters, weights, strict=True):
                    parameter.copy_(value.view_as(parameter))
            reading = self.instrument.read(model)
        return State(*arrays(reading), self.instrument.scores(reading))


def _moved(weights: Direction, direction: Direction, sign: float) -> Direction:
    return [a + sign * b.to(a) for a, b in zip(weights, direction, strict=True)]


def _sum_of(steps: list[StepUpdate], part: Callable[[SiteUpdate], Tensor], pair: int) -> Direction:
    """A pair's directions summed over its examples in all steps."""
    rows = [[k for k, number in enumerate(step.ids) if number == pair] for step in steps]
    return [
        torch.stack(
            [part(step.sites[k].of_examples(own)).sum(dim=0) for step, own in zip(steps, rows, strict=True)]
        ).sum(0)
        for k in range(len(steps[0].sites))
    ]


def _total(steps: list[StepUpdate], part: Callable[[SiteUpdate], Tensor]) -> Direction:
    return [torch.stack([part(step.sites[k]) for step in steps]).sum(dim=0) for k in range(len(steps[0].sites))]


def _root_mean_square(direction: Direction) -> float:
    squares = sum(float(each.double().square().sum()) for each in direction)
    return float((squares / sum(each.numel() for each in direction)) ** 0.5)
