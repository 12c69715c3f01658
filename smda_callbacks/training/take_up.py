"""Going on with an earlier run: is it the same one, and the monitor as it was at the checkpoint.

Where something differs that the numbers depend on, a :class:`~smda_callbacks.training.resume.NotContinuedError` says
what, and the training starts a run of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from smda_callbacks.observe.health import HealthMeter
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.reading import Reading
from smda_callbacks.records import PolicyRecord, policy_hash
from smda_callbacks.sinks.base import Sink
from smda_callbacks.training.attribution_start import Attribution
from smda_callbacks.training.manifest import weights_hash
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.resume import Earlier, NotContinuedError

if TYPE_CHECKING:
    from smda_callbacks.training.monitor import Monitor

logger = logging.getLogger("smda_callbacks")

#: How far a reading may be from that of the store at the same step, in standard deviations over the probes: with a note
#: in the checkpoint, where another device may round differently, and without one, where the reading is the only proof.
NEAR, SAME = 0.1, 1e-3


def check_same_run(earlier: Earlier, plan: Plan, full: Instrument, model: nn.Module) -> None:
    """Raise NotContinuedError unless probes, SAE, model, scoring and policy are those of the run in the store."""
    manifest = earlier.past.store.manifest
    config = manifest.get("config") or {}
    pairs = {
        "probes": (manifest["probe_hash"], full.probes.hash),
        "the SAE": (manifest["sae"]["hash"], full.handle.hash),
        "the layer": (manifest["sae"]["hook_name"], full.handle.site.name),
        "the model's frozen weights": (manifest["model"]["hash"], weights_hash(model, team=full.team)),
        "behaviours": (list(manifest["behaviours"]), list(full.behaviours)),
        "the target": (manifest["target"], full.target),
        "the behaviour section of the configuration": (config.get("behaviour"), plan.config.get("behaviour")),
    }
    other = [name for name, (there, here) in pairs.items() if there != here]
    saved = manifest.get("policy_from") == "saved"
    if saved != (plan.policy is not None) or (plan.policy and policy_hash(plan.policy) != manifest["policy_hash"]):
        other.append("the policy")
    if other:
        raise NotContinuedError(f"{', '.join(other)} of the run in {earlier.past.store.path} differ from those here")


def check_same_pairs(earlier: Earlier, attribution: Attribution, most: int = 50) -> None:
    """Raise NotContinuedError where pairs are attributed in another way, or are numbers of other examples."""
    stored = earlier.past.store.manifest.get("attribution") or {}
    parts = ("engine", "functionals", "level")
    other = [name for name in parts if stored.get(name) != attribution.manifest.get(name)]
    if other:
        raise NotContinuedError(f"the {' and '.join(other)} of the attribution differ")
    if attribution.attributor is None:
        return
    for number, pair in sorted(earlier.past.pairs.items())[:most]:
        try:
            here = attribution.attributor.index.describe(number)
        except IndexError:
            continue  # known by its tokens alone, and not seen again yet
        if (here.rows, here.tokens) != (pair.rows, pair.tokens):
            raise NotContinuedError(f"the data set differs: pair {number} was rows {pair.rows} and is {here.rows}")


def check_same_state(earlier: Earlier, instrument: Instrument, reading: Reading) -> None:
    """Raise NotContinuedError where the model reads differently than the store says at the same step."""
    stored = earlier.past.last.snapshot
    if stored is None or not earlier.whole:
        return
    y = instrument.scores(reading)
    away, width = float(np.abs(y - stored.y).mean()), float(stored.y.std())
    if away > (NEAR if earlier.noted else SAME) * width:
        raise NotContinuedError(
            f"the probes' behaviour is {away:.2g} away on average from that in {earlier.past.store.path} at this step"
        )


def make_sinks(plan: Plan, args: Any, step: int, earlier: Earlier | None) -> Sequence[Sink]:
    """The sinks of a training that begins at ``step``, or goes on there with ``earlier``."""
    if step == 0 or plan.reopen_sinks is None:
        return plan.make_sinks(args)
    return plan.reopen_sinks(args, None if earlier is None else earlier.past)


def read_again(
    earlier: Earlier, plan: Plan, full: Instrument, model: nn.Module
) -> tuple[PolicyRecord, Instrument, Reading]:
    """The run's policy, the instrument of its features, and a reading of ``model`` as the checkpoint left it.

    Raises:
        NotContinuedError: it is another run; says what differs.
    """
    check_same_run(earlier, plan, full, model)
    instrument = full.of_features(earlier.policy.features)
    reading = instrument.read(model)
    check_same_state(earlier, instrument, reading)
    return earlier.policy, instrument, reading


def take_up(monitor: Monitor, earlier: Earlier, reading: Reading) -> None:
    """Give ``monitor`` the state that it had at the checkpoint, but for what pairs did: see :func:`take_up_pairs`."""
    past, device = earlier.past, reading.hidden.device
    assert past.last.snapshot is not None
    assert past.store.baseline.health is not None
    monitor.health = HealthMeter(monitor.instrument.handle, earlier.start.to(device))
    monitor.health_start, monitor.baseline = past.store.baseline.health, past.store.baseline
    monitor.window, monitor.snapshot, monitor.noise = past.last, past.last.snapshot, past.store.noise
    monitor.hidden = reading.hidden if earlier.hidden is None else earlier.hidden.to(device)
    monitor.measured, monitor.seconds = earlier.measured, past.seconds
    monitor.began -= earlier.train_seconds
    monitor.book.new(past.told)


def take_up_pairs(monitor: Monitor, earlier: Earlier) -> None:
    """Number windows and pairs on; raises NotContinuedError. Call before the first window is opened."""
    check_same_pairs(earlier, monitor.attribution)
    monitor.causes.noise = monitor.noise
    monitor.causes.add_all(earlier.past.windows())
    monitor.noise_meter.windows = earlier.past.measured
    if monitor.attributor is not None:
        monitor.attributor.continue_from(earlier.past.measured, earlier.past.pairs)


def take_up_window(monitor: Monitor, earlier: Earlier) -> None:
    """The window that was open at the checkpoint. Call after it was opened again."""
    if earlier.weights is not None:
        monitor.meter.start_from(earlier.weights)
    if not earlier.whole and monitor.attributor is not None:
        why = (
            f"the window open at step {earlier.past.step}, that of a checkpoint, began after step "
            f"{earlier.past.last.step}: what its pairs did before the checkpoint is not known"
        )
        monitor.attributor.pass_over(why)
        logger.warning("%s, so it is not attributed to pairs", why)
