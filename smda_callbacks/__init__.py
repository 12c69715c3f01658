"""Watch what a LoRA fine-tuning run does to a model's behaviour, through which SAE features, live.

Names are loaded on first use, so that ``import smda_callbacks.maths.ridge`` costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "SMDACallback": "smda_callbacks.config.callback",
    "register": "smda_callbacks.launch.inject",
    "load_config": "smda_callbacks.config.load",
    "RunStore": "smda_callbacks.sinks.store_reader",
    "write_report": "smda_callbacks.report.page",
    "scorer": "smda_callbacks.observe.behaviour",
}

__all__ = ["RunStore", "SMDACallback", "__version__", "load_config", "register", "scorer", "write_report"]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Available: {', '.join(__all__)}.")
