"""``smda wandb``: a stored run written offline, and views printed without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.sinks.wandb_runs import note_synced
from tests.helpers.runs import make_run, write_run
from tests.helpers.wandb_runs import read_back
from tests.helpers.wandb_server import wandb_server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", make_run(windows=2, pairs=4))


def test_sync_writes_an_offline_run_once(
    run: Path, tmp_path: Path, smda: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    shown = smda("wandb", "sync", run, "--mode", "offline", "--project", "p", "--json")
    assert shown.code == 0, shown.err
    found = shown.json
    assert (found["id"], found["project"], found["rows"], found["of"]) == ("smda-made-up", "p", 3, 3)
    assert f"wandb sync {found['folder']}" in shown.err.replace("\n", " ")
    wandb.teardown()
    records = read_back(Path(found["folder"]))
    assert sum(each["type"] == "history" and "smda/run/unreadable" in str(each) for each in records) == 3
    again = smda("wandb", "sync", run, "--mode", "offline", "--project", "p")
    assert again.out.startswith("Nothing was sent:")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_views_are_printed_without_a_server(run: Path, smda: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    note_synced(run, {"id": "x", "project": "p", "entity": "me", "url": None, "offline": False})
    report = smda("wandb", "report", run, "--dry-run", "--name", "What it did")
    assert report.code == 0, report.err
    assert json.loads(report.out)["displayName"] == "What it did"
    workspace = smda("wandb", "workspace", run, "--dry-run")
    assert "smda/refusal_ledger_refuse/pairs" in workspace.out
    assert json.loads(workspace.out)["project" if "project" in json.loads(workspace.out) else "spec"]


def test_a_view_of_a_run_that_w_and_b_has_not_is_refused(run: Path, smda: Callable[..., Any]) -> None:
    shown = smda("wandb", "workspace", run, "--dry-run")
    assert shown.code == 2
    assert f"was never sent to W&B. Next step: smda wandb sync {run}" in shown.err


def test_views_are_saved(run: Path, tmp_path: Path, smda: Callable[..., Any]) -> None:
    note_synced(run, {"id": "x", "project": "p", "entity": "me", "url": None, "offline": False})
    with wandb_server(tmp_path) as server:
        for what in ("workspace", "report"):
            shown = smda("wandb", what, run, "--name", f"my {what}", "--json")
            assert shown.code == 0, shown.err
            assert shown.json["url"].startswith("http")
            assert shown.json["sections"][0] == "Verdict"
        assert [view["displayName"] for view in server.books.views] == ["my workspace", "my report"]
        assert {view["projectName"] for view in server.books.views} == {"p"}
