"""The recorder of a run beside its monitor: when there is one, and what happens where it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from smda_callbacks.observe.sharding import told
from smda_callbacks.sinks.base import Sink
from smda_callbacks.sinks.trajectory import FOLDER
from smda_callbacks.training.attribution_start import Trainer
from smda_callbacks.training.row_identity import PairIndex, find_trainer, training_runs
from smda_callbacks.training.trajectory import Recorder
from smda_callbacks.training.trajectory_check import check_recordable
from smda_callbacks.training.trajectory_options import TrajectoryOptions

logger = logging.getLogger("smda_callbacks")


class Recording:
    """Hands the callback's events to the recorder. A recorder that fails is done; training goes on, unless ``strict``.

    Making it refuses what cannot be recorded and writes nothing; see
    :func:`~smda_callbacks.training.trajectory_check.check_recordable`. ``step``: where training begins.
    """

    def __init__(
        self,
        options: TrajectoryOptions,
        sinks: Sequence[Sink],
        model: nn.Module,
        trainer: Trainer,
        *,
        step: int,
        strict: bool,
    ) -> None:
        self.options, self.strict = options, strict
        self.recorder: Recorder | None = None
        self._made = (model, trainer, step)
        if options.keep:
            self._folder = _folder(sinks)
            found = find_trainer()
            steps = (found.state.max_steps if found is not None else step) - step
            check_recordable(options, self._folder, found, model, trainer.optimizer, steps=steps)

    def start(self, index: Callable[[], PairIndex]) -> None:
        """Begin, after the sinks were opened. ``index``: gives the numbers of pairs."""
        if not self.options.keep:
            return
        model, trainer, step = self._made
        assert self._folder is not None
        self.recorder = Recorder(
            self.options,
            self._folder,
            model,
            find_trainer(),
            trainer.optimizer,
            index(),
            step=step,
            training=training_runs(),
        )

    def event(self, name: str, *given: Any) -> None:
        """One of ``begin_step``, ``before_step``, ``after_step``, ``last_step`` and ``finish``, with what they take."""
        if self.recorder is None:
            return
        recorder = self.recorder
        try:
            getattr(recorder, name)(*given)
        except Exception as error:
            self.recorder = None
            recorder.stop(told(error))
            if self.strict:
                raise
            logger.warning(
                "recording the trajectory stopped after step %d: %s; training goes on, and smda rescore can follow "
                "the run up to the last state only",
                recorder.step,
                told(error),
            )


def _folder(sinks: Sequence[Sink]) -> Path | None:
    paths = (getattr(sink, "path", None) for sink in sinks)
    return next((path / FOLDER for path in paths if isinstance(path, Path)), None)
