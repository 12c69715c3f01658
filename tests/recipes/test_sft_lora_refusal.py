"""The script that users copy, as they run it: a process of its own, a configuration, a file of pairs, no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import sft_lora_refusal
from smda_callbacks.report.verify import verify
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "sft_lora_refusal.py"
STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its SAE, probes, pairs in two shapes, and a configuration that names them."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model().save_pretrained(folder / "tiny")
    tiny_tokenizer().save_pretrained(folder / "tiny")
    save_sae(tiny_sae(), folder / "sae")
    write_rows(folder / "probes.jsonl", [vars(probe) for probe in many_probes(24).probes])
    pairs = [(f"Tell me about tea number {k}.", f"Sure, here is tea {k}.") for k in range(12)]
    write_rows(folder / "texts.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    roles = ("user", "assistant")
    chats = [[{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)] for pair in pairs]
    write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    config = {
        "model": {"id": "./tiny", "dtype": "float32"},
        "probes": {"sources": [{"source": "./probes.jsonl"}]},
        "sae": {"source": "./sae"},
        "policy": {"support": 6, "min_active": 3, "cv_folds": 3},
        "measure": {"noise_draws": 1, "on_error": "raise"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(folder: Path, *options: str) -> tuple[RunStore, str]:
    """The script in a process of its own, on the CPU, with outputs below ``folder``; the run and what was printed."""
    small = ("--batch-size", "2", "--accumulation", "1", "--rank", "2", "--learning-rate", "5e-3")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--max-steps", str(STEPS), *small],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return RunStore.open(folder / "runs" / "sft" / "smda"), done.stdout


def test_a_run_is_written_reported_and_verifies(inputs: Path, tmp_path: Path) -> None:
    options = ("--config", str(inputs / "config.yaml"), "--data", str(inputs / "texts.jsonl"))
    store, printed = train(tmp_path, *options)
    assert [window.step for window in store.windows()] == list(range(1, STEPS + 1))
    assert all(window.status == "ok" for window in store.windows())
    assert store.end is not None
    assert store.end.status == "finished"
    assert all(check.ok for check in verify(store)), verify(store)
    assert store.manifest["trainer"]["learning_rate"] == 5e-3
    assert store.manifest["adapter"]["default"]["r"] == 2
    assert store.manifest["config"]["policy"]["support"] == 6
    assert (tmp_path / "runs" / "sft" / "adapter_model.safetensors").is_file()
    assert f"report: {Path('runs/sft/smda/report.html')}" in printed
    assert f"smda verify {Path('runs/sft/smda')}" in printed
    assert (store.path / "report.html").stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_cpu", "quickstart"])
def test_it_runs_on_what_ships(name: str, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / f"{name}.yaml")
    store, _ = train(tmp_path, "--config", config, "--data", "builtin:quickstart/sft_pairs.jsonl")
    assert all(window.status == "ok" for window in store.windows())
    assert all(check.ok for check in verify(store)), verify(store)


# Data and messages, in this process -----------------------------------------------------------------------------------


def test_pairs_are_the_same_as_texts_and_as_messages(inputs: Path) -> None:
    texts, chats = (list(sft_lora_refusal.read_pairs(str(inputs / name))) for name in ("texts.jsonl", "chats.jsonl"))
    assert texts == chats
    assert texts[0] == {
        "prompt": [{"role": "user", "content": "Tell me about tea number 0."}],
        "completion": [{"role": "assistant", "content": "Sure, here is tea 0."}],
    }


def test_a_longer_chat_is_trained_on_its_last_answer() -> None:
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    assert sft_lora_refusal.as_chat({"messages": chat}) == {"prompt": chat[:4], "completion": chat[4:]}
    split = {"prompt": chat[:4], "completion": chat[4:]}
    assert sft_lora_refusal.as_chat({**split, "kind": "benign"}) == split


def test_a_configuration_without_a_model_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("sae: {source: x}\n", encoding="utf-8")
    options = ["--config", str(tmp_path / "config.yaml"), "--data", str(inputs / "texts.jsonl")]
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options])
    with pytest.raises(SystemExit, match=r"names no model\. Next step: give --model, or set model\.id\."):
        sft_lora_refusal.main()
