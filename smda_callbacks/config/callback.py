"""The callback as users write it: one line, from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from smda_callbacks.config.build import build_plan
from smda_callbacks.config.load import load_config
from smda_callbacks.config.schema import SMDAConfig
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback


class SMDACallback(MeasuringCallback):
    """Watches a LoRA run: ``SFTTrainer(..., callbacks=[SMDACallback.from_config("configs/refusal.yaml")])``.

    Give it a :class:`~smda_callbacks.training.plan.Plan` of your own objects, or use :meth:`from_config`.
    ``run_folder`` is the run store of the last run; None before training, and where the plan keeps none.
    """

    run_folder: Path | None = None

    @classmethod
    def from_config(cls, config: str | Path | Mapping[str, Any] | SMDAConfig, *, dataset: Any = None) -> SMDACallback:
        """Make the callback from a YAML file, a mapping, or a checked configuration.

        Args:
            dataset: the data set that the trainer is given. Needed only with packing, which hides its rows: without it
                pairs are still told apart there, but numbered by themselves.

        Raises:
            ConfigError: lists every fault of the configuration.
            ProbeError: the probes cannot be read or measured.
        """
        return cls(replace(build_plan(load_config(config)), dataset=dataset))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be measured, take the baseline, and note where the run is stored."""
        super().on_train_begin(args, state, control, **kwargs)
        sinks = self.monitor.sinks if self.monitor else ()
        self.run_folder = next((sink.path for sink in sinks if isinstance(sink, StoreSink)), None)
