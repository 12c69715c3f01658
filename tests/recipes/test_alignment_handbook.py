"""The alignment-handbook recipes: every key is one that TRL knows, and the one for a CPU is run as its head says."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from recipes.alignment_handbook import sft
from smda_callbacks.config.load import load_config
from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.store_reader import RunStore
from tests.launch.conftest import launch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "alignment_handbook"


@pytest.mark.parametrize("name", ["quickstart", "config_lora", "config_qlora"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_every_key_is_known(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMDA_CONFIG", "of the test")  # the file's own env goes before it, until the test ends
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    here = ["--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    _, training, model, mixture = parser.parse_args_and_config(["--config", str(FOLDER / f"{name}.yaml"), *here])
    assert load_config(ROOT / os.environ["SMDA_CONFIG"]).model.id
    assert "smda" in training.report_to
    assert model.load_in_4bit is (name == "config_qlora")
    assert get_peft_config(model).target_modules >= {"q_proj", "down_proj"}
    assert len(mixture.datasets) == 1


def test_the_quickstart_trains_and_is_watched(tmp_path: Path) -> None:
    command = (sys.executable, str(FOLDER / "sft.py"), "--config", str(FOLDER / "quickstart.yaml"))
    here = ("--output_dir", str(tmp_path / "out"), "--max_steps", "2")
    done = launch(*command, *here, cwd=ROOT, env={"SMDA": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    store = RunStore.open(tmp_path / "out" / "smda")
    assert [(window.step, window.status) for window in store.windows()] == [(2, "ok")]
    assert all(check.ok for check in verify(store)), verify(store)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(SystemExit, match=r"load_in_4bit needs bitsandbytes, .* Next step: pip install bitsandbytes"):
        sft.require_bitsandbytes(ModelConfig(load_in_4bit=True))
    sft.require_bitsandbytes(ModelConfig())
