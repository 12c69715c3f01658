"""A small made-up run whose numbers agree with each other: every shift, account and coefficient is really computed.

The model is a toy: pre-activations drift and jitter, gates open above a threshold, refusal follows the features plus an
idiosyncratic part. Nothing here imports torch or reads a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from smda_callbacks.maths.account import account, mean_by_group
from smda_callbacks.maths.gaps import gap_table
from smda_callbacks.maths.pathways import State, first_order_error, first_order_shift, split_shift
from smda_callbacks.maths.quality import category_quality
from smda_callbacks.maths.ridge import diagnose, fit_ridge
from smda_callbacks.maths.uncertainty import rms_floor, split_half_reliability
from smda_callbacks.records import (
    Alert,
    Array,
    FeatureLabel,
    NoiseFloor,
    PolicyQuality,
    PolicyRecord,
    Probe,
    RunEnd,
    RunStart,
    SAEHealth,
    Snapshot,
    WindowRecord,
    policy_hash,
    probe_hash,
)
from smda_callbacks.sinks.store import StoreSink

LEARNING_RATE = 2e-4
CATEGORIES = {"fraud": "refuse", "weapons": "refuse", "cooking": "comply", "coding": "comply"}


@dataclass(frozen=True)
class Run:
    """A whole run, as the sinks receive it."""

    start: RunStart
    windows: tuple[WindowRecord, ...]
    alerts: tuple[Alert, ...]
    end: RunEnd

    @property
    def groups(self) -> np.ndarray:
        names = list(dict.fromkeys(probe.category for probe in self.start.probes))
        return np.array([names.index(probe.category) for probe in self.start.probes])


def make_run(
    *,
    windows: int = 4,
    steps_per_window: int = 2,
    start_step: int = 0,
    probes_per_category: int = 9,
    features: int = 6,
    behaviours: tuple[str, ...] = ("refusal",),
    lam: float = 3.0,
    not_finite: Iterable[int] = (),
    failed: Iterable[int] = (),
    skipped: Iterable[int] = (),
    noise: bool = True,
    mean_readout: bool = False,
    run_id: str = "made-up",
    seed: int = 0,
    pairs: int = 0,
    engine: str = "ghost",
    unattributed: Iterable[int] = (),
    attributed: int | None = None,
    pair_text: bool = True,
) -> Run:
    """A run of ``windows`` windows of ``steps_per_window`` optimizer steps each, after a baseline at ``start_step``.

    ``not_finite`` and ``failed`` are numbers of windows (from 0) with that status, ``skipped`` steps that the optimizer
    skipped. ``mean_readout``: gates are shares of tokens rather than 0/1. Same arguments, same run, bit for bit.

    ``pairs``: how many pairs it is trained on, with books on all windows but those of the numbers ``unattributed``;
    see :mod:`tests.helpers.pair_runs`. ``attributed``: only so many features; ``pair_text``: whether texts are kept.
    """
    world = _World(probes_per_category, features, len(behaviours), mean_readout, seed)
    probes = world.probes
    baseline_state = world.snapshot(start_step)
    policy = _distil(baseline_state, probes, behaviours, lam, world.groups)
    floor = _noise(world, baseline_state, policy) if noise else None
    baseline = WindowRecord(
        step=start_step, first_step=start_step, skipped=(), status="ok", seconds=0.5, snapshot=baseline_state,
        health=SAEHealth(0.2, 3.0, 1.0), **_refit(baseline_state, policy),
    )  # fmt: skip
    start = RunStart(
        _manifest(run_id, probes, policy), probes, policy, baseline, gaps_of(baseline, policy, probes), floor
    )
    bad: dict[int, Any] = dict.fromkeys(not_finite, "not_finite") | dict.fromkeys(failed, "failed")
    records: list[WindowRecord] = []
    last = baseline
    for number in range(windows):
        first, step = start_step + number * steps_per_window + 1, start_step + (number + 1) * steps_per_window
        head: dict[str, Any] = {
            "step": step,
            "first_step": first,
            "skipped": tuple(each for each in sorted(skipped) if first <= each <= step),
            "seconds": 0.25,
            "trainer": {"loss": 2.0 / (number + 1), "learning_rate": LEARNING_RATE, "epoch": step / 100},
        }
        after = world.snapshot(step)
        if number in bad:
            records.append(WindowRecord(status=bad[number], error="made up to fail", **head))
        else:
            last = measured_window(last, after, policy, world.groups, head)
            records.append(last)
    final = records[-1].step if records else start_step
    outside = (Alert(final, "loss_not_finite", "the training loss is nan"),)
    run = Run(start, tuple(records), outside, RunEnd(final, "finished", 1.5, 20.0, gaps_of(last, policy, probes)))
    if not pairs:
        return run
    from tests.helpers.pair_runs import with_pairs

    return with_pairs(run, pairs, engine=engine, unattributed=unattributed, attributed=attributed, text=pair_text)


def write_run(path: Path, run: Run, *, close: bool = True) -> Path:
    """Write ``run`` into a run store at ``path`` and return the path."""
    sink = StoreSink(path)
    sink.open(run.start)
    for window in run.windows:
        sink.write(window)
    for alert in run.alerts:
        sink.alert(alert)
    if close:
        sink.close(run.end)
    return path


def louder(noise: NoiseFloor, times: float) -> NoiseFloor:
    """The same noise with all floors so many times as large."""
    changed: dict[str, Any] = {
        name: {part: values * times for part, values in getattr(noise, name).items()} for name in ("random", "rounding")
    }
    for name in ("behaviour_random", "behaviour_rounding", "functional_random", "functional_rounding"):
        values = getattr(noise, name)
        changed[name] = None if values is None else values * times
    return replace(noise, **changed)


def with_renewals(run: Run, times: Mapping[int, float]) -> Run:
    """``run`` with the noise measured again in windows of these numbers, from 0: so many times that of the start."""
    noise = run.start.noise
    assert noise is not None
    windows = tuple(
        replace(window, noise=louder(noise, times[k])) if k in times else window for k, window in enumerate(run.windows)
    )
    return replace(run, windows=windows)


def gaps_of(record: WindowRecord, policy: PolicyRecord, probes: tuple[Probe, ...]) -> tuple[dict[str, Any], ...]:
    """The gap table at a record's snapshot, as rows."""
    assert record.snapshot is not None
    assert record.coef is not None
    assert record.intercept is not None
    names = list(dict.fromkeys(probe.category for probe in probes))
    table = gap_table(
        record.snapshot.y, record.snapshot.x, scale=policy.scale, coef=record.coef, intercept=record.intercept,
        groups=np.array([names.index(probe.category) for probe in probes]), categories=names,
        expected=[CATEGORIES[name] for name in names], features=policy.features,
    )  # fmt: skip
    return tuple(asdict(row) for row in table)


class _World:
    """A toy model in training: what the probes' features and behaviours are at every step."""

    def __init__(self, per_category: int, features: int, behaviours: int, mean_readout: bool, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.probes = tuple(
            Probe(f"{category}-{number}", f"{category} question {number}: how? «é»", category, expected)  # type: ignore[arg-type]
            for category, expected in CATEGORIES.items()
            for number in range(per_category)
        )
        self.groups = np.repeat(np.arange(len(CATEGORIES)), per_category)
        n = len(self.probes)
        harmful = np.array([probe.expected == "refuse" for probe in self.probes])
        self.mean_readout, self.step = mean_readout, -1
        self.pre = self.rng.normal(0.2, 1.0, (n, features)) + 0.8 * np.outer(harmful, np.arange(features) % 2)
        self.drift = 0.02 * self.rng.normal(size=(n, features)) - 0.03
        self.weights = np.where(np.arange(features) % 2, 0.6, -0.3)[:, None] * self.rng.uniform(0.5, 1, (1, behaviours))
        self.quirk = 0.4 * self.rng.normal(size=(n, behaviours))

    def snapshot(self, step: int) -> Snapshot:
        """The reading at ``step``; steps are asked for in ascending order."""
        moved = max(step - self.step, 0) if self.step >= 0 else 0
        for _ in range(moved):
            self.pre = self.pre + self.drift + 0.01 * self.rng.normal(size=self.pre.shape)
            self.quirk = self.quirk - 0.02 + 0.01 * self.rng.normal(size=self.quirk.shape)
        self.step = step
        return self.reading(step, self.pre, self.quirk)

    def reading(self, step: int, pre: Array, quirk: Array) -> Snapshot:
        pre = pre.astype(np.float32).astype(np.float64)  # as a model delivers it
        gate = np.clip(np.round(pre / 2 + 0.4, 2), 0, 1) if self.mean_readout else (pre > 0.1).astype(np.float64)
        return Snapshot(step, pre, gate, 1.0 / (1.0 + np.exp(-(gate * pre) @ self.weights - quirk + 0.3)))


def _state(snapshot: Snapshot) -> State:
    return State(snapshot.pre, snapshot.gate, snapshot.y)


def _refit(snapshot: Snapshot, policy: PolicyRecord) -> dict[str, Any]:
    fit = fit_ridge(snapshot.x, snapshot.y, policy.lam, scale=policy.scale)
    quality = diagnose(snapshot.x, snapshot.y, fit, scale=policy.scale)
    r2, r2_loo = tuple(quality.r2.tolist()), tuple(quality.r2_loo.tolist())
    return {"coef": fit.coef, "intercept": fit.intercept, "r2": r2, "r2_loo": r2_loo}


def measured_window(
    last: WindowRecord, after: Snapshot, policy: PolicyRecord, groups: np.ndarray, head: dict[str, Any]
) -> WindowRecord:
    """The ok window from ``last`` to the reading ``after``; ``head``: what is not computed from the two."""
    assert last.snapshot is not None
    start, end = _state(last.snapshot), _state(after)
    scale, lam = policy.scale, policy.lam
    shift = split_shift(start, end, scale=scale, lam=lam)
    books = account(start, end, scale=scale, lam=lam, groups=groups, origin=policy.origin)
    step = head["step"]
    return WindowRecord(
        status="ok",
        update_rms=LEARNING_RATE * (step - last.step) * 0.8,
        snapshot=after,
        shift=shift.as_dict(),
        account=books.rows,
        feature_account=books.features,
        first_order_error=first_order_error(shift, first_order_shift(start, end, scale=scale, lam=lam)),
        reliability=split_half_reliability(start, end, scale=scale, lam=lam, groups=groups),
        health=SAEHealth(0.2 + 0.01 * step, 3.0, 0.99, 1.3, 0.7),
        alerts=(Alert(step, "refusal_fell", "refusal on 'fraud' fell", "fraud", -0.2, 0.15),) if step % 4 == 0 else (),
        **_refit(after, policy),
        **head,
    )


def _distil(
    snapshot: Snapshot, probes: tuple[Probe, ...], behaviours: tuple[str, ...], lam: float, groups: np.ndarray
) -> PolicyRecord:
    scale = snapshot.x.std(axis=0)
    fit = fit_ridge(snapshot.x, snapshot.y, lam, scale=scale)
    quality = diagnose(snapshot.x, snapshot.y, fit, scale=scale)
    by_category = category_quality(snapshot.y, quality.fitted, quality.loo, groups, list(CATEGORIES))
    features = 1000 + 17 * np.arange(len(scale), dtype=np.int64)
    return PolicyRecord(
        features=features, scale=scale, lam=lam, coef=fit.coef, intercept=fit.intercept, behaviours=behaviours,
        target="probability", edf=quality.edf, condition=quality.condition, route=fit.route,
        origin=(snapshot.x / scale)[[CATEGORIES[probe.category] == "comply" for probe in probes]].mean(axis=0),
        quality=tuple(
            PolicyQuality(float(quality.r2[m]), float(quality.r2_loo[m]), None, by_category[m])
            for m in range(len(behaviours))
        ),
        lam_grid=((lam, 0.5),),
        labels=tuple(
            FeatureLabel(int(j), ((probes[0].id, 1.5),), (" sorry", " cannot"), (" sure",)) for j in features
        ),
        sae_id="made-up-sae", probe_hash=probe_hash(probes), model_id="made-up-model",
    )  # fmt: skip


def _noise(world: _World, baseline: Snapshot, policy: PolicyRecord, draws: int = 3) -> NoiseFloor:
    rng = np.random.default_rng(1)

    def floors(size: float) -> tuple[dict[str, Array], Array]:
        shifts, changes = [], []
        for _ in range(draws):
            moved = world.pre + size * rng.normal(size=world.pre.shape)
            after = world.reading(baseline.step, moved, world.quirk + size * rng.normal(size=world.quirk.shape))
            split = split_shift(_state(baseline), _state(after), scale=policy.scale, lam=policy.lam)
            shifts.append(split.as_dict())
            changes.append(mean_by_group(after.y - baseline.y, world.groups))
        return rms_floor(shifts), np.sqrt(np.mean(np.square(changes), axis=0))

    random, behaviour_random = floors(2e-2)
    rounding, behaviour_rounding = floors(2e-5)
    return NoiseFloor(draws, LEARNING_RATE, random, rounding, behaviour_random, behaviour_rounding)


def _manifest(run_id: str, probes: tuple[Probe, ...], policy: PolicyRecord) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "created": "2026-01-02T03:04:05+00:00",
        "config": {"every": 2, "noise_draws": 3},
        "versions": {"python": "3.11.7", "numpy": "2.4.6", "smda-callbacks": "0.1.0"},
        "git_sha": None,
        "seeds": {"smda": 0, "trainer": 42, "data": None},
        "probe_hash": probe_hash(probes),
        "sae": {
            "id": policy.sae_id, "hash": "5ae", "hook_name": "blocks.1.hook_resid_post", "architecture": "jumprelu",
            "d_in": 16, "d_sae": 4096,
        },
        "model": {"id": policy.model_id, "hash": "30de1", "class": "MadeUpForCausalLM"},
        "adapter": {"default": {"r": 8}},
        "policy_hash": policy_hash(policy),
        "behaviours": list(policy.behaviours),
        "target": policy.target,
        "trainer": {"class": "SFTConfig", "learning_rate": LEARNING_RATE, "num_train_epochs": 1},
    }  # fmt: skip


def resumed(run: Run, step: int) -> RunStart:
    """``run.start`` as a training that goes on from the checkpoint of ``step`` would send it."""
    return replace(run.start, baseline=replace(run.start.baseline, step=step, first_step=step))
