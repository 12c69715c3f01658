"""How much of what a pair does to refusal does the policy explain? One LoRA step per pair, always from one model.

The audit's protocol, with all that settings of a policy may ask for kept of every reading:

* the share that is explained at the default settings: ΔX·β at fixed gates against measured Δy, over pairs × categories;
* other settings (support, penalty, read-out, target, standardisation), chosen on one half of the pairs and judged on
  the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from recipes.evidence.setups import Setup
from recipes.evidence_maths import correlation, interval
from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.ridge import fit_ridge, lambda_grid, loo_path
from smda_callbacks.maths.support import choose_support, feature_scale, strongest_keeping
from smda_callbacks.observe.behaviour import score
from smda_callbacks.observe.features import READOUTS, Readout
from smda_callbacks.observe.instrument import Instrument, arrays
from smda_callbacks.observe.reading import Reading
from smda_callbacks.training.audit_step import Adapter, AuditOptions, fresh_adapter, train_on

Array = NDArray[np.float64]
Index = NDArray[np.int64]

TARGETS = ("probability", "logit")
#: ``slope``: a policy of the logit, its prediction made one of the probability by every probe's slope p (1 - p).
UNITS = (*TARGETS, "slope")
SUPPORTS = (8, 16, 32, 64, 128, 256)
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.3)
MIN_ACTIVE = 8


@dataclass(frozen=True)
class Setting:
    """How a policy is chosen. ``standardised``: coefficients are penalised per standard deviation of a feature."""

    support: int = 16
    tolerance: float = 0.2
    readout: Readout = "last"
    target: str = "probability"
    standardised: bool = True


@dataclass(frozen=True)
class Readings:
    """The probes before a step and after each pair's, in every read-out.

    ``states``: read-out -> the state before, then one per pair, on ``columns[readout]`` of the dictionary: the features
    that are active on MIN_ACTIVE probes or more before. ``y``: target -> ``[1 + pair, probe, 1]``.
    """

    states: dict[Readout, list[State]]
    columns: dict[Readout, Index]
    hidden: list[Tensor]  # [1 + pair] of [probe, d_model]
    y: dict[str, Array]
    groups: Index

    def change(self, target: str) -> Array:
        """Measured change of every category's mean, ``[pair, category]``."""
        y = self.y["logit" if target == "logit" else "probability"][..., 0]
        return np.array([mean_by_group(after - y[0], self.groups) for after in y[1:]])


# Reading --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """The model with a fresh adapter, and an instrument on the whole dictionary."""

    setup: Setup
    adapter: Adapter
    instrument: Instrument
    options: AuditOptions
    pairs: tuple[Any, ...]

    def moved(self, number: int) -> Any:
        """The model after one step on a pair alone."""
        train_on(self.adapter, self.pairs[number], 0, self.options)
        return self.adapter.model

    def start(self) -> Any:
        """The model before the step."""
        self.adapter.reset(0)
        return self.adapter.model


@contextlib.contextmanager
def bench_of(setup: Setup, numbers: Sequence[int], *, learning_rate: float) -> Iterator[Bench]:
    """Context with a bench for these pairs of a setup."""
    model, tokenizer = setup.load()
    hyper = setup.hyper
    options = AuditOptions(
        learning_rate=learning_rate, rank=hyper.rank, alpha=hyper.alpha, max_grad_norm=hyper.max_grad_norm
    )
    pairs = setup.pairs(tokenizer)
    with fresh_adapter(model, options) as adapter:
        instrument = setup.plan.instrument(adapter.model, tokenizer, setup.plan.load_sae())
        yield Bench(setup, adapter, instrument, options, tuple(pairs[k] for k in numbers))


def read_all(bench: Bench, readouts: Sequence[Readout]) -> Readings:
    """Read the probes before any step and after each pair's."""
    views = {name: replace(bench.instrument, readout=name) for name in readouts}
    seen: dict[Readout, list[Reading]] = {name: [] for name in readouts}
    for number in tqdm(range(-1, len(bench.pairs)), f"{bench.setup.name}: one step per pair", unit="pair"):
        model = bench.start() if number < 0 else bench.moved(number)
        for name, view in views.items():
            seen[name].append(view.read(model))
    first = seen[readouts[0]]
    y = {target: np.array([scores_of(bench.instrument, each, target) for each in first]) for target in TARGETS}
    columns = {name: _often_active(found[0]) for name, found in seen.items()}
    states = {
        name: [_state(each, columns[name], y["probability"][k]) for k, each in enumerate(found)]
        for name, found in seen.items()
    }
    return Readings(states, columns, [each.hidden for each in first], y, bench.instrument.probes.groups)


def _often_active(reading: Reading) -> Index:
    pre, gate = arrays(reading)
    return np.flatnonzero((pre * gate > 0).sum(axis=0) >= MIN_ACTIVE).astype(np.int64)


def _state(reading: Reading, columns: Index, y: Array) -> State:
    pre, gate = arrays(reading)
    return State(pre[:, columns], gate[:, columns], y)


def scores_of(instrument: Instrument, reading: Reading, target: str) -> Array:
    """Behaviours ``[probe, behaviour]`` of a reading in another target's unit."""
    return score(instrument.scorers, instrument.batches.tree, reading.log_probs, target)


# What a policy explains -----------------------------------------------------------------------------------------------


def predicted(readings: Readings, setting: Setting) -> tuple[Array, float]:
    """ΔX·β at fixed gates of every pair, ``[pair, category]``, and the policy's leave-one-out R² before the step."""
    before, *afters = readings.states[setting.readout]
    y = readings.y["probability" if setting.target == "probability" else "logit"]
    p = readings.y["probability"][..., 0]
    features, scale, lam, r2 = choose_policy(before.x, y[0], setting)
    start = fit_ridge(before.x[:, features], y[0], lam, scale=scale).coef[:, 0]
    rows = []
    for after, now, chance in zip(afters, y[1:], p[1:], strict=True):
        coef = fit_ridge(after.x[:, features], now, lam, scale=scale).coef[:, 0]
        gate = (before.gate[:, features] + after.gate[:, features]) / 2
        moved = gate * (after.pre[:, features] - before.pre[:, features]) / scale
        middle = (chance + p[0]) / 2
        slope = middle * (1 - middle) if setting.target == "slope" else 1.0
        rows.append(mean_by_group(moved @ ((start + coef) / 2) * slope, readings.groups))
    return np.array(rows), r2


def choose_policy(x: Array, y: Array, setting: Setting) -> tuple[Index, Array, float, float]:
    """Columns, their scale, λ and leave-one-out R² of the policy that a setting makes."""
    features = choose_support(x, y, size=setting.support, min_active=MIN_ACTIVE)
    scale = feature_scale(x[:, features])
    if not setting.standardised:  # one scale for all, so that the grid of penalties means the same
        scale = np.full_like(scale, np.sqrt(np.mean(scale**2)))
    path = loo_path(x[:, features], y, lambda_grid(), scale=scale)
    error = (path.mse / y.var(axis=0)).mean(axis=1)
    lam = strongest_keeping(path.lams, error, setting.tolerance)
    return features, scale, lam, 1 - float(error[list(path.lams).index(lam)])


def agreement(expected: Array, measured: Array) -> dict[str, float]:
    """How well ``expected [pair, category]`` says ``measured``: r with its interval, slope, r within and between pairs.

    ``slope``: of measured on expected, through zero. ``r_pairs``, ``r_categories``: medians over categories of the
    correlation over pairs, and over pairs of that over categories.
    """
    low, high = interval(expected, measured)
    size = float((expected**2).sum())
    return {
        "r": correlation(expected, measured),
        "r_low": low,
        "r_high": high,
        "slope": float((expected * measured).sum() / size) if size else 0.0,
        "r_pairs": float(np.median([correlation(a, b) for a, b in zip(expected.T, measured.T, strict=True)])),
        "r_categories": float(np.median([correlation(a, b) for a, b in zip(expected, measured, strict=True)])),
    }


def settings(readouts: Sequence[Readout] = READOUTS, supports: Sequence[int] = SUPPORTS) -> list[Setting]:
    """The search; the defaults are the first."""
    every = [
        Setting(support, tolerance, readout, target, standardised)
        for readout in readouts
        for target in UNITS
        for standardised in (True, False)
        for support in supports
        for tolerance in TOLERANCES
    ]
    return list(dict.fromkeys([Setting(), *every]))


def search(readings: Readings, tried: Sequence[Setting]) -> dict[str, Any]:
    """Every setting on all pairs, and what the best of one half of the pairs is worth on the other half.

    Logits and probabilities are judged against their own measured change.
    """
    rows, found = [], []
    for setting in tqdm(tried, "settings", unit="setting"):
        expected, r2 = predicted(readings, setting)
        found.append((expected, readings.change(setting.target)))
        rows.append({**asdict(setting), "r2_loo": r2, **agreement(*found[-1])})
    sides = np.arange(len(found[0][0])) % 2
    held = []
    for side in (0, 1):
        r = [correlation(expected[sides == side], measured[sides == side]) for expected, measured in found]
        best = int(np.argmax(r))
        judged = [correlation(a[sides != side], b[sides != side]) for a, b in (found[best], found[0])]
        held.append({**asdict(tried[best]), "r_chosen_on": r[best], "r_held_out": judged[0], "r_default": judged[1]})
    return {"settings": rows, "held_out": held}
