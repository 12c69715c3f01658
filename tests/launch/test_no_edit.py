"""TRL's own command and script, unmodified, as users type them: watched where that is asked for, and nowhere else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import trl.scripts.sft as sft

from tests.launch.conftest import BIN, Desk, launch, trained

TRL = str(BIN / "trl")
SMDA = str(BIN / "smda")
ADDED = "[smda] callback added to SFTTrainer, asked for by SMDA=1 or smda run"


def test_smda_run_puts_the_callback_into_trls_script(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out")
    done = launch(SMDA, "run", "--config", desk.smda, "-m", "trl.scripts.sft", "--", "--config", recipe, cwd=tmp_path)
    trained(done, tmp_path / "out")
    assert done.stderr.count(ADDED) == 1
    assert f"[smda] watching by {desk.smda}, named by SMDA_CONFIG" in done.stderr


def test_the_trl_command_hands_it_on_to_the_process_that_it_starts(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out")
    env = {"SMDA": "1", "SMDA_CONFIG": desk.smda}
    done = launch(TRL, "sft", "--config", recipe, cwd=tmp_path, env=env)
    trained(done, tmp_path / "out")
    assert done.stderr.count(ADDED) == 1


def test_report_to_in_a_yaml_file_names_it_beside_wandb(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out", report_to=["wandb", "smda"])
    env = {"SMDA": "1", "SMDA_CONFIG": desk.smda}
    done = launch(sys.executable, sft.__file__, "--config", recipe, cwd=tmp_path, env=env)
    store = trained(done, tmp_path / "out")
    assert ADDED not in done.stderr, "it is there already: a second one would measure everything twice"
    assert not (tmp_path / "out" / "smda-2").exists()
    assert "watching by" in done.stderr
    assert (store.path / "logged.jsonl").is_file(), "it logs into the W&B run that stands before it in the list"


def test_without_being_asked_for_nothing_happens(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out")
    done = launch(sys.executable, sft.__file__, "--config", recipe, cwd=tmp_path, env={"SMDA_CONFIG": desk.smda})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "smda").exists()
    assert "smda" not in done.stderr


@pytest.mark.slow
def test_a_missing_configuration_stops_before_the_first_step(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out")
    done = launch(sys.executable, sft.__file__, "--config", recipe, cwd=tmp_path, env={"SMDA": "1"})
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "smda_callbacks.config.load.ConfigError: no configuration: without arguments the callback reads the file "
            "that SMDA_CONFIG names, and SMDA_CONFIG is not set. Next step: SMDA_CONFIG=smda.yaml before the command"
        )
    )
    assert "'loss'" not in done.stdout
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_two_processes_of_torchrun(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out", ddp_backend="gloo")
    command = (str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "smda_callbacks")
    run = ("run", "--config", desk.smda, "-m", "trl.scripts.sft", "--", "--config", recipe)
    done = launch(*command, *run, cwd=tmp_path)
    trained(done, tmp_path / "out")
    assert done.stderr.count(ADDED) == 1, "told by the main process only"


@pytest.mark.slow
def test_the_yaml_file_alone_can_ask_for_it(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out", env={"SMDA": "1", "SMDA_CONFIG": desk.smda})
    trained(launch(TRL, "sft", "--config", recipe, cwd=tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_accelerate_launch(desk: Desk, tmp_path: Path) -> None:
    recipe = desk.recipe(tmp_path / "out")
    command = (str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1", "-m", "smda_callbacks")
    run = ("run", "--config", desk.smda, "--", sft.__file__, "--config", recipe)
    trained(launch(*command, *run, cwd=tmp_path), tmp_path / "out")


@pytest.mark.slow
def test_a_script_that_is_started_plainly_registers_the_name(desk: Desk, tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    line = "from smda_callbacks import register; register()\n"
    script.write_text(line + Path(sft.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    recipe = desk.recipe(tmp_path / "out", report_to=["smda"])
    env = {"SMDA_CONFIG": desk.smda}
    trained(launch(sys.executable, str(script), "--config", recipe, cwd=tmp_path, env=env), tmp_path / "out")
