"""The machinery of injection: nothing without SMDA=1, nothing heavy with it, one callback, no import broken."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import smda_callbacks
from smda_callbacks import SMDACallback
from smda_callbacks.config.load import ConfigError
from smda_callbacks.launch import inject
from tests.launch.conftest import Desk

ROOT = Path(smda_callbacks.__file__).parents[1]
PTH = ROOT / "smda_callbacks" / "launch" / "smda_callbacks_autostart.pth"
HEAVY = ("torch", "transformers", "trl", "peft", "sae_lens", "wandb", "numpy", "pydantic", "yaml", "pathlib", "inspect")


# The start of an interpreter ------------------------------------------------------------------------------------------


def started(line: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs ``line`` and prints every module it has loaded."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SMDA", "PYTHONPATH"))}
    code = f"import sys; loaded = sorted(sys.modules); {line or 'pass'}; print(*loaded)"
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True, check=False)


def test_the_installed_file_is_the_one_that_ships() -> None:
    installed = Path(sysconfig.get_path("purelib")) / PTH.name
    assert installed.is_file(), "installed before this route existed; next step: pip install -e . again"
    assert installed.read_text() == PTH.read_text()


@pytest.mark.parametrize("env", [{}, {"SMDA": "0"}, {"SMDA": ""}, {"SMDA_CONFIG": "smda.yaml"}])
def test_without_smda_1_nothing_is_imported(env: dict[str, str]) -> None:
    done = started(**env)
    assert done.returncode == 0
    assert done.stderr == ""
    assert not [name for name in done.stdout.split() if name.startswith("smda_callbacks")]


def test_with_smda_1_only_the_hook_is() -> None:
    done = started(SMDA="1")
    loaded = set(done.stdout.split())
    assert done.stderr == ""
    assert {name for name in loaded if name.startswith("smda_callbacks.")} == {
        "smda_callbacks.launch",
        "smda_callbacks.launch.autostart",
        "smda_callbacks.launch.inject",
    }
    assert not loaded & set(HEAVY)


def test_a_broken_installation_breaks_no_interpreter(tmp_path: Path) -> None:
    (tmp_path / "smda_callbacks").mkdir()
    (tmp_path / "smda_callbacks" / "__init__.py").write_text("raise RuntimeError('half an upgrade')")
    done = started(SMDA="1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    assert "half an upgrade" in done.stderr
    assert "sys" in done.stdout.split()


# Hooks on imports -----------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and is not."""
    (tmp_path / "smda_test_target.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "smda_test_target"
    sys.modules.pop("smda_test_target", None)


def test_a_hook_follows_the_import_once(module: str) -> None:
    seen: list[int] = []
    inject._when_imported({module: lambda found: seen.append(found.value)})
    assert seen == []
    assert __import__(module).value == 1
    __import__(module)
    assert seen == [1]


def test_a_hook_on_what_is_loaded_runs_now(module: str) -> None:
    __import__(module)
    seen: list[int] = []
    inject._when_imported({module: lambda found: seen.append(found.value)})
    assert seen == [1]


def test_two_may_wait_for_one_module(module: str) -> None:
    seen: list[str] = []
    inject._when_imported({module: lambda _: seen.append("first")})
    inject._when_imported({module: lambda _: seen.append("second")})
    __import__(module)
    assert sorted(seen) == ["first", "second"]


def test_a_hook_that_fails_is_told_and_the_import_goes_on(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    inject._when_imported({module: lambda found: found.nothing})
    assert __import__(module).value == 1
    told = capsys.readouterr().err
    assert "has no attribute 'nothing'" in told
    assert f"[smda] {module} is not as expected: this process is not watched" in told


def test_a_module_that_is_not_there_stays_so(module: str) -> None:
    inject._when_imported({"smda_test_nowhere": lambda _: None})
    with pytest.raises(ModuleNotFoundError, match="smda_test_nowhere"):
        __import__("smda_test_nowhere")


# What is done to transformers -----------------------------------------------------------------------------------------


def test_the_name_is_what_report_to_finds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import integration_utils

    monkeypatch.setenv("SMDA_CONFIG", desk.smda)
    monkeypatch.setattr(integration_utils, "INTEGRATION_TO_CALLBACK", {})
    smda_callbacks.register()
    (made,) = integration_utils.get_reporting_integration_callbacks(["smda"])
    assert isinstance(made, type), "the trainer calls what is a type"
    assert isinstance(made(), SMDACallback)


class Stub:
    """A trainer of which only what is touched exists."""

    def __init__(self, *callbacks: Any) -> None:
        self.callback_handler = SimpleNamespace(callbacks=list(callbacks))
        self.trained_with: list[str] = []

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.callbacks.append(callback)

    def is_world_process_zero(self) -> bool:
        return False

    def train(self, resume: bool = False) -> bool:
        """Trains."""
        self.trained_with = [type(each).__name__ for each in self.callback_handler.callbacks]
        return resume


@pytest.fixture
def trainer() -> type[Stub]:
    """A fresh class, watched."""
    module: Any = ModuleType("transformers.trainer")
    module.Trainer = type("Trainer", (Stub,), {"train": Stub.train})
    inject.watch_training(module)
    inject.watch_training(module)  # twice is once
    return module.Trainer


def test_a_trainer_gets_one_when_it_trains(desk: Desk, trainer: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMDA_CONFIG", desk.smda)
    one = trainer()
    assert one.callback_handler.callbacks == []
    assert one.train(resume=True) is True
    assert one.train() is False
    assert one.trained_with == ["SMDACallback"]
    assert trainer.train.__doc__ == "Trains."


@pytest.mark.parametrize(("own", "seen"), [(logging.NOTSET, logging.INFO), (logging.ERROR, logging.ERROR)])
def test_messages_come_through_unless_the_user_has_set_a_level(
    own: int, seen: int, desk: Desk, trainer: type[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMDA_CONFIG", desk.smda)
    logger = logging.getLogger("smda_callbacks")
    before = logger.level
    try:
        logger.setLevel(own)
        trainer().train()
        assert logger.level == seen
    finally:
        logger.setLevel(before)


def test_a_trainer_that_has_one_keeps_it(desk: Desk, trainer: type[Stub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMDA_CONFIG", raising=False)
    own = SMDACallback.from_config(desk.smda)
    one = trainer(own)
    one.train()
    assert one.callback_handler.callbacks == [own]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            None,
            r"reads the file that SMDA_CONFIG names, and SMDA_CONFIG is not set\. Next step: SMDA_CONFIG=smda\.yaml",
        ),
        ("", r"SMDA_CONFIG is not set"),
        ("nowhere.yaml", r"configuration 'nowhere\.yaml' does not exist"),
    ],
)
def test_no_configuration_stops_before_training(
    named: str | None, message: str, trainer: type[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMDA_CONFIG", raising=False)
    if named is not None:
        monkeypatch.setenv("SMDA_CONFIG", named)
    one = trainer()
    with pytest.raises(ConfigError, match=message):
        one.train()
    assert one.trained_with == []


def test_a_relative_configuration_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMDA_CONFIG", "smda.yaml")
    monkeypatch.setattr(inject, "_when_imported", lambda hooks: None)
    inject.install()
    assert os.environ["SMDA_CONFIG"] == str(tmp_path / "smda.yaml")
