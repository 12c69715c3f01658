"""Pairs of a run: which examples were in a step, what the step did, and the books of every window.

The order of events of one attributed optimizer step::

    begin_step      * capture on
    forward, backward of every micro-batch: gradients of examples are captured
    before_step     * capture off; copy what the optimizer is about to overwrite
    optimizer step
    after_step      * split the update over the examples
    book            * after the reading: gradients of the functionals, books of the window
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from smda_callbacks.maths.functionals import FunctionalSet, measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.divided import BrokenPassError
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import AttributionError, LoraSite
from smda_callbacks.observe.memory import is_out_of_memory
from smda_callbacks.observe.optimizer_rules import Moments
from smda_callbacks.observe.pair_gradients import PairCapture
from smda_callbacks.observe.pair_team import TeamCapture
from smda_callbacks.observe.probe_gradients import NO_ROOM
from smda_callbacks.observe.reading import Reading
from smda_callbacks.observe.sharding import ProcessError
from smda_callbacks.observe.updates import moments_before, site_updates
from smda_callbacks.records import Pair, PairBook, PolicyRecord, Snapshot
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.exact import Exact
from smda_callbacks.training.ghost import Ghost, StepUpdate
from smda_callbacks.training.pair_book import intended_features, pair_book, update_error
from smda_callbacks.training.row_identity import PairIndex


@dataclass
class _Window:
    """What was captured since the last snapshot."""

    start: list[torch.Tensor]  # trained weights at the snapshot
    steps: list[StepUpdate] = field(default_factory=list)
    prompts: dict[int, torch.Tensor] = field(default_factory=dict)  # pair -> residual stream at its read-out span
    capture_error: float = 0.0
    held: int = 0
    seconds: float = 0.0


class Attributor:
    """Attributes the windows of one run to its training pairs."""

    def __init__(
        self,
        engine: Ghost | Exact,
        options: AttributionOptions,
        instrument: Instrument,
        policy: PolicyRecord,
        functionals: FunctionalSet,
        sites: tuple[LoraSite, ...],
        capture: PairCapture | TeamCapture,
        index: PairIndex,
        max_norm: float,
    ) -> None:
        self.engine, self.options, self.functionals, self.index = engine, options, functionals, index
        self._instrument, self._policy, self._sites, self._capture = instrument, policy, sites, capture
        self._max_norm = max_norm
        self.measure = partial(measured, functionals, scale=policy.scale, lam=policy.lam)
        self._described: set[int] = set()
        self._number = 0  # of windows opened
        self._window: _Window | None = None
        self._before: tuple[Moments, ...] | None = None
        self._fault: str | None = None
        self._passed: str | None = None  # why the window is left out that otherwise would be attributed
        self._off: str | None = None

    def continue_from(self, windows: int, pairs: Collection[int]) -> None:
        """Number on where a run stopped, after so many windows and with these pairs described. Call before ``open``."""
        self._number, self._described = windows, set(pairs)
        self.index.continue_from(max(pairs, default=-1) + 1)

    def open(self, model: nn.Module) -> None:
        """A window starts at ``model`` as it is now, right after a snapshot."""
        wanted = self._wants(self._number)
        self._number += 1
        self._window, self._fault, self._passed = None, None, None
        began = time.perf_counter()
        if wanted:
            self._window = _Window([site.weight.detach().clone().flatten() for site in self._sites])
        if isinstance(self.engine, Ghost):
            if wanted:
                self.engine.open(model)
            else:
                self.engine.close()
        if not wanted:
            self._capture.detach()
        if self._window is not None:
            self._window.seconds = time.perf_counter() - began

    def _wants(self, number: int) -> bool:
        return self._off is None and number % self.options.every == 0

    def read(self, model: nn.Module) -> Reading:
        """A reading of the probes, with gradients where this window or the next needs them."""
        live = self._window is not None and self._fault is None
        if not isinstance(self.engine, Ghost) or not (live or self._wants(self._number)):
            return self._instrument.read(model)
        began = time.perf_counter()
        try:
            reading = self.engine.read(model)
        except BrokenPassError:
            raise
        except ProcessError as error:  # another process's share of the gradients
            self.skip(str(error))
            self.engine.close()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.skip(NO_ROOM)
            self._instrument.savings.lower.give_way("gradients")
            self.engine.close()  # the gradients kept are those of another reading: no window may start at them
        else:
            if self._window is not None:
                self._window.seconds += time.perf_counter() - began
            return reading
        return self._instrument.read(model)

    def begin_step(self) -> None:
        """Before the step's first forward pass."""
        if self._window is not None and self._fault is None:
            self._capture.attach()

    def before_step(self, optimizer: Any) -> None:
        """After the backward passes and clipping, before the optimizer's step."""
        self._capture.stop()
        if self._window is not None and self._fault is None:
            self._before = moments_before(optimizer, self._sites)

    def after_step(self, optimizer: Any) -> None:
        """After the optimizer's step, before gradients are zeroed and the scheduler moves on."""
        try:
            self._after_step(optimizer)
        finally:
            if isinstance(self._capture, TeamCapture):
                self._capture.settle()

    def promise(self) -> bool:
        """Whether the examples of the steps to come are wanted, which other processes are told then."""
        wanted = self._window is not None and self._fault is None
        if isinstance(self._capture, TeamCapture):
            self._capture.promised = wanted
        return wanted

    def _after_step(self, optimizer: Any) -> None:
        before, self._before = self._before, None
        if self._window is None or before is None:
            return
        began = time.perf_counter()
        try:
            self._add_step(self._window, before, optimizer)
        except AttributionError as error:
            self._fault = str(error)
        self._window.seconds += time.perf_counter() - began

    def _add_step(self, window: _Window, before: tuple[Moments, ...], optimizer: Any) -> None:
        captured = self._capture.take()
        updates, error = site_updates(captured.gradients, before, optimizer, self._sites, self._max_norm)
        if not error < CAPTURE_LIMIT:
            raise AttributionError(
                f"the captured gradients miss {error:.1%} of the optimizer's gradient (limit: {CAPTURE_LIMIT:.0%}): "
                "something else adds to it, or a matrix is used in a way that is not known"
            )
        ids = tuple(self.index.pair_of(each.key, each.tokens) for each in captured.examples)
        for number, prompt in zip(ids, captured.prompts, strict=True):
            if prompt is not None:
                window.prompts[number] = prompt
        self._capture.release()
        step = StepUpdate(ids, updates)
        window.held += step.bytes
        if window.held > self.options.limit:
            raise AttributionError(
                f"the gradients of this window's pairs need more than the {self.options.memory_gib:g} GiB of "
                "attribution.memory_gib. Next step: raise it, or lower measure.every"
            )
        window.steps.append(step)
        window.capture_error = max(window.capture_error, error)

    def end(self) -> None:
        """The run is over: take the hooks off."""
        self._capture.detach()

    def pass_over(self, why: str) -> None:
        """The window that is open is not to be attributed: it began before this training did."""
        self._window, self._passed = None, why
        self._capture.detach()
        if isinstance(self.engine, Ghost):
            self.engine.close()

    def switch_off(self, why: str) -> None:
        """No window that is opened from now on is attributed; its cost ends with the hooks and gradients."""
        self._off = why
        self.pass_over(why)

    @property
    def left_out(self) -> str | None:
        """Why the open window is not to be attributed; None where it is, or where ``options.every`` leaves it out."""
        return self._off or self._passed

    def skip(self, why: str) -> None:
        """This window cannot be attributed."""
        self._fault = self._fault or why

    def book(self, model: nn.Module, before: Snapshot, after: Snapshot) -> tuple[PairBook, tuple[Pair, ...]] | None:
        """The books of the window from ``before`` to ``after``, and the pairs that were seen for the first time.

        None where the window was not to be attributed.

        Raises:
            AttributionError: it was, but cannot be; says why.
        """
        window = self._window
        if window is None and self._fault is None:
            return None
        if window is None or self._fault is not None or not window.steps:
            if isinstance(self.engine, Ghost):
                self.engine.close()
            raise AttributionError(self._fault or "no optimizer step was seen in this window")
        began = time.perf_counter()
        start, end = _state(before), _state(after)
        if isinstance(self.engine, Ghost):
            parts = self.engine.book(window.steps)
        else:
            parts = self.engine.book(model, window.steps, window.start, start, end)
        book = pair_book(
            parts,
            self.measure(start, end),
            engine="ghost" if isinstance(self.engine, Ghost) else "exact",
            intended=partial(self._intended, window),
            held_bytes=window.held,
            capture_error=window.capture_error,
            update_error=update_error(self._sites, window.start, window.steps),
        )
        seen = self._describe([*book.ids.tolist(), *book.later_ids.tolist()])
        return replace(book, seconds=window.seconds + time.perf_counter() - began), seen

    def _intended(self, window: _Window, number: int) -> list[int]:
        return intended_features(window.prompts.get(number), self._instrument, self._policy, self.options.intended)

    def _describe(self, numbers: Sequence[int]) -> tuple[Pair, ...]:
        fresh = [number for number in dict.fromkeys(numbers) if number not in self._described]
        seen = tuple(self.index.describe(number) for number in fresh)
        self._described.update(fresh)  # only now: one that cannot be described is tried again
        return seen


#: Beyond this the captured gradients are not those of the training. bf16 rounds to about 0.002.
CAPTURE_LIMIT = 0.05


def _state(snapshot: Snapshot) -> State:
    return State(snapshot.pre, snapshot.gate, snapshot.y)
