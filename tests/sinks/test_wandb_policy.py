"""Policies as W&B artifacts: sent by a real offline run, used by runs, fetched with a stand-in for W&B's API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from smda_callbacks.config.build import build_plan, load_policy
from smda_callbacks.config.load import check_config
from smda_callbacks.records import RunStart, policy_hash
from smda_callbacks.sinks.store import write_policy
from smda_callbacks.sinks.wandb_fetch import WandbFetchError
from smda_callbacks.sinks.wandb_policy import alias_of, log_policy, name_of, publish_policy
from tests.helpers.equal import assert_same
from tests.helpers.runs import make_run, write_run
from tests.helpers.wandb_runs import offline_wandb, read_back

POLICY = replace(make_run(windows=1).start.policy, model_id="my-org/my chat", sae_id="/somewhere/sae_16k")
PATH = "wandb:me/base/smda-policy-x:latest"


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "wandb"
    root.mkdir()
    with offline_wandb(root):
        yield root


def test_a_published_policy_is_an_artifact_that_runs_can_name(offline: Path) -> None:
    name = publish_policy(POLICY, "base")
    assert name == f"wandb:base/smda-policy-my-chat-sae_16k:policy-{policy_hash(POLICY)[:12]}"
    (folder,) = offline.rglob("offline-run-*")
    records = read_back(folder)
    (artifact,) = [each["artifact"] for each in records if each["type"] == "artifact"]
    assert (artifact["name"], artifact["type"]) == ("smda-policy-my-chat-sae_16k", "smda-policy")
    assert set(artifact["aliases"]) == {"latest", alias_of(POLICY)}
    assert {each["path"] for each in artifact["manifest"]["contents"]} == {"policy.json", "policy.safetensors"}
    assert json.loads(artifact["metadata"])["policy_hash"] == policy_hash(POLICY)


class FakeRun:
    """A run that notes what it is asked."""

    id, project, entity = "abc", "base", "me"

    def __init__(self, *, offline: bool = False) -> None:
        self.offline, self.used, self.logged = offline, list[str](), list[tuple[str, list[str]]]()

    def use_artifact(self, name: str, type: str) -> None:
        assert type == "smda-policy"
        self.used.append(name)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.logged.append((artifact.name, aliases))


def start_from(path: str | None) -> RunStart:
    start = make_run(windows=1).start
    return replace(start, policy=POLICY, manifest={**start.manifest, "config": {"policy": {"path": path}}})


@pytest.mark.parametrize("path", [None, "policies/base"])
def test_a_run_with_a_policy_of_its_own_sends_it(path: str | None, tmp_path: Path) -> None:
    run = FakeRun()
    log_policy(run, write_run(tmp_path / "run", make_run(windows=1)), start_from(path))
    assert run.logged == [(name_of(POLICY), ["latest", alias_of(POLICY)])]
    assert run.used == []


@pytest.mark.parametrize("offline_run", [False, True])
def test_a_run_that_starts_from_an_artifact_says_so_and_sends_none(offline_run: bool, tmp_path: Path) -> None:
    run = FakeRun(offline=offline_run)
    log_policy(run, tmp_path, start_from(PATH))
    assert run.used == ([] if offline_run else ["me/base/smda-policy-x:latest"])
    assert run.logged == []


def test_policies_of_one_model_and_sae_are_versions_of_one_artifact() -> None:
    other = replace(POLICY, lam=2 * POLICY.lam)
    assert name_of(other) == name_of(POLICY)
    assert alias_of(other) != alias_of(POLICY)
    assert name_of(replace(POLICY, sae_id="sae_131k")) != name_of(POLICY)


class Api:
    """W&B's API with one artifact."""

    folder = Path()

    def __init__(self, timeout: int) -> None: ...

    def artifact(self, name: str, type: str) -> Any:
        if (name, type) != ("me/base/smda-policy-x:latest", "smda-policy"):
            raise ValueError("artifact not found")
        return SimpleNamespace(download=lambda root: shutil.copytree(self.folder, root, dirs_exist_ok=True))


def test_a_configuration_may_name_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_policy(tmp_path / "saved", POLICY)
    monkeypatch.setattr(Api, "folder", tmp_path / "saved")
    monkeypatch.setattr(wandb, "Api", Api)
    plan = build_plan(check_config({"sae": {"source": "x"}, "policy": {"path": PATH}}, "test"))
    assert_same(plan.policy, POLICY)
    assert plan.config["policy"]["path"] == PATH


def test_an_artifact_that_is_not_there_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", Api)
    with pytest.raises(WandbFetchError, match=r"wandb:me/base/other:v3 cannot.*artifact not found.*smda distill --out"):
        load_policy("wandb:me/base/other:v3")
