"""What attributing pairs costs: the part of recipes/benchmark_overhead.py that is about training pairs.

* ``capture_over_train_step``: a training step in which the gradients of single pairs are captured, over the same step
  without, in processor time.
* ``ghost_over_probe_backward``: all that engine ghost adds to a measured step (capturing, splitting the update over
  pairs, gradients of all functionals, momentum, books), over one forward and backward pass of all probes for one
  functional by plain autograd, in processor time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recipes.benchmark_maths import Figure, in_turns
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.observe.reading import tree_pass
from smda_callbacks.training.monitor import Monitor

MAX_NORM = 1.0


class Step:
    """A training step on one batch, captured or not, as the trainer and the callback make it."""

    def __init__(self, model: Any, monitor: Monitor, batch: dict[str, Tensor]) -> None:
        self.model, self.batch, self.sites = model, batch, lora_sites(model)
        self.optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-5)
        instrument = monitor.instrument
        self.capture = PairCapture(
            model, self.sites, site=instrument.handle.site, readout=instrument.readout, limit=2**32
        )

    def plain(self) -> None:
        self._gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def captured(self) -> None:
        self.capture.attach()
        self._gradients()
        self.capture.stop()
        self.capture.take()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self) -> None:
        self.model.train()
        self.model(**self.batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(self.model), MAX_NORM)


def capture(step: Step, repeats: int, device: str) -> Iterator[Figure]:
    """Capturing over a plain step; short steps are taken several at a time."""

    def several(one: Callable[[], None]) -> None:
        for _ in range(5):
            one()

    turns = in_turns(partial(several, step.captured), partial(several, step.plain), max(repeats, 10), device)
    yield Figure("capture_over_train_step", [a.cpu / b.cpu for a, b in turns], "<= 1.10")


def ghost(model: Any, monitor: Monitor, plain: Monitor, step: Step, repeats: int, device: str) -> Iterator[Figure]:
    """What a step with its window costs more with pairs than without (``plain``), over one probe backward pass."""
    attributor, instrument = monitor.attributor, monitor.instrument
    assert attributor is not None
    numbers = iter(range(1, 10 * repeats + 10))

    def train() -> None:
        attributor.begin_step()
        step._gradients()
        attributor.before_step(step.optimizer)
        step.optimizer.step()
        attributor.after_step(step.optimizer)
        step.optimizer.zero_grad()

    def with_pairs() -> None:
        train()
        number = next(numbers)
        assert monitor.measure(model, number, number, (), {}).pairs is not None

    def without() -> None:
        step.plain()
        number = next(numbers)
        assert plain.measure(model, number, number, (), {}).pairs is None

    def probe_backward() -> None:
        with measuring(model, gradients=True):
            for batch in instrument.batches.batches:
                _, edges = tree_pass(model, batch.to(torch.device(device)), instrument.batches, instrument.handle.site)
                torch.autograd.grad(edges.exp().sum(), trained_parameters(model), allow_unused=True)

    with_and_without = in_turns(with_pairs, without, repeats, device)
    unit = in_turns(probe_backward, without, repeats, device)
    values = [(a.cpu - b.cpu) / c.cpu for (a, b), (c, _) in zip(with_and_without, unit, strict=True)]
    yield Figure("ghost_over_probe_backward", values, "<= 1.0")
