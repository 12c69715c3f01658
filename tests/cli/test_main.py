"""The frame of all commands: light help, exit codes, messages that say what to do, tracebacks only where asked for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from smda_callbacks import __version__
from smda_callbacks.cli import main as frame
from smda_callbacks.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "trl", "peft", "sae_lens", "wandb", "plotly", "pyarrow", "pydantic", "rich")


def loaded_after(code: str) -> set[str]:
    names = f"import sys; {code}; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True)
    return set(found.stdout.splitlines()[-1].split()) if found.stdout.strip() else set()


def test_help_loads_nothing_heavy() -> None:
    assert loaded_after("from smda_callbacks.cli.main import main; main(['--help'])") == set()


def test_the_probe_for_heavy_modules_can_fail() -> None:
    assert loaded_after("import rich") == {"rich"}


def test_help_names_every_command_with_its_line(smda: Callable[..., Any]) -> None:
    shown = smda("--help")
    assert shown.code == 0
    for name, module in COMMANDS.items():
        assert re.search(rf"^\s+{name}\s+{re.escape(module.HELP[:30])}", shown.out, re.M), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, smda: Callable[..., Any]) -> None:
    shown = smda(command, "--help")
    assert shown.code == 0
    assert COMMANDS[command].__doc__.split("\n")[0][:60] in shown.out
    assert "--debug" in shown.out


def test_version(smda: Callable[..., Any]) -> None:
    assert smda("--version").out == f"smda {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], r"unknown command 'distil'; did you mean 'distill'\? Allowed: quickstart, check, .*smda --help"),
        ([], r"COMMAND.*Next step: smda --help"),
        (["verify"], r"RUN.*Next step: smda verify --help"),
        (["report", "a", "b"], r"unrecognized arguments: b"),
        (
            ["check", "--format", "xstes"],
            r"unknown value of --format 'xstes'; did you mean 'xstest'\? .*smda check --help",
        ),
        (["config", "validat"], r"unknown command 'validat'; did you mean 'validate'\? .*smda config --help"),
        (["check", "--answers", "x"], r"--answers.*'x'"),
    ],
)
def test_wrong_usage_is_2_and_says_what_to_do(arguments: list[str], message: str, smda: Callable[..., Any]) -> None:
    found = smda(*arguments)
    assert found.code == 2
    assert found.out == ""
    assert re.search(message, found.err)
    assert "Traceback" not in found.err


def test_a_refusal_is_one_message_and_with_debug_a_traceback(smda: Callable[..., Any]) -> None:
    plain, debug = smda("verify", "nowhere"), smda("verify", "nowhere", "--debug")
    assert (plain.code, debug.code) == (2, 2)
    assert plain.err == "smda: run 'nowhere' does not exist. Next step: give a run store, the folder of store.dir.\n"
    assert "Traceback" in debug.err
    assert "RunError: run 'nowhere'" in debug.err


def test_what_was_not_foreseen_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(frame.verify, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        frame.main(["verify", "x"])


def test_control_characters_do_not_reach_the_terminal(smda: Callable[..., Any]) -> None:
    found = smda("verify", "evil\x1b[2Jname\x07")
    assert found.code == 2
    assert "\x1b" not in found.err.encode().decode()
    assert "\x07" not in found.err


def test_interruption_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(frame.verify, "run", interrupted)
    assert frame.main(["verify", "x"]) == 130


def test_python_m_is_the_same_command() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "smda_callbacks", "config", "validate", "nothing.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert "nothing.yaml" in found.stderr


def test_json_goes_alone_to_stdout(tmp_path: Any, smda: Callable[..., Any]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("sae: {source: x}\n")
    found = smda("config", "validate", file, "--json")
    assert json.loads(found.out) == found.json
    assert "1 file valid" in found.err
