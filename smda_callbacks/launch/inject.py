"""The callback for a training script that is not edited.

Two things are done to transformers, each in the moment that the script itself imports the part in question:
``report_to`` learns the name ``smda``, and a trainer without the callback gets it when it begins to train. Nothing is
imported before, because a script may want to set CUDA_VISIBLE_DEVICES or HF_HOME first; and this file may import
nothing heavy, because with ``SMDA=1`` every Python interpreter does so at its start.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smda_callbacks.config.callback import SMDACallback

#: The name in ``report_to``.
NAME = "smda"

INTEGRATIONS = "transformers.integrations.integration_utils"
TRAINER = "transformers.trainer"

Hook = Callable[[ModuleType], None]


class Deferred:
    """Stands for :class:`SMDACallback` in transformers' table: the trainer calls it, and gets one by SMDA_CONFIG.

    Making the table is no time to import the real one, which imports transformers.
    """

    def __new__(cls) -> SMDACallback:  # type: ignore[misc]
        from smda_callbacks.config.callback import SMDACallback

        return SMDACallback()


def register() -> None:
    """Make ``report_to="smda"`` known to transformers, for scripts that are started without ``SMDA=1``."""
    _when_imported({INTEGRATIONS: add_name})


def install() -> None:
    """:func:`register`, and give the callback to every trainer that begins to train without one.

    A relative SMDA_CONFIG is taken from the working directory of now: the script may change it.
    """
    if os.environ.get("SMDA_CONFIG"):
        os.environ["SMDA_CONFIG"] = os.path.abspath(os.environ["SMDA_CONFIG"])  # noqa: PTH100 - pathlib takes longer
    _when_imported({INTEGRATIONS: add_name, TRAINER: watch_training})


def add_name(module: ModuleType) -> None:
    """Put ``smda`` into the table behind ``report_to``."""
    module.INTEGRATION_TO_CALLBACK.setdefault(NAME, Deferred)


def watch_training(module: ModuleType) -> None:
    """Wrap ``Trainer.train``, once."""
    original = module.Trainer.train
    if hasattr(original, "smda_original"):
        return

    @functools.wraps(original)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        add_callback(self)
        return original(self, *args, **kwargs)

    train.smda_original = original  # type: ignore[attr-defined]
    module.Trainer.train = train


def add_callback(trainer: Any) -> None:
    """Give ``trainer`` the callback of SMDA_CONFIG, unless it has one; say so on stderr, and let its messages through.

    Raises:
        ConfigError: SMDA_CONFIG is missing, or its file has faults.
    """
    import logging

    from smda_callbacks.config.callback import SMDACallback, announce
    from smda_callbacks.training.callback import MeasuringCallback

    if any(isinstance(each, MeasuringCallback) for each in trainer.callback_handler.callbacks):
        return
    trainer.add_callback(SMDACallback())
    logger = logging.getLogger("smda_callbacks")
    if logger.level == logging.NOTSET:  # a root logger at WARNING would hide the messages that the user has asked for
        logger.setLevel(logging.INFO)
    if trainer.is_world_process_zero():
        announce(f"callback added to {type(trainer).__name__}, asked for by SMDA=1 or smda run")


def _when_imported(hooks: dict[str, Hook]) -> None:
    """Run each hook on its module: now if it is loaded, else right after it is."""
    waiting = {}
    for name, hook in hooks.items():
        if name in sys.modules:
            hook(sys.modules[name])
        else:
            waiting[name] = hook
    if waiting:
        sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """A finder of ``sys.meta_path`` that finds nothing itself: others find the module, a hook follows its execution."""

    def __init__(self, hooks: dict[str, Hook]) -> None:
        self.hooks = hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = self.hooks.pop(fullname, None)
        if hook is None:
            return None
        # Other finders of this kind stay in the search: two may wait for one module.
        found = (each.find_spec(fullname, path, target) for each in sys.meta_path if each is not self)
        spec = next((each for each in found if each is not None), None)
        if spec is not None and spec.loader is not None:
            _follow(spec.loader, hook)
        return spec


def _follow(loader: Any, hook: Hook) -> None:
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        try:
            hook(module)
        except Exception:  # never break an import of somebody else's: say it, and let the script go on
            traceback.print_exc()
            print(f"[smda] {module.__name__} is not as expected: this process is not watched", file=sys.stderr)  # noqa: T201

    loader.exec_module = exec_module
