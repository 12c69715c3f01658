"""A run's noise floor: measured before training, and again as the model moves away from where that was done.

A model on the edge of refusing answers the same random update with a larger change than one that always refuses: by the
floor of the start, chance alone would often be above noise there.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from tqdm.auto import tqdm

from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.noise import measure_noise
from smda_callbacks.observe.reading import NotFiniteError
from smda_callbacks.records import Array, NoiseFloor, PolicyRecord, Snapshot
from smda_callbacks.training.plan import Plan

#: Booked windows before the first renewal; then twice as many, and so on.
FIRST = 4


class NoiseFloorError(RuntimeError):
    """The noise floor could not be measured again."""


def is_due(windows: int) -> bool:
    """Whether the floor is measured again after so many booked windows: 4, 8, 16, ...

    So the floor in force is never older than half of the run, and a run of 1000 windows pays for eight renewals, which
    take half as many readings each as the floor of the start.
    """
    return windows >= FIRST and windows & (windows - 1) == 0


class NoiseMeter:
    """Measures the floor of one run, where its plan asks for it.

    ``measure``: see :func:`~smda_callbacks.observe.noise.measure_noise`. ``windows``: booked so far.
    """

    def __init__(
        self,
        plan: Plan,
        instrument: Instrument,
        policy: PolicyRecord,
        measure: Callable[[State, State], Array] | None,
    ) -> None:
        self._plan, self._instrument, self._policy, self._measure = plan, instrument, policy, measure
        self.windows = 0

    def first(self, model: nn.Module, baseline: Snapshot, size: float) -> NoiseFloor | None:
        """The floor around the start, of updates of this size; None where there is to be none."""
        if self._plan.noise_draws == 0 or size <= 0:
            return None
        return self._floor(model, baseline, size, self._plan.seed)

    def renewed(self, model: nn.Module, snapshot: Snapshot, start: NoiseFloor | None) -> NoiseFloor | None:
        """The floor around ``model`` at the end of one more window; None where it is not to be measured again there.

        ``snapshot``: of ``model`` as it is now; ``start``: the run's first floor, whose updates were as large.

        Raises:
            NoiseFloorError: a reading of a moved model is not finite.
        """
        plan = self._plan
        if start is None or plan.noise_draws == 0 or not plan.renew_noise or not is_due(self.windows + 1):
            return None
        try:
            # A floor takes two seeds. By the step, so that a run gone on with draws what it would have drawn.
            return self._floor(model, snapshot, start.update_rms, plan.seed + 2 * snapshot.step, start)
        except NotFiniteError as error:  # of a model that was moved: nothing is said about the window
            raise NoiseFloorError(f"with the weights moved at random, {error}") from error

    def _floor(
        self, model: nn.Module, snapshot: Snapshot, size: float, seed: int, start: NoiseFloor | None = None
    ) -> NoiseFloor:
        draws, measure = self._plan.noise_draws, self._measure
        total = 2 * draws if start is None else draws
        if start is not None and start.functional_random is None:  # windows before have no floor to add up with
            measure = None
        with tqdm(total=total, desc="SMDA noise floor", unit="reading", delay=2, leave=False, disable=None) as bar:
            return measure_noise(
                self._instrument,
                model,
                self._policy,
                snapshot,
                size=size,
                draws=draws,
                seed=seed,
                measure=measure,
                start=start,
                tick=bar.update,
            )
