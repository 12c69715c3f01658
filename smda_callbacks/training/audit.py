"""What does every pair do alone? One update per pair from the same start, and one reading (SMDA, arXiv 2606.29171).

Every window is one pair and one repeat, and is the change from the baseline; nothing is chained, so that the order of
the pairs does not matter and a stopped audit goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from smda_callbacks.maths.functionals import measured
from smda_callbacks.observe.distil import distil
from smda_callbacks.observe.health import HealthMeter
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.reading import NotFiniteError
from smda_callbacks.records import PolicyRecord, RunEnd, RunStart, WindowRecord, policy_hash
from smda_callbacks.sinks.base import Sink
from smda_callbacks.training.audit_book import Intent, alone
from smda_callbacks.training.audit_pairs import AuditPair, check_lengths
from smda_callbacks.training.audit_start import (
    all_functionals,
    audit_manifest,
    check_same_audit,
    refuse_if_other,
    state_of,
    update_floor,
)
from smda_callbacks.training.audit_step import Adapter, AuditOptions, fresh_adapter, train_on
from smda_callbacks.training.booking import book_window, gaps_of, refit
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.policy_check import check_policy

logger = logging.getLogger("smda_callbacks")


@dataclass(frozen=True)
class Stored:
    """An audit to go on with: what it was opened with, its last step (0: none), and whether it has ended."""

    start: RunStart
    last: int
    finished: bool = False


def run_audit(
    plan: Plan,
    options: AuditOptions,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[AuditPair],
    sinks: Sequence[Sink],
    *,
    stored: Stored | None = None,
) -> RunEnd:
    """Audit ``pairs`` on ``model`` and hand the records to ``sinks``; the model is the same afterwards, bit for bit.

    Pair ``p`` (from 0) in repeat ``r`` is step ``p * repeats + r + 1``. A reading that is not finite, or that fails, is
    recorded as such. Whatever stops the audit, Ctrl-C included, the sinks are closed as ``interrupted`` first.

    Args:
        stored: go on with this audit behind its last step; the sinks must be those of its store, to be resumed. Of one
            that has finished no more than identity is checked.

    Raises:
        AuditError: the model has an adapter, or ``stored`` is another audit, or the model reads differently here.
        SAEError, HookError, ProbeError, PrefixError, ValueError: what does not fit together.
    """
    total, done = len(pairs) * options.repeats, stored.last if stored else 0
    with fresh_adapter(model, options) as adapter, contextlib.ExitStack() as closing:
        bench = _Bench(plan, options, adapter, tokenizer, pairs, stored)
        sinks = () if stored and stored.finished else sinks
        # A store is resumed behind the step of the baseline that it is opened with.
        opened = replace(bench.start, baseline=replace(bench.start.baseline, step=done)) if done else bench.start
        for sink in sinks:
            sink.open(opened)
        end, began = RunEnd(done, "interrupted", 0.0, 0.0, bench.start.gaps), time.perf_counter()
        closing.callback(lambda: _close(sinks, end))
        for step in tqdm(range(done + 1, total + 1), **_bar(total, done, options)):
            window = bench.window(step)
            for sink in sinks:
                sink.write(window)
            seconds = end.seconds + window.seconds
            end = replace(end, step=step, seconds=seconds, train_seconds=time.perf_counter() - began)
        end = replace(end, status="finished")
    return end


def _close(sinks: Sequence[Sink], end: RunEnd) -> None:
    for sink in sinks:
        sink.close(end)


def _bar(total: int, done: int, options: AuditOptions) -> dict[str, Any]:
    """A progress bar with rate and end estimate; a line twice a minute where the output is a file."""
    return {
        "total": total,
        "initial": done,
        "desc": "SMDA audit",
        "unit": "pair" if options.repeats == 1 else "step",
        "mininterval": 0.5 if sys.stderr.isatty() else 30,
    }


class _Bench:
    """One fixed model with its adapter, instrument, policy and baseline."""

    def __init__(
        self,
        plan: Plan,
        options: AuditOptions,
        adapter: Adapter,
        tokenizer: Any,
        pairs: Sequence[AuditPair],
        stored: Stored | None,
    ) -> None:
        check_lengths(pairs, getattr(adapter.model.config.get_text_config(), "max_position_embeddings", None))
        self.plan, self.options, self.adapter, self.pairs = plan, options, adapter, pairs
        self.told_failure = False
        full = plan.instrument(adapter.model, tokenizer, plan.load_sae(), gradients=False)
        self.policy = self._policy(full, tokenizer, stored)
        self.functionals = all_functionals(self.policy, plan.probes)
        self.instrument = full.of_features(self.policy.features)
        # Read as every window will be, so that a pair that moves nothing has a shift of exactly zero.
        reading = self.instrument.read(adapter.model)
        self.snapshot, self.hidden = self.instrument.snapshot(0, reading), reading.hidden
        self.health = HealthMeter(full.handle, reading.hidden)
        self.intent = Intent(self.instrument, self.policy, pairs, plan.attribution.intended)
        manifest = audit_manifest(plan, options, self.instrument, self.policy, adapter.model, pairs, self.functionals)
        if stored is not None:
            check_same_audit(stored.start, manifest, self.snapshot)
        self.start = self._start(manifest) if stored is None else stored.start

    def _policy(self, full: Instrument, tokenizer: Any, stored: Stored | None) -> PolicyRecord:
        policy = self.plan.policy if stored is None else stored.start.policy
        if policy is None:
            return distil(full, self.adapter.model, tokenizer, self.plan.distil)[0]
        check_policy(policy, full)
        if self.plan.policy is not None and policy_hash(policy) != policy_hash(self.plan.policy):
            refuse_if_other(["the policy of the store is not that of policy.path"])
        return policy

    def _start(self, manifest: Mapping[str, Any]) -> RunStart:
        plan, fit = self.plan, refit(self.snapshot, self.policy)
        baseline = WindowRecord(
            step=0,
            first_step=0,
            skipped=(),
            status="ok",
            seconds=0.0,
            snapshot=self.snapshot,
            health=self._health(self.hidden),
            **fit,
        )
        noise = None
        if plan.noise_draws:
            noise = update_floor(
                self.instrument,
                self.adapter,
                self.policy,
                self.snapshot,
                self.functionals,
                self.options,
                draws=plan.noise_draws,
                seed=plan.seed,
            )
        gaps = gaps_of(self.snapshot, self.policy, plan.probes.probes, fit)
        return RunStart(manifest, plan.probes.probes, self.policy, baseline, gaps, noise)

    def window(self, step: int) -> WindowRecord:
        """The record of one step: one pair in one repeat, from its start."""
        place, repeat = divmod(step - 1, self.options.repeats)
        head: dict[str, Any] = {
            "step": step,
            "first_step": step,
            "skipped": (),
            "pairs_seen": (self.pairs[place].pair,) if repeat == 0 else (),
        }
        began = time.perf_counter()
        try:
            return self._window(place, repeat, head)
        except NotFiniteError as error:
            status, reason = "not_finite", str(error)
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            status, reason = "failed", f"{type(error).__name__}: {error}"
            self._tell(step, reason)
        finally:
            self.adapter.reset(repeat)
        seconds = time.perf_counter() - began
        return WindowRecord(status=status, seconds=seconds, error=reason, **head)  # type: ignore[arg-type]

    def _window(self, place: int, repeat: int, head: dict[str, Any]) -> WindowRecord:
        began = time.perf_counter()
        self.adapter.reset(repeat)
        intended = self.intent.of(place, self.adapter.model)
        loss, size = train_on(self.adapter, self.pairs[place], repeat, self.options)
        trained = time.perf_counter()
        reading = self.instrument.read(self.adapter.model)
        snapshot = self.instrument.snapshot(head["step"], reading)
        booked = book_window(self.snapshot, snapshot, self.policy, self.plan.probes.groups, seed=self.plan.seed)
        moved = measured(
            self.functionals,
            state_of(self.snapshot),
            state_of(snapshot),
            scale=self.policy.scale,
            lam=self.policy.lam,
        )
        checked = (head["step"] - 1) % self.plan.health_every == 0
        return WindowRecord(
            status="ok",
            update_rms=size,
            snapshot=snapshot,
            health=self._health(reading.hidden) if checked else None,
            trainer={"loss": loss, "learning_rate": self.options.learning_rate},
            pairs=alone(self.pairs[place].pair.id, moved, size, intended, trained - began),
            seconds=time.perf_counter() - trained,
            **head,
            **booked.fields(),
        )

    def _health(self, hidden: Any) -> Any:
        """Health against the baseline, which is encoded once: a meter keeps only what it read last, so ask a copy."""
        before = None if hidden is self.hidden else self.hidden
        return copy.copy(self.health).read(hidden, before)

    def _tell(self, step: int, reason: str) -> None:
        if not self.told_failure:
            self.told_failure = True
            logger.warning(
                "step %d failed (%s); it is recorded as failed and the audit goes on, further failures are counted in "
                "silence. Set measure.on_error: raise to stop instead.",
                step,
                reason,
            )
