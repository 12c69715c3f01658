"""``smda compare``: what it shows, what it refuses, and where it finds runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.cli import quickstart_run
from smda_callbacks.config.build import builtin_path
from smda_callbacks.report.ranking import ranked
from smda_callbacks.sinks.pair_table import pair_table
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.compared import with_effects, with_manifest, without_pairs
from tests.helpers.runs import make_run, write_run
from tests.helpers.wandb_runs import log_records, offline_wandb

Smda = Callable[..., Any]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run, and one with another learning rate that ends sooner and had no pair 2."""
    root = tmp_path_factory.mktemp("stores")
    run = with_effects(make_run(windows=4, pairs=8), dict.fromkeys(range(8), 100.0))
    short = without_pairs(replace(run, windows=run.windows[:3], end=replace(run.end, step=6)), {2})
    other = with_manifest(short, run_id="other", trainer__learning_rate=1e-3)
    return write_run(root / "a", run), write_run(root / "b", other)


def test_it_says_what_differs(stores: tuple[Path, Path], smda: Smda) -> None:
    found = smda("compare", *stores)
    assert found.code == 0, found.err
    assert re.search(rf"^A  {stores[0]}  \(run made-up, steps 0 to 8, finished\)$", found.out, re.M)
    assert re.search(r"trainer.learning_rate +0.0002 +0.001 *$", found.out, re.M)
    assert re.search(r"The runs end apart \(A at step 8, B at step 6\)", found.out)
    for title in ("Refusal on probes to refuse", "Refusal at the end of each run", "Shift of the policy over each run",
                  "Features whose shift differs most, B − A", "Pairs that act in one run and not in another: 1",
                  "Cost of measuring"):  # fmt: skip
        assert title in found.out
    assert re.search(r"^ +2 +– +benign +\S+ +absent +A +<b>pair 2</b>", found.out, re.M)


def test_json_and_page_and_top(stores: tuple[Path, Path], smda: Smda, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    found = smda("compare", *stores, "--json", "--html", page, "--top", 2)
    assert found.json["runs"]["A"]["given"] == str(stores[0])
    assert found.json["runs"]["B"]["last_step"] == 6
    assert found.json["html"] == str(page)
    assert len(found.json["features"]) == 6
    assert "And 4 further features." in found.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads(found.out) == found.json


def test_what_is_not_shared_is_refused_and_the_option_lets_it_through(
    stores: tuple[Path, Path], smda: Smda, tmp_path: Path
) -> None:
    other = shutil.copytree(stores[0], tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["sae"]["hash"], manifest["probe_hash"] = "another-sae", "other-probes"
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused = smda("compare", stores[0], other)
    assert refused.code == 2
    assert refused.out == ""
    assert "do not share their probes and SAE, so" in refused.err
    assert re.search(r"\n  probes: A \w+, B other-probes\n  SAE: A 5ae, B another-sae\nNext step", refused.err)
    assert "--allow-mismatch" in refused.err
    allowed = smda("compare", stores[0], other, "--allow-mismatch")
    assert allowed.code == 0
    assert "SAE: A 5ae, B another-sae" in allowed.out
    assert "Features of different SAEs" in allowed.out


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_are_refused(stores: tuple[Path, Path], smda: Smda, number: int) -> None:
    found = smda("compare", *stores[:number])
    assert found.code == 2
    assert re.search(r"RUN.*Next step" if number == 0 else r"1 run given; a comparison takes 2", found.err)


def test_what_is_no_run_is_refused_with_what_is_near(stores: tuple[Path, Path], smda: Smda, tmp_path: Path) -> None:
    assert "does not exist. Next step" in smda("compare", stores[0], tmp_path / "nowhere").err
    assert f"give {stores[0]} or {stores[1]}" in smda("compare", stores[0].parent, stores[1]).err
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-1" / "run-x.wandb").touch()
    near = smda("compare", stores[0], tmp_path / "wandb")
    assert re.search(r"holds 1 W&B run\. Next step: give .*offline-run-1\.", near.err)


# --------------------------------------------------------------------------------------------------------------- W&B


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[Path]:
    with offline_wandb(tmp_path):
        yield tmp_path


def test_a_wandb_folder_without_its_store_is_compared_in_what_it_has(
    stores: tuple[Path, Path], offline: Path, smda: Smda
) -> None:
    run = make_run(windows=4, pairs=8)
    logged = log_records(offline / "store", run.start, run.windows, run.alerts, run.end)
    with_store = smda("compare", logged.folder, stores[0], "--json")
    assert with_store.json["runs"]["A"]["store"] == str((offline / "store").resolve())
    assert with_store.json["features"]

    alone = offline / "alone" / "deep" / "run"
    shutil.copytree(logged.folder, alone)
    shutil.rmtree(offline / "store")
    shutil.rmtree(offline / "artifacts")
    found = smda("compare", alone, stores[0], "--json", "--cache", offline / "cache")
    assert found.code == 0, found.err
    assert found.json["runs"]["A"]["source"] == "W&B folder"
    assert found.json["features"] is None
    assert re.search(r"A: no run store was found.*no\s+difference\s+in\s+policy", found.err, re.S)
    apart = found.json["trajectories"]["smda/refusal/fraud"]["at_end"]["B"]
    assert apart["difference"] == pytest.approx(0, abs=1e-12)
    assert "smda/summary/refusal_refuse_end" in found.json["summary"]


def test_a_name_on_the_server_is_taken_where_there_is_no_such_path(
    stores: tuple[Path, Path], smda: Smda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Artifact:
        type, version, digest = "smda-store", "v0", "abc"

        def download(self, root: str) -> None:
            shutil.copytree(stores[1], root)

    class Api:
        def __init__(self, timeout: int) -> None: ...

        def run(self, path: str) -> Any:
            assert path == "me/project/r1"
            return type("Run", (), {"logged_artifacts": lambda self: [Artifact()]})()

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "project" / "r1").mkdir(parents=True)  # W&B's own empty folder, left by an earlier time
    found = smda("compare", stores[0], "me/project/r1", "--json", "--cache", tmp_path / "cache")
    assert found.code == 0, found.err
    assert found.json["runs"]["B"]["source"] == "W&B"
    assert found.json["runs"]["B"]["run_id"] == "other"
    assert Path(found.json["runs"]["B"]["store"]).is_relative_to(tmp_path / "cache")


# ------------------------------------------------------------------------------------------------- two real trainings


@pytest.mark.slow
def test_without_the_pairs_that_wore_it_down_most_refusal_falls_less(
    tmp_path: Path, smda: Smda, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quickstart_run.settings
    fewer = {"probes": {"max_per_category": 6}}
    monkeypatch.setattr(quickstart_run, "settings", lambda folder: whole(folder) | fewer)
    assert smda("quickstart", "--dir", tmp_path / "all").code == 0
    store = RunStore.open(tmp_path / "all" / "run")
    table = pair_table(store.start, store.windows())
    assert table is not None
    worst = sorted(ranked(table, store.policy, "refusal:harmful"), key=lambda row: row["effect"])[:10]
    lines = Path(builtin_path(quickstart_run.PAIRS)).read_text(encoding="utf-8").splitlines()
    dropped = {number for row in worst for number in row["rows"]}
    (tmp_path / "kept.jsonl").write_text("\n".join(line for n, line in enumerate(lines) if n not in dropped))
    monkeypatch.setattr(quickstart_run, "PAIRS", str(tmp_path / "kept.jsonl"))
    assert smda("quickstart", "--dir", tmp_path / "kept").code == 0

    found = smda("compare", tmp_path / "all" / "run", tmp_path / "kept" / "run", "--json").json
    assert found["mismatches"] == {}
    refuse = found["trajectories"]["smda/refusal_group/refuse"]
    # What the pairs did together, in the run that had them, is about what is missing without them.
    missing = -sum(row["effect"] for row in worst)
    assert refuse["at_common"]["B"]["difference"] == pytest.approx(missing, rel=0.5)
    assert refuse["at_end"]["B"]["above_noise"]
    absent = [each for each in found["pairs"]["differing"] if each["runs"]["B"]["state"] == "absent"]
    assert {each["text"] for each in absent} == {row["text"] for row in worst}
    assert {tuple(each["acts_in"]) for each in absent} == {("A",)}
