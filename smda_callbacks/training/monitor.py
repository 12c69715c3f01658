"""The state of one watched run, and the three things that happen to it: start, measure, finish."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from smda_callbacks.observe.distil import distil
from smda_callbacks.observe.divided import BrokenPassError
from smda_callbacks.observe.health import HealthMeter
from smda_callbacks.observe.lora import AttributionError
from smda_callbacks.observe.noise import UpdateMeter
from smda_callbacks.observe.reading import NotFiniteError, Reading
from smda_callbacks.observe.sharding import Team, told
from smda_callbacks.records import (
    Alert,
    NoiseFloor,
    PolicyRecord,
    RunEnd,
    RunStart,
    SAEHealth,
    Snapshot,
    WindowRecord,
)
from smda_callbacks.training.alerts import AlertBook, behaviour_alerts, health_alerts
from smda_callbacks.training.attempts import GIVE_UP, Attempts
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.attribution_start import Trainer, pair_index, start_attribution
from smda_callbacks.training.booking import book_window, gaps_of, refit
from smda_callbacks.training.causes import Causes
from smda_callbacks.training.manifest import build_manifest
from smda_callbacks.training.noise_renewal import NoiseMeter
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.policy_check import check_policy
from smda_callbacks.training.recording import Recording
from smda_callbacks.training.resume import Earlier, keep_start
from smda_callbacks.training.row_identity import PairIndex
from smda_callbacks.training.take_up import make_sinks, read_again, take_up, take_up_pairs, take_up_window

logger = logging.getLogger("smda_callbacks")


class Monitor:
    """Watches one training run of ``model``. Every snapshot is compared with the last one that could be read.

    Creating it does everything that can be refused: instrument, policy, noise floor, sinks. Nothing is trained before.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        trainer: Trainer,
        step: int,
        learning_rate: float,
        team: Team | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        tokenizer, args = trainer.tokenizer, trainer.args
        self.plan, self.began, self.seconds = plan, time.perf_counter(), 0.0
        self.book, self.measured, self.told_failures = AlertBook(), 0, set[str]()
        self.attempts = Attempts()
        # First: a folder that cannot be written is refused at once.
        self.sinks = tuple(make_sinks(plan, args, step, earlier))
        strict = plan.on_error == "raise"
        self.recording = Recording(plan.trajectory, self.sinks, model, trainer, step=step, strict=strict)
        self.policy: PolicyRecord
        full = plan.instrument(model, tokenizer, plan.load_sae()).with_team(team)
        if earlier is not None:
            self.policy, self.instrument, reading = read_again(earlier, plan, full, model)
        elif plan.policy is None:
            self.policy, self.instrument, reading = distil(full, model, tokenizer, plan.distil)
        else:
            self.policy = plan.policy
            check_policy(plan.policy, full)
            self.instrument = full.of_features(plan.policy.features)
            reading = self.instrument.read(model)
        if earlier is None:
            self._baseline(step, reading)
        else:
            take_up(self, earlier, reading)
        self.attribution = start_attribution(
            plan.attribution, trainer, model, self.instrument, self.policy, every=plan.every, user_dataset=plan.dataset
        )
        self.attributor = self.attribution.attributor
        self.causes = Causes(self.policy, plan.probes.probes, self.attribution.manifest["functionals"])
        measure = self.attributor.measure if self.attributor else None
        self.noise_meter = NoiseMeter(plan, self.instrument, self.policy, measure)
        if earlier is None:
            self.noise = self.causes.noise = self.noise_meter.first(model, self.snapshot, learning_rate)
            self.start = self._open(model, args)
        else:
            take_up_pairs(self, earlier)
            self.start = self._open_again(earlier)
        self._open_window(model)
        self.meter = UpdateMeter(model, team)
        if earlier is not None:
            take_up_window(self, earlier)
        self.recording.start(lambda: self._pair_index(trainer))

    def _pair_index(self, trainer: Trainer) -> PairIndex:
        if self.attributor is not None:
            return self.attributor.index
        return pair_index(trainer, self.plan.attribution, self.plan.dataset)

    def _baseline(self, step: int, reading: Reading) -> None:
        self.health = HealthMeter(self.instrument.handle, reading.hidden)
        health = self.health.read(reading.hidden)
        self.hidden = reading.hidden
        self.snapshot = self.instrument.snapshot(step, reading)
        fit = refit(self.snapshot, self.policy)
        self.window = self.baseline = WindowRecord(
            step=step,
            first_step=step,
            skipped=(),
            status="ok",
            seconds=0.0,
            snapshot=self.snapshot,
            health=health,
            **fit,
        )
        self.health_start: SAEHealth = health

    def _open(self, model: nn.Module, args: Any) -> RunStart:
        manifest = build_manifest(self.plan, self.instrument, self.policy, model, args, self.attribution.manifest)
        start = RunStart(manifest, self.plan.probes.probes, self.policy, self.baseline, self._gaps(), self.noise)
        for sink in self.sinks:
            sink.open(start)
        keep_start(self.sinks, self.hidden)
        return start

    def _open_again(self, earlier: Earlier) -> RunStart:
        for sink in self.sinks:
            sink.open(earlier.run_start())
        return earlier.past.store.start

    def measure(
        self, model: nn.Module, step: int, first_step: int, skipped: tuple[int, ...], trainer: Mapping[str, float]
    ) -> WindowRecord:
        """Read the probes, book the window since the last good reading, and hand the record to the sinks.

        A reading that is not finite, or that fails, is recorded and booked nowhere; the next window spans it.
        """
        began = time.perf_counter()
        head: dict[str, Any] = {"step": step, "first_step": first_step, "skipped": skipped, "trainer": dict(trainer)}
        try:
            record = self._window(model, head)
        except BrokenPassError:  # the other processes cannot be told: they wait for this one until it ends
            raise
        except NotFiniteError as error:
            record = WindowRecord(status="not_finite", seconds=0.0, error=str(error), **head)
            alert = Alert(step, "not_finite", str(error))
            record = replace(record, alerts=self.book.new([alert]))
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            record = WindowRecord(status="failed", seconds=0.0, error=f"{type(error).__name__}: {error}", **head)
            self._tell_failure(error)
        record = replace(record, seconds=time.perf_counter() - began)
        self.seconds += record.seconds
        if record.status == "ok":
            self.window, self.noise_meter.windows = record, self.noise_meter.windows + 1
        for alert in record.alerts:
            logger.warning("step %d: %s", alert.step, alert.message)
        self._each_sink("write", record)
        return record

    def _window(self, model: nn.Module, head: dict[str, Any]) -> WindowRecord:
        reading = self.attributor.read(model) if self.attributor else self.instrument.read(model)
        snapshot = self.instrument.snapshot(head["step"], reading)
        booked = book_window(self.snapshot, snapshot, self.policy, self.plan.probes.groups, seed=self.plan.seed)
        health = self._health(reading)
        alerts = behaviour_alerts(snapshot.step, snapshot.y, self._start_y(), self.plan.probes.probes, self.plan.limits)
        if health is not None:
            alerts += health_alerts(snapshot.step, health, self.health_start, self.plan.limits)
        update_rms = self.meter.rms()
        # Last of what may fail: a window that fails is spanned by the next, and its pairs must not be booked twice.
        attributed = self._attribute(model, snapshot)
        noise = self._renewed_noise(model, snapshot)
        self.causes.noise = noise or self.causes.noise
        self.causes.add(booked.feature_account, attributed.get("pairs"), attributed.get("pairs_seen", ()), update_rms)
        record = WindowRecord(
            status="ok",
            seconds=0.0,
            update_rms=update_rms,
            snapshot=snapshot,
            health=health,
            alerts=tuple(self.causes.named(alert) for alert in self.book.new(alerts)),
            noise=noise,
            **head,
            **booked.fields(),
            **attributed,
        )
        self.meter.reset()
        self.snapshot, self.hidden = snapshot, reading.hidden
        self._open_window(model)
        return record

    def _attribute(self, model: nn.Module, snapshot: Snapshot) -> dict[str, Any]:
        """Books of the pairs, as keyword arguments of a WindowRecord. Where they fail, the window stands without."""
        if self.attributor is None:
            return {}
        try:
            found = self.attributor.book(model, self.snapshot, snapshot)
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            self._tell_failure(error, "pairs were not attributed")
            return {"unattributed": self._failed(self.attributor, error, snapshot.step)}
        if found is None:
            return {"unattributed": self.attributor.left_out}
        self.attempts.succeeded()
        return {"pairs": found[0], "pairs_seen": found[1]}

    def _renewed_noise(self, model: nn.Module, snapshot: Snapshot) -> NoiseFloor | None:
        """The noise floor as it is now, where it is due again. Where that fails, the one in force goes on."""
        try:
            return self.noise_meter.renewed(model, snapshot, self.noise)
        except BrokenPassError:  # the other processes cannot be told
            raise
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            self._tell_failure(error, "the noise floor was not measured again")
            return None

    def _failed(self, attributor: Attributor, error: Exception, step: int) -> str:
        """Why a window could not be attributed; switches attribution off where that goes on and on."""
        why = str(error) if isinstance(error, AttributionError) else told(error)
        if self.attempts.failed(why):
            off = f"attribution was switched off at step {step}, after {GIVE_UP} windows in a row failed for one reason"
            attributor.switch_off(off)
            self.alert(Alert(step, "attribution_off", f"{off}: {why}"))
        return why

    def _open_window(self, model: nn.Module) -> None:
        if self.attributor is None:
            return
        try:
            self.attributor.open(model)
        except BrokenPassError:  # likewise where gradients were being added up
            raise
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            self._tell_failure(error, "pairs are not attributed")
            self.attributor.skip(str(error))

    def _health(self, reading: Reading) -> SAEHealth | None:
        self.measured += 1
        if (self.measured - 1) % self.plan.health_every:
            return None
        return self.health.read(reading.hidden, self.hidden)

    def _start_y(self) -> Any:
        assert self.baseline.snapshot is not None
        return self.baseline.snapshot.y

    def finish(self, step: int) -> RunEnd:
        """Close the sinks with the gap table of the last good snapshot."""
        if self.attributor is not None:
            self.attributor.end()
        self.instrument.savings.lower.forget()
        self.recording.event("finish")
        end = RunEnd(step, "finished", self.seconds, time.perf_counter() - self.began, self._gaps())
        self._each_sink("close", end)
        return end

    def _gaps(self) -> tuple[dict[str, Any], ...]:
        fit = {"coef": self.window.coef, "intercept": self.window.intercept}
        return gaps_of(self.snapshot, self.policy, self.plan.probes.probes, fit)

    def alert(self, alert: Alert) -> None:
        """An alert that belongs to no window, such as a loss that is not finite."""
        for fresh in self.book.new([alert]):
            logger.warning("step %d: %s", fresh.step, fresh.message)
            self._each_sink("alert", fresh)

    def _each_sink(self, method: str, record: Any) -> None:
        for sink in self.sinks:
            try:
                getattr(sink, method)(record)
            except Exception as error:
                if self.plan.on_error == "raise":
                    raise
                self._tell_failure(error)

    def _tell_failure(self, error: Exception, what: str = "the window is recorded as failed") -> None:
        if what not in self.told_failures:
            self.told_failures.add(what)
            logger.warning(
                "a measurement failed (%s: %s); training goes on, %s, further failures are counted in silence. Set "
                "on_error: raise to stop instead.",
                type(error).__name__,
                error,
                what,
                exc_info=logger.isEnabledFor(logging.DEBUG),
            )
