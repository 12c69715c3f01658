"""The plugin for Axolotl: two lines in its YAML file.

    plugins: [smda_callbacks.launch.axolotl.SMDAPlugin]
    smda_config: smda.yaml

Only Axolotl imports this file. ``recipes/axolotl/README.md`` says how the two are installed side by side.
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel


class SMDAArgs(BaseModel):
    """The key that the plugin adds to Axolotl's own."""

    smda_config: str | None = None


class SMDAPlugin(BasePlugin):
    """Gives Axolotl's trainer the callback. Without ``smda_config`` the variable SMDA_CONFIG names the file."""

    def register(self, cfg: Any) -> None:
        """Refuse a configuration that cannot be used, before a model is loaded.

        Raises:
            ConfigError: no configuration is named, or it has faults.
        """
        from smda_callbacks.config.load import load_config

        load_config(config_file(cfg))

    def get_input_args(self) -> str:
        """Where Axolotl finds the key that this plugin adds."""
        return "smda_callbacks.launch.axolotl.SMDAArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """The callback, unless SMDA=1 or the trainer's ``report_to`` put one in already."""
        from smda_callbacks.config.callback import SMDACallback
        from smda_callbacks.training.callback import MeasuringCallback

        if any(isinstance(each, MeasuringCallback) for each in trainer.callback_handler.callbacks):
            return []
        file = config_file(cfg)
        show_in_axolotls_log()
        logging.getLogger("axolotl.smda").info(f"watching by {file}")
        return [SMDACallback.from_config(file)]


def config_file(cfg: Any) -> str:
    """The file that Axolotl's ``smda_config`` names, or else SMDA_CONFIG.

    Raises:
        ConfigError: neither does.
    """
    from smda_callbacks.config.callback import config_from_environment

    named = cfg.get("smda_config")
    if named:
        return str(named)
    return config_from_environment("smda_config: smda.yaml in Axolotl's file")


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger("axolotl.smda").log(record.levelno, record.getMessage())


def show_in_axolotls_log() -> None:
    """Pass the library's messages on under a name of Axolotl's, which drops notes of all others."""
    logger = logging.getLogger("smda_callbacks")
    logger.filters.clear()
    logger.handlers[:] = [_Forward()]
    logger.propagate = False
    logger.setLevel(logging.INFO)
