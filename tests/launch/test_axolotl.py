"""The plugin: against the documented interface of Axolotl's ``BasePlugin``, and, where Axolotl is installed, in it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from smda_callbacks import SMDACallback
from smda_callbacks.config.load import ConfigError
from tests.launch.conftest import BIN, Desk, launch, trained

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "axolotl" / "quickstart.yaml"
INSTALLED = find_spec("axolotl") is not None


class BasePlugin:
    """What Axolotl documents of the methods that a plugin may override, with their defaults."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, found as Axolotl finds it: by the name that stands in the YAML file."""
    if not INSTALLED:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setattr(sys.modules["axolotl.integrations.base"], "BasePlugin", BasePlugin, raising=False)
    monkeypatch.delenv("SMDA_CONFIG", raising=False)
    (name,) = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["plugins"]
    module, _, kind = name.rpartition(".")
    yield getattr(importlib.import_module(module), kind)()
    sys.modules.pop(module, None)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The library's logger, as it was afterwards."""
    found = logging.getLogger("smda_callbacks")
    before = (list(found.handlers), list(found.filters), found.propagate, found.level)
    yield found
    found.handlers[:], found.filters[:], found.propagate = before[0], before[1], before[2]
    found.setLevel(before[3])


def trainer_with(*callbacks: Any) -> Any:
    return SimpleNamespace(callback_handler=SimpleNamespace(callbacks=list(callbacks)))


def test_it_adds_the_callback_and_shows_the_log(
    plugin: Any, desk: Desk, logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="axolotl.smda"):
        (added,) = plugin.add_callbacks_post_trainer({"smda_config": desk.smda}, trainer_with())
        logger.info("step 1")
    assert isinstance(added, SMDACallback)
    assert [(each.name, each.getMessage()) for each in caplog.records] == [
        ("axolotl.smda", f"watching by {desk.smda}"),
        ("axolotl.smda", "step 1"),
    ]


def test_it_adds_no_second_one(plugin: Any, desk: Desk) -> None:
    there = SMDACallback.from_config(desk.smda)
    assert plugin.add_callbacks_post_trainer({"smda_config": desk.smda}, trainer_with(there)) == []


def test_the_environment_names_the_file_where_the_recipe_does_not(
    plugin: Any, desk: Desk, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMDA_CONFIG", desk.smda)
    plugin.register({})
    assert len(plugin.add_callbacks_post_trainer({}, trainer_with())) == 1


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({}, r"SMDA_CONFIG is not set\. Next step: .* or smda_config: smda\.yaml in Axolotl's file\."),
        ({"smda_config": "nowhere.yaml"}, r"configuration 'nowhere\.yaml' does not exist"),
    ],
)
def test_a_configuration_that_cannot_be_used_stops_before_a_model_is_loaded(
    cfg: dict[str, Any], message: str, plugin: Any
) -> None:
    with pytest.raises(ConfigError, match=message):
        plugin.register(cfg)


def test_its_key_is_declared_to_axolotl(plugin: Any) -> None:
    module, _, kind = plugin.get_input_args().rpartition(".")
    declared = getattr(importlib.import_module(module), kind)
    assert set(declared.model_fields) == {"smda_config"}
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    assert (ROOT / declared(**recipe).smda_config).is_file()
    assert (ROOT / recipe["base_model"]).is_dir()
    assert (ROOT / recipe["datasets"][0]["path"]).is_file()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="axolotl is not installed; recipes/axolotl/README.md says how")
def test_axolotl_trains_the_recipe(tmp_path: Path) -> None:
    folders = ("--output-dir", str(tmp_path / "out"), "--dataset-prepared-path", str(tmp_path / "prepared"))
    command = (str(BIN / "axolotl"), "train", str(RECIPE), "--launcher", "python")
    env = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    done = launch(*command, *folders, cwd=ROOT, env=env)
    trained(done, tmp_path / "out", steps=(2, 4))
    assert "[axolotl.smda] watching by configs/tiny_cpu.yaml" in done.stdout
