"""The log of a W&B run, read as W&B's own reader reads it; torn and foreign files; runs from a server, by a double."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from smda_callbacks.sinks.metrics import ALERTS, STEP
from smda_callbacks.sinks.run_source import from_server, from_wandb_folder
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_fetch import WandbFetchError, fetch_run
from smda_callbacks.sinks.wandb_log import WandbLogError, WandbRun, log_file, read_wandb_folder, rows_of
from tests.helpers.runs import make_run
from tests.helpers.wandb_runs import Logged, log_records, offline_wandb


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("wandb")
    with offline_wandb(root):
        yield root


@pytest.fixture(scope="module")
def logged(offline: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    run = make_run(windows=3, pairs=6)
    store = tmp_path_factory.mktemp("store") / "run"
    return log_records(store, run.start, run.windows, run.alerts, run.end, log_text="hash")


def test_it_reads_what_wandb_s_own_reader_reads(logged: Logged) -> None:
    found = read_wandb_folder(logged.folder)
    assert found.rows == rows_of(logged.rows)
    assert [step for step, _ in found.rows] == [0, 2, 4, 6]
    by_step = {row[STEP]: row for row in logged.rows if len(row) > 2}
    for step, row in found.rows:  # an alert outside a window has a row of its own, which holds for its count
        assert row == {name: row.get(name) if name == ALERTS else value for name, value in by_step[step].items()
                       if name != STEP}  # fmt: skip
    summary = logged.merged("summary")
    assert {name: summary[name] for name in found.summary} == found.summary
    assert "smda/summary/refusal_refuse_end" in found.summary
    assert found.manifest["run_id"] == logged.merged("config")["smda"]["run_id"] == "made-up"
    assert found.finished
    assert found.store_files.keys() == logged.contents("smda-store")


def test_a_torn_log_is_read_up_to_the_tear(logged: Logged, tmp_path: Path) -> None:
    whole = log_file(logged.folder)
    assert whole is not None
    content = whole.read_bytes()
    rows = []
    for part in (0.2, 0.5, 0.9):
        folder = tmp_path / str(part)
        folder.mkdir()
        (folder / whole.name).write_bytes(content[: int(part * len(content))])
        torn = read_wandb_folder(folder)
        assert not torn.finished
        assert read_wandb_folder(logged.folder).rows[: len(torn.rows)][:-1] == torn.rows[:-1]
        rows.append(len(torn.rows))
    assert rows == sorted(rows)
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1  # a bit flips: the record no longer has its checksum
    (tmp_path / whole.name).write_bytes(bytes(changed))
    assert not read_wandb_folder(tmp_path).finished


def test_the_later_of_two_rows_for_a_step_holds() -> None:
    history = [
        {STEP: 1, "smda/a": 1.0, "loss": 3.0},
        {STEP: 2, "smda/a": 2.0},
        {STEP: 1, "smda/a": 5.0, "smda/tables/x": {"path": "p"}},
        {"smda/a": 9.0},
        {STEP: 1, "smda/b": 7},
    ]
    assert rows_of(history) == ((1, {"smda/a": 5.0, "smda/b": 7.0}), (2, {"smda/a": 2.0}))


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WandbLogError, match=r"holds no log of a W&B run\. Next step"):
        read_wandb_folder(tmp_path)
    (tmp_path / "run-x.wandb").write_bytes(b"something else")
    with pytest.raises(WandbLogError, match="is no log of a W&B run, or one of another version"):
        read_wandb_folder(tmp_path)


# ---------------------------------------------------------------------------------------------- which store it means


def test_the_store_of_a_folder_is_found_by_its_id_and_not_by_its_place(logged: Logged, tmp_path: Path) -> None:
    folder = tmp_path / "wandb" / "offline-run-1"
    shutil.copytree(logged.folder, folder)
    shutil.copytree(logged.store, tmp_path / "b" / "run")
    shutil.copytree(logged.store, tmp_path / "a" / "run")  # first by name, but another run's
    manifest = tmp_path / "a" / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"made-up"', '"another"'))
    found = from_wandb_folder(folder, "given", tmp_path / "cache")
    assert found.store is not None
    assert found.store.path.resolve() == (tmp_path / "b" / "run").resolve()
    assert not found.shown
    assert not (tmp_path / "cache").exists()


def test_without_the_store_the_copy_that_was_logged_is_read(logged: Logged, tmp_path: Path) -> None:
    folder = tmp_path / "far" / "away" / "offline-run-1"
    shutil.copytree(logged.folder, folder)
    found = from_wandb_folder(folder, "given", tmp_path / "cache")
    assert found.store is not None
    assert found.store.path.is_relative_to(tmp_path / "cache")
    assert found.shown  # texts were sent as hashes
    original = RunStore.open(logged.store)
    assert [window.step for window in found.store.windows()] == [2, 4, 6]
    assert [(p.id, p.category, len(p.text)) for p in found.store.probes] == [
        (p.id, p.category, 16) for p in original.probes
    ]
    assert from_wandb_folder(folder, "given", tmp_path / "cache").store is not None  # the copy is there already


def test_a_copied_store_may_not_name_files_outside(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smda_callbacks.sinks import run_source

    evil = {"../../outside.txt": logged.store / "manifest.json"}
    run = WandbRun("x", {"run_id": "nowhere"}, (), {}, True, evil)
    monkeypatch.setattr(run_source, "read_wandb_folder", lambda folder: run)
    with pytest.raises(ValueError, match="names a file outside of itself"):
        from_wandb_folder(tmp_path / "w" / "x", "given", tmp_path / "cache")
    assert not (tmp_path / "outside.txt").exists()


def test_a_run_without_the_callback_is_refused(tmp_path: Path) -> None:
    run = wandb.init(dir=tmp_path)
    folder = Path(run.dir).parent
    run.log({"loss": 1.0})
    run.finish()
    wandb.teardown()
    with pytest.raises(ValueError, match=r"no configuration of smda-callbacks.*Next step"):
        from_wandb_folder(folder, "given", tmp_path / "cache")


# --------------------------------------------------------------------------------------------------------- a server


class Artifact:
    """What the public API of W&B gives of an artifact."""

    def __init__(self, kind: str, version: str, store: Path, digest: str = "ab/c=") -> None:
        self.type, self.version, self.digest, self.store = kind, version, digest, store
        self.downloads = 0

    def download(self, root: str) -> str:
        self.downloads += 1
        shutil.copytree(self.store, root)
        return root


class Api:
    """The public API of W&B with one run."""

    def __init__(self, run: Any) -> None:
        self.run_, self.asked = run, []  # type: ignore[var-annotated]

    def __call__(self, timeout: int) -> Api:
        return self

    def run(self, path: str) -> Any:
        self.asked.append(path)
        if self.run_ is None:
            raise wandb.errors.CommError("could not find run")
        return self.run_


class Run:
    id, state = "abc", "finished"

    def __init__(self, artifacts: list[Artifact], history: list[dict[str, Any]], config: dict[str, Any]) -> None:
        self.artifacts, self.history, self.config = artifacts, history, config
        self.summary = {"smda/summary/x": 1.5, "loss": 2.0, "_step": 3}

    def logged_artifacts(self) -> list[Artifact]:
        return self.artifacts

    def scan_history(self) -> Iterator[dict[str, Any]]:
        return iter(self.history)


def test_the_newest_store_of_a_run_is_downloaded_once(
    logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = Artifact("smda-store", "v10", logged.store)
    others = [Artifact("smda-store", "v9", tmp_path), Artifact("smda-policy", "v11", tmp_path)]
    api = Api(Run([others[0], newest, others[1]], [], {}))
    monkeypatch.setattr(wandb, "Api", api)
    for _ in range(2):
        found = from_server("me/project/abc", tmp_path / "cache")
        assert found.store is not None
        assert found.store.path.parent == tmp_path / "cache" / "me" / "project" / "abc"
        assert found.store.manifest["run_id"] == "made-up"
    assert (newest.downloads, others[0].downloads, others[1].downloads) == (1, 0, 0)
    assert api.asked == ["me/project/abc"] * 2


def test_a_download_that_broke_off_is_no_store(logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Artifact):
        def download(self, root: str) -> str:
            super().download(root)
            if self.downloads == 1:
                raise ConnectionError("gone")
            return root

    monkeypatch.setattr(wandb, "Api", Api(Run([Broken("smda-store", "v0", logged.store)], [], {})))
    with pytest.raises(WandbFetchError, match=r"cannot be read \(ConnectionError: gone\)"):
        fetch_run("me/project/abc", tmp_path)
    assert isinstance(fetch_run("me/project/abc", tmp_path), Path)


def test_without_a_store_the_history_is_taken_in_the_order_it_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [{"_step": 1, STEP: 2, "smda/a": 2.0}, {"_step": 0, STEP: 2, "smda/a": 1.0, "smda/b": 4.0}]
    config = {"smda": {"run_id": "r"}, "lr": 1}
    monkeypatch.setattr(wandb, "Api", Api(Run([], history, config)))
    found = from_server("me/project/abc", tmp_path)
    assert found.logged == WandbRun(
        "abc", {"run_id": "r"}, ((2, {"smda/a": 2.0, "smda/b": 4.0}),), {"smda/summary/x": 1.5}, True, {}
    )
    assert found.store is None
    assert "no run store was found" in found.notes[0]


def test_whatever_wandb_raises_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", Api(None))
    with pytest.raises(WandbFetchError, match=r"no folder me/p/x.*CommError.*Next step: check the name"):
        fetch_run("me/p/x", tmp_path)
