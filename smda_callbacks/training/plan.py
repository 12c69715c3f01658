"""What the user asked for, as plain objects: the callback's only argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from smda_callbacks.observe.behaviour import Scorer, prefix_probability
from smda_callbacks.observe.distil import DistilOptions
from smda_callbacks.observe.features import Readout
from smda_callbacks.observe.instrument import Instrument, Target, build_instrument
from smda_callbacks.observe.prefixes import COMPLIANCES
from smda_callbacks.observe.probes import ProbeSet
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.observe.savings import SavingOptions
from smda_callbacks.records import PolicyRecord
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.past import Past
from smda_callbacks.training.alerts import AlertLimits
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.trajectory_options import TrajectoryOptions

#: Makes the sinks of a run, given the trainer's arguments (transformers.TrainingArguments).
SinkMaker = Callable[[Any], Sequence[Sink]]

#: Makes the sinks of a training that goes on from a checkpoint, given the trainer's arguments and what the store of its
#: run holds; None where that cannot be gone on with, so that a new store is wanted beside it.
SinkReopener = Callable[[Any, Past | None], Sequence[Sink]]


@dataclass(frozen=True)
class Plan:
    """A measurement plan.

    Args:
        probes: what is asked; load_sae: called once, before training; scorers: the behaviours, refusal first.
        contrast: openings that must be told apart from the scored ones.
        policy: a saved policy to start from; None distils one at the start of training.
        every: measure after every so many optimizer steps; health_every: SAE health at every so many measurements.
        overhead_budget: most share of the run's wall time for measurements; they are made less often to keep it.
            A renewal of the noise floor is not foreseen, but paid back.
        noise_draws: random updates for the noise floor (two readings each); 0 leaves it out.
        renew_noise: whether the floor is measured again at the model as it then is, after 4, 8, 16, ... windows
            (a reading each).
        savings: what readings need not compute again, or at all.
        attribution: how the windows' shifts are attributed to training pairs; dataset: the data set that the trainer
            was given, needed only where packing hides its rows.
        trajectory: whether the run's steps are kept, for ``smda rescore``.
        on_error: what a measurement that fails does to training: ``warn`` (record, say once, go on) or ``raise``.
        reopen_sinks: makes the sinks of a training that goes on from a checkpoint; None starts a new run there.
        config: the resolved configuration, recorded in the manifest.
    """

    probes: ProbeSet
    load_sae: Callable[[], SAEHandle]
    scorers: Sequence[Scorer] = (prefix_probability(),)
    contrast: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"compliance": COMPLIANCES})
    target: Target = "probability"
    readout: Readout = "last"
    batch_size: int = 64
    system: str | None = None
    template: Mapping[str, Any] | None = None
    allow_model_mismatch: bool = False
    distil: DistilOptions = DistilOptions()
    policy: PolicyRecord | None = None
    every: int = 1
    health_every: int = 1
    overhead_budget: float | None = None
    noise_draws: int = 8
    renew_noise: bool = True
    savings: SavingOptions = SavingOptions()
    limits: AlertLimits = AlertLimits()
    attribution: AttributionOptions = AttributionOptions()
    trajectory: TrajectoryOptions = TrajectoryOptions()
    dataset: Any = None
    on_error: Literal["warn", "raise"] = "warn"
    make_sinks: SinkMaker = lambda _: ()
    reopen_sinks: SinkReopener | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def instrument(
        self, model: nn.Module, tokenizer: Any, handle: SAEHandle, *, gradients: bool | None = None
    ) -> Instrument:
        """The instrument that a run of this plan reads ``model`` with.

        Args:
            gradients: whether gradients of readings may be wanted; None: if the engine takes some. All readings of a
                run are then made without a shared start, so that they differ by the weights only.

        Raises:
            SAEError, HookError, ProbeError, PrefixError, ValueError: what does not fit together.
        """
        if gradients is None:
            gradients = self.attribution.engine in ("auto", "ghost")
        savings = replace(self.savings, share_prefix=self.savings.share_prefix and not gradients)
        return build_instrument(
            model,
            tokenizer,
            handle,
            self.probes,
            scorers=self.scorers,
            contrast=self.contrast,
            target=self.target,
            readout=self.readout,
            batch_size=self.batch_size,
            system=self.system,
            template=self.template,
            allow_model_mismatch=self.allow_model_mismatch,
            savings=savings,
        )

    def __post_init__(self) -> None:
        for name in ("every", "health_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.overhead_budget is not None and not 0 < self.overhead_budget < 1:
            raise ValueError(f"overhead_budget must be between 0 and 1, or None, got {self.overhead_budget}.")
        if self.noise_draws < 0:
            raise ValueError(f"noise_draws must be at least 0, got {self.noise_draws}.")
