"""What attributing pairs costs: the part of recipes/benchmark_overhead.py that is about training pairs.

* ``capture_over_train_step``: a step of TRL's training in which the gradients of single pairs are captured, over the
  same step without: two runs, each of which captures what the other does not. In processor time (on a
  GPU: by the clock).
* ``ghost_over_probe_backward``: all that engine ghost adds to a measured step (capturing, splitting the update over
  pairs, gradients of all functionals, momentum, books), over one forward and backward pass of all probes for one
  functional by plain autograd, in processor time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from recipes.benchmark_maths import Figure, in_turns
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.lora import lora_sites
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.observe.passes import tree_pass
from smda_callbacks.training.monitor import Monitor

MAX_NORM = 1.0


class Step:
    """A training step on one batch, as the trainer makes it."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-5)

    def plain(self) -> None:
        self._gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _gradients(self) -> None:
        self.model.train()
        self.model(**self.batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained_parameters(self.model), MAX_NORM)


class InTurns(TrainerCallback):
    """Captures five steps of a training run, leaves the next five alone, and so on; times all of them."""

    def __init__(self, settings: dict[str, Any], device: str, first: bool) -> None:
        self.settings, self.device, self.first = settings, device, first
        self.seconds: list[float] = []
        self._last = math.nan

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.capture = PairCapture(model, lora_sites(model), **self.settings)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.captures(state.global_step):
            self.capture.attach()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.captures(state.global_step):
            self.capture.stop()
            self.capture.take()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.captures(state.global_step):
            self.capture.detach()
        now = clock(self.device)
        self.seconds.append(now - self._last)
        self._last = now

    def captures(self, steps_done: int) -> bool:
        return (steps_done // 5 % 2 == 0) == self.first


def capture(
    train: Callable[[TrainerCallback], Any], settings: dict[str, Any], repeats: int, device: str
) -> Iterator[Figure]:
    """Capturing over plain steps of the same numbers, the first two left out."""
    values = []
    for _ in range(repeats):
        runs = [InTurns(settings, device, first) for first in (True, False)]
        for run in runs:
            train(run)
        steps = range(2, len(runs[0].seconds))
        captured, plain = (
            sum(run.seconds[step] for run in runs for step in steps if run.captures(step) == wanted)
            for wanted in (True, False)
        )
        values.append(captured / plain)
    yield Figure("capture_over_train_step", values, "<= 1.10")


def clock(device: str) -> float:
    """Seconds: of the processor, or by the clock after a GPU's work."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


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
