"""Attribution to first order: gradients of the functionals, dotted with what every pair did to the weights.

Shares use the mean of the gradients before and after the window (the trapezoid rule along the step: exact up to third
order in its size). Effects use the gradient after it, where the step without the pair would have ended close by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smda_callbacks.maths.functionals import FunctionalSet
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import LoraSite
from smda_callbacks.observe.probe_gradients import Gradients, gradient_reading
from smda_callbacks.observe.reading import Reading
from smda_callbacks.observe.updates import SiteUpdate
from smda_callbacks.records import Array, PolicyRecord

#: Momentum is followed until this share of a gradient's first push is left.
FADED = 0.1


@dataclass(frozen=True)
class StepUpdate:
    """One optimizer step: its examples' pairs and its update, site by site."""

    ids: tuple[int, ...]  # [example] numbers of pairs
    sites: tuple[SiteUpdate, ...]

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.sites)


@dataclass(frozen=True)
class Entries:
    """Share and effect per example, ``[example, functional]``, with the pairs' numbers.

    ``size``: root mean square of the weights' change that an effect stands for, ``[example]``.
    """

    ids: tuple[int, ...]
    share: Array
    effect: Array
    size: Array


@dataclass(frozen=True)
class Parts:
    """Everything a window's shift is made of, but for what is left over."""

    own: tuple[Entries, ...]
    later: tuple[Entries, ...]
    momentum: Array  # [functional]
    decay: Array  # [functional]


class Ghost:
    """The engine. Keeps the functionals' gradients at the last snapshot, and earlier steps for their momentum.

    ``carry``: book what the momentum does later to the pairs that caused it; ``limit``: bytes of gradients to keep;
    ``renew``: how many features' magnitude gradients every reading takes anew, in turn (None: all of them). The others
    are those of the last readings: what that misses is in ``unexplained``. ``last``: the gradients at the last reading.
    """

    def __init__(
        self,
        instrument: Instrument,
        sites: tuple[LoraSite, ...],
        functionals: FunctionalSet,
        policy: PolicyRecord,
        *,
        carry: bool,
        limit: int,
        renew: int | None = None,
    ) -> None:
        self.carry, self.limit = carry, limit
        self._read = partial(
            gradient_reading, instrument, sites=sites, functionals=functionals, scale=policy.scale, lam=policy.lam
        )
        means = len(functionals.means)
        self._in_turn = [means + k for k, each in enumerate(functionals.shifts) if each.pathway == "x"]
        self._renew = len(self._in_turn) if renew is None else min(renew, len(self._in_turn))
        self._before: Gradients | None = None  # at the window's start
        self.last: Gradients | None = None
        self._past: deque[StepUpdate] = deque()
        self.count = sum(site.weight.numel() for site in sites)

    def read(self, model: nn.Module) -> Reading:
        """A reading that takes the gradients along."""
        stale: list[int] = []
        if self.last is not None:
            stale = self._in_turn[self._renew :]
            self._in_turn = stale + self._in_turn[: self._renew]
        reading, self.last = self._read(model=model, last=self.last, stale=stale)
        return reading

    def open(self, model: nn.Module) -> None:
        """A window starts at ``model`` as it is now, which is where the last reading was taken, if any was."""
        if self.last is None:
            self.read(model)
        self._before = self.last

    def close(self) -> None:
        """The next window is not attributed, or this one could not be: what was kept is of no use."""
        self._before = self.last = None
        self._past.clear()

    def book(self, steps: list[StepUpdate]) -> Parts:
        """Attribute a window of optimizer steps that ends at the last reading.

        Raises RuntimeError where the window was not opened and read.
        """
        if self._before is None or self.last is None or self._before is self.last:
            raise RuntimeError("the window was not read with gradients at its start and its end")
        end = self.last
        mean = tuple((a + b) / 2 for a, b in zip(self._before, end, strict=True))
        try:
            parts = [self._step(step, mean, end) for step in steps]
        except Exception:
            self.close()  # some steps are remembered and others are not: their ages would be wrong
            raise
        return Parts(
            own=tuple(each.own[0] for each in parts),
            later=tuple(entry for each in parts for entry in each.later),
            momentum=_sum([each.momentum for each in parts]),
            decay=_sum([each.decay for each in parts]),
        )

    def _step(self, step: StepUpdate, mean: Gradients, end: Gradients) -> Parts:
        own = self._own(step, mean, end)
        momentum, decay = (
            _dot([part(site).unsqueeze(0) for site in step.sites], mean)[0]
            for part in (SiteUpdate.momentum, SiteUpdate.decay)
        )
        later = self._later(step, mean, end) if self._past else ()
        booked = _sum([momentum * 0.0, *(entry.share.sum(axis=0) for entry in later)])
        self._remember(step)
        return Parts((own,), later, momentum - booked, decay)

    def _own(self, step: StepUpdate, mean: Gradients, end: Gradients) -> Entries:
        share = _dot([site.rows for site in step.sites], [j * (s.clip * s.share_slope()) for s, j in _with(step, mean)])
        return Entries(step.ids, share, *self._effects((site.effects() for site in step.sites), end))

    def _later(self, step: StepUpdate, mean: Gradients, end: Gradients) -> tuple[Entries, ...]:
        """What gradients of earlier steps do in this one."""
        slopes = [site.share_slope() * j for site, j in _with(step, mean)]
        effects_of = [site.rule.later_effects(site.before, site.gradient) for site in step.sites]
        found = []
        for age, past in enumerate(reversed(self._past), start=1):
            faded = [site.rule.faded(age) for site in step.sites]  # groups of parameters may have rules of their own
            share = past.sites[0].clip * _dot([site.rows for site in past.sites], slopes, faded)
            acting = (
                effects(then.missing(), then.gradient, age)
                for effects, then in zip(effects_of, past.sites, strict=True)
            )
            found.append(Entries(past.ids, share, *self._effects(acting, end)))
        return tuple(found)

    def _effects(self, rows: Iterable[Tensor], end: Gradients) -> tuple[Array, Array]:
        """Effects ``[example, functional]`` of directions per site, and their root mean square per weight.

        One site at a time: the directions of all sites are as large as the gradients.
        """
        effects, squares = torch.zeros(1), torch.zeros(1)
        for each, gradient in zip(rows, end, strict=True):
            effects = effects.to(each.device) + (each @ gradient.T).double()
            squares = squares.to(each.device) + torch.linalg.vector_norm(each, dim=1, dtype=torch.float64).square()
        return effects.cpu().numpy(), (squares / self.count).sqrt().cpu().numpy()

    def _remember(self, step: StepUpdate) -> None:
        """Keep a step while its momentum lasts and memory allows; what is forgotten stays in the momentum line."""
        if not self.carry:
            return
        self._past.append(step)
        rules = {site.rule for site in step.sites}
        while self._past and (
            max(rule.faded(len(self._past)) for rule in rules) < FADED
            or sum(each.bytes for each in self._past) > self.limit
        ):
            self._past.popleft()


def _with(step: StepUpdate, gradients: Gradients) -> list[tuple[SiteUpdate, Tensor]]:
    return list(zip(step.sites, gradients, strict=True))


def _dot(rows: list[Tensor], gradients: Gradients | list[Tensor], weights: list[float] | None = None) -> Array:
    """``[row, functional]``: products summed over sites, in the tensors' own precision within a site, in float64 over
    them. ``weights``: of the sites."""
    weights = [1.0] * len(rows) if weights is None else weights
    total = sum(w * (a @ b.T).double() for a, b, w in zip(rows, gradients, weights, strict=True))
    assert isinstance(total, torch.Tensor)
    found: Array = total.cpu().numpy()
    return found


def _sum(arrays: list[Array]) -> Array:
    total: Array = sum(arrays[1:], arrays[0])
    return total
