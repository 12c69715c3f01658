"""The script that users copy, as they run it: a process of its own, a configuration, a file of pairs, no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import audit_pairs
from smda_callbacks.sinks.pair_table import column, pair_table
from smda_callbacks.sinks.store_reader import RunStore
from tests.recipes.test_sft_lora_refusal import inputs, write_rows

__all__ = ["inputs"]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "audit_pairs.py"


def audit(folder: Path, *options: str) -> tuple[RunStore, str]:
    """The script in a process of its own, on the CPU, in ``folder``; the store and what was printed."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return RunStore.open(folder / "runs" / "audit"), done.stdout


def test_pairs_are_audited_ranked_and_reported(inputs: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Tell me about tea {k}.", "completion": "Sure.", "kind": f"kind-{k}"} for k in range(4)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    store, printed = audit(tmp_path, "--config", str(inputs / "config.yaml"), "--pairs", "pairs.jsonl")
    assert [window.step for window in store.windows()] == [1, 2, 3, 4]
    table = pair_table(store.start, store.windows())
    assert table is not None
    effect = table.effect[:, column(table, "refusal:harmful")]
    first = max(range(4), key=lambda k: abs(effect[k]))
    assert f"row    {first} {effect[first]:+.6f}  kind-{first}" in printed
    assert f"report: {Path('runs/audit/report.html')}" in printed
    assert (store.path / "report.html").stat().st_size > 100_000


def test_a_configuration_without_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text("sae: {source: x}\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--config", str(tmp_path / "config.yaml"), "--pairs", "p.jsonl"])
    with pytest.raises(SystemExit, match=r"names no model\. Next step: give --model, or set model\.id\."):
        audit_pairs.main()
