"""``smda quickstart``: what ships with the library trains, is measured, verified and reported, twice the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.cli import quickstart_run
from smda_callbacks.cli.quickstart import MADE, PLANTED_GAP
from smda_callbacks.observe.probes import default_probes
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.equal import assert_same


def timeless(store: RunStore) -> list[Any]:
    """Everything in a store but times and the run's name."""
    manifest = {name: value for name, value in store.manifest.items() if name not in ("run_id", "created", "config")}
    records = (store.baseline, *store.windows())
    pairs = [None if each.pairs is None else replace(each.pairs, seconds=0.0) for each in records]
    windows = [vars(each) | {"seconds": 0.0, "pairs": book} for each, book in zip(records, pairs, strict=True)]
    return [manifest, store.probes, store.policy, store.noise, store.gaps_start, windows]


def test_two_runs_are_the_same_but_for_times(tiny_quickstart: Path, smda: Callable[..., Any]) -> None:
    stores = []
    for name in ("a", "b"):
        found = smda("quickstart", "--dir", tiny_quickstart / name, "--json")
        assert found.code == 0, found.err
        stores.append(RunStore.open(found.json["run"]))
    assert_same(timeless(stores[0]), timeless(stores[1]))
    assert [each.step for each in stores[0].windows()] == list(range(1, found.json["steps"] + 1))


def test_what_it_leaves_and_says(tiny_quickstart: Path, smda: Callable[..., Any]) -> None:
    found = smda("quickstart", "--dir", tiny_quickstart)
    assert found.code == 0, found.err
    assert set(MADE) == {path.name for path in tiny_quickstart.iterdir()}  # W&B's folder is elsewhere in tests
    for part in ("1. Build", "2. Train", "3. Report", "Refusal per category", "Features whose part", "Gaps", "Next"):
        assert part in found.out
    assert str(tiny_quickstart / "report.html") in found.out
    assert f"smda verify {tiny_quickstart / 'run'}" in found.out
    assert "wandb leet" in found.out
    assert re.search(r"step +2 of 2: refusal 0\.\d\d on probes to refuse, 0\.\d\d on the others, loss \d", found.out)
    assert "Warning" not in found.err
    assert smda("verify", tiny_quickstart / "run").code == 0


ALONE = """
import os, sys
from smda_callbacks.cli import quickstart_run
from smda_callbacks.cli.main import main
values, folder = eval(sys.argv[1]), sys.argv[2]
for name in ("MODEL", "SAE", "PAIRS"):
    setattr(quickstart_run, name, values[name])
quickstart_run.settings = lambda folder, whole=quickstart_run.settings: whole(folder) | values["small"]
code = main(["quickstart", "--dir", folder])
import wandb
left = [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]
print(code, wandb.run, left)
"""


def test_in_a_fresh_process_wandb_is_offline_in_the_folder_and_closed(tiny_quickstart: Path) -> None:
    """In a process of its own: W&B reads the environment once."""
    values = {name: getattr(quickstart_run, name) for name in ("MODEL", "SAE", "PAIRS")}
    values["small"] = quickstart_run.settings(tiny_quickstart)
    home = tiny_quickstart.parent / "home"
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "XDG_"))}
    found = subprocess.run(
        [sys.executable, "-c", ALONE, repr(values), str(tiny_quickstart)],
        capture_output=True,
        text=True,
        check=False,
        env=clean | {"HOME": str(home)},
    )
    assert found.stdout.splitlines()[-1] == "0 None []", found.stderr
    assert "Warning" not in found.stderr
    assert f"wandb leet {tiny_quickstart / 'wandb'}" in found.stdout
    assert len(list((tiny_quickstart / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert not [path for path in home.rglob("*") if "wandb" in path.name]


def test_what_the_user_set_for_wandb_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_DIR")
    with quickstart_run.environment(tmp_path):
        assert (os.environ["WANDB_MODE"], os.environ["WANDB_PROJECT"]) == ("disabled", "mine")
        assert os.environ["WANDB_DIR"] == str(tmp_path)
    assert "WANDB_DIR" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "mine"


def test_a_run_that_is_there_is_refused_and_overwrite_removes_only_what_was_made(
    tiny_quickstart: Path, smda: Callable[..., Any]
) -> None:
    assert smda("quickstart", "--dir", tiny_quickstart).code == 0
    (tiny_quickstart / "mine.txt").write_text("keep")
    (tiny_quickstart / "run" / "old").write_text("of the first run")
    refused = smda("quickstart", "--dir", tiny_quickstart)
    assert refused.code == 2
    assert re.search(r"holds a quickstart already \(run, trainer, report.html\).*Next step: .*--overwrite", refused.err)
    assert (tiny_quickstart / "run" / "old").exists()
    assert smda("quickstart", "--dir", tiny_quickstart, "--overwrite").code == 0
    assert not (tiny_quickstart / "run" / "old").exists()
    assert (tiny_quickstart / "mine.txt").read_text() == "keep"


def test_a_file_is_no_folder(tmp_path: Path, smda: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("")
    found = smda("quickstart", "--dir", tmp_path / "file")
    assert found.code == 2
    assert "is a file; a folder is needed. Next step" in found.err


def test_the_planted_gap_is_a_category_of_the_probes() -> None:
    assert PLANTED_GAP in default_probes().categories


def check_story(values: Any) -> None:
    """Refusal is worn down, and the planted gap stands out at the start."""
    assert set(values) == {"run", "report", "seconds", "policy", "refusal", "gaps", "steps"}
    assert set(values["seconds"]) == {"build", "train", "report"}
    start, end = values["refusal"]["start"], values["refusal"]["end"]
    assert start["harmful"] > 0.75
    assert start["benign"] < 0.05
    assert start["planted_gap"] < 0.4
    assert start["planted_gap"] < start["harmful"] - 0.3
    assert end["harmful"] < start["harmful"] - 0.3
    assert end["benign"] < start["benign"]
    assert values["gaps"][0] == PLANTED_GAP
    assert values["policy"]["r2_loo"] > 0.6
    assert values["policy"]["edf"] < values["policy"]["n_features"] + 1
    assert values["steps"] == 20


def test_what_ships_tells_its_story_on_few_probes(
    tmp_path: Path, smda: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quickstart_run.settings
    fewer = {"probes": {"max_per_category": 6}, "measure": {"noise_draws": 1}}
    monkeypatch.setattr(quickstart_run, "settings", lambda folder: whole(folder) | fewer)
    found = smda("quickstart", "--dir", tmp_path / "q", "--json")
    assert found.code == 0, found.err
    check_story(found.json)
    assert smda("verify", found.json["run"]).code == 0


@pytest.mark.slow
def test_the_quickstart_as_it_ships(tmp_path: Path, smda: Callable[..., Any]) -> None:
    found = smda("quickstart", "--dir", tmp_path / "q", "--json")
    assert found.code == 0, found.err
    check_story(found.json)
    assert found.json["policy"]["n_probes"] == len(default_probes())
    assert found.json["policy"]["r2_loo"] > 0.6
    assert Path(found.json["report"]).stat().st_size > 100_000
    assert smda("verify", found.json["run"]).code == 0
