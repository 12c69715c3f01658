"""The callback as users write it: one line, from a configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from smda_callbacks.config.build import build_plan
from smda_callbacks.config.load import ConfigError, load_config
from smda_callbacks.config.schema import SMDAConfig
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.plan import Plan

#: Names the configuration wherever no argument can.
CONFIG = "SMDA_CONFIG"


class SMDACallback(MeasuringCallback):
    """Watches a LoRA run: ``SFTTrainer(..., callbacks=[SMDACallback.from_config("configs/refusal.yaml")])``.

    Give it a :class:`~smda_callbacks.training.plan.Plan` of your own objects, or use :meth:`from_config`. Without
    arguments it is made by the file that the environment variable SMDA_CONFIG names, and says so in the log.
    ``run_folder`` is the run store of the last run; None before training, and where the plan keeps none.

    Raises:
        ConfigError: made without arguments, and SMDA_CONFIG is not set or its file has faults.
    """

    run_folder: Path | None = None

    def __init__(self, plan: Plan | None = None) -> None:
        self._config_file = None if plan is not None else config_from_environment()
        super().__init__(plan if plan is not None else build_plan(load_config(self._config_file or "")))

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
        if self._config_file is not None and state.is_world_process_zero:
            announce(f"watching by {self._config_file}, named by {CONFIG}")
        super().on_train_begin(args, state, control, **kwargs)
        sinks = self.monitor.sinks if self.monitor else ()
        self.run_folder = next((sink.path for sink in sinks if isinstance(sink, StoreSink)), None)


def config_from_environment(instead: str = "SMDACallback.from_config(...) in a script") -> str:
    """The file that SMDA_CONFIG names. ``instead``: what to do where it cannot be set, for the message.

    Raises:
        ConfigError: it is not set.
    """
    named = os.environ.get(CONFIG)
    if not named:
        raise ConfigError(
            f"no configuration: without arguments the callback reads the file that {CONFIG} names, and {CONFIG} is not "
            f"set. Next step: {CONFIG}=smda.yaml before the command, or {instead}."
        )
    return named


def announce(text: str) -> None:
    """Say on stderr what nobody may overlook: many programs set up logging so that notes of libraries are dropped."""
    print(f"[smda] {text}", file=sys.stderr, flush=True)  # noqa: T201
