"""``smda run``: the script is what it would be without it, and what is missing is said before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import json, os, sys
import beside
heavy = [name for name in ("torch", "transformers", "smda_callbacks.config") if name in sys.modules]
env = [os.environ.get(name) for name in ("SMDA", "SMDA_CONFIG")]
print(json.dumps({"argv": sys.argv[1:], "name": __name__, "heavy": heavy, "env": env, "main": "json" in
    vars(sys.modules["__main__"])}))
if "fail" in sys.argv:
    raise ValueError("of the script")
if "leave" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "beside.py").write_text("")
    (tmp_path / "smda.yaml").write_text("sae: {source: x}\n")
    return tmp_path


def smda_run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SMDA")}
    command = [sys.executable, "-m", "smda_callbacks", "run", *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--", "scripts/train.py", "--config", "x", "--", "y"], "."),
        (["scripts/train.py", "--config", "x", "--", "y"], "."),
        (["-m", "train", "--", "--config", "x", "--", "y"], "scripts"),
        (["-m", "train", "--config", "x", "--", "y"], "scripts"),
    ],
)
def test_a_script_gets_its_arguments_and_its_folder(words: list[str], where: str, folder: Path) -> None:
    config = os.path.relpath(folder / "smda.yaml", folder / where)
    done = smda_run("--config", config, *words, cwd=folder / where)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["argv"] == ["--config", "x", "--", "y"]
    assert (seen["name"], seen["main"]) == ("__main__", True)
    assert seen["heavy"] == [], "a script may set HF_HOME before it imports transformers"
    assert seen["env"][0] == "1"
    assert Path(seen["env"][1]).is_absolute()
    assert Path(seen["env"][1]).samefile(folder / "smda.yaml")


def test_its_exit_code_and_its_errors_are_its_own(folder: Path) -> None:
    left = smda_run("--config", "smda.yaml", "--", "scripts/train.py", "leave", cwd=folder)
    assert (left.returncode, left.stderr) == (7, "")
    failed = smda_run("--config", "smda.yaml", "--", "scripts/train.py", "fail", cwd=folder)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback")
    assert 'raise ValueError("of the script")' in failed.stderr
    assert failed.stderr.endswith("ValueError: of the script\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "smda.yaml"], "nothing to run. Next step: smda run -- script.py ARGUMENTS"),
        (["--config", "smda.yaml", "-m"], "nothing to run."),
        (["--config", "smda.yaml", "--"], "nothing to run."),
        (["--config", "smda.yaml", "--", "nowhere.py"], "script 'nowhere.py' does not exist."),
        (["--config", "smda.yaml", "--script.py"], "unrecognized arguments: --script.py"),
        (["--", "scripts/train.py"], "no configuration is named. Next step: smda run --config FILE"),
        (["--config", "no.yaml", "--", "scripts/train.py"], "configuration 'no.yaml' does not exist."),
    ],
)
def test_what_is_missing_is_said_before_the_script_starts(
    words: list[str], message: str, folder: Path, smda: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SMDA_CONFIG", raising=False)
    found = smda("run", *words)
    assert (found.code, found.out) == (2, "")
    assert message in found.err


def test_the_environment_names_a_configuration_too(
    folder: Path, smda: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SMDA_CONFIG", "no.yaml")
    assert "configuration 'no.yaml' does not exist" in smda("run", "--", "scripts/train.py").err
