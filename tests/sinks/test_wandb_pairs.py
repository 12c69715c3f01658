"""Pairs in W&B: real offline runs, read back with its own reader, and what of the pairs' texts is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from smda_callbacks.records import Pair
from smda_callbacks.sinks import files, wandb_media
from smda_callbacks.sinks.metrics import STEP, metric_names, rows_of_window, summary_of_run
from smda_callbacks.sinks.resume import set_aside
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_private import LogText, is_label, shown_files, shown_pair
from tests.helpers.runs import Run, make_run, write_run
from tests.helpers.wandb_runs import Logged, all_bytes, log_records, offline_wandb

KEYS = (wandb_media.PAIR_EFFECTS, wandb_media.PAIR_SHARES)
NOTE = "what the annotator said"  # a column that is no label
TEXT = b"Sorry, I can't"


@pytest.fixture(autouse=True)
def offline(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "wandb"
    root.mkdir()
    with offline_wandb(root):
        yield root


def pairs_run(**arguments: Any) -> Run:
    """A run with pairs, each of which has a remark too."""
    run = make_run(windows=4, pairs=6, **arguments)
    windows = tuple(
        replace(window, pairs_seen=tuple(with_note(pair) for pair in window.pairs_seen)) for window in run.windows
    )
    return replace(run, windows=windows)


def with_note(pair: Pair) -> Pair:
    return replace(pair, columns={**pair.columns, "note": f"{NOTE} {pair.id}"})


def log(tmp_path: Path, run: Run, **options: Any) -> Logged:
    return log_records(tmp_path / "run", run.start, run.windows, run.alerts, run.end, tables_every=2, **options)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parquets(root: Path) -> list[dict[str, Any]]:
    """The tables of pairs among all files below ``root``, by their content."""
    found = [path for path in root.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"PAR1"]
    tables = [pq.read_table(path) for path in found]
    return [table.to_pydict() for table in tables if {"text", "interference"} < set(table.column_names)]


@pytest.mark.parametrize("log_text", ["none", "hash", "full"])
def test_a_run_with_pairs_arrives_with_as_much_text_as_is_allowed(tmp_path: Path, offline: Path, log_text: Any) -> None:
    run = pairs_run()
    logged = log(tmp_path, run, log_text=log_text)
    assert logged.sink.failures == logged.sink.dropped == 0
    check_rows(logged, run)
    check_tables(logged, log_text)
    check_artifact(logged, run, offline, log_text)


def check_rows(logged: Logged, run: Run) -> None:
    sent = {row[STEP]: row for row in logged.rows if "smda/pairs/count" in row}
    assert sorted(sent) == [window.step for window in run.windows]
    for window in run.windows:
        expected = rows_of_window(window, run.start)
        assert expected.items() <= sent[window.step].items()
        assert "smda/refusal_ledger_refuse/unexplained" in expected
    expected = summary_of_run(run.start, run.windows)
    summary = logged.merged("summary")
    assert {name: summary[name] for name in expected} == expected
    defined = [each["metric"]["name"] for each in logged.records if each["type"] == "metric"]
    assert defined == [STEP, *metric_names(run.start), *wandb_media.history_keys(run.start)]
    assert {name.split(".")[0] for row in logged.history for name in row} == set(defined)


def check_tables(logged: Logged, log_text: str) -> None:
    noted = RunStore.open(logged.store).logged()
    for key in KEYS:
        sent = [each["row"][key] for each in noted if key in each.get("row", {})]
        steps = [each["step"] for each in noted if key in each.get("row", {})]
        assert steps == [0, 4, 8]
        assert [{"columns": each["columns"], "data": each["data"]} for each in logged.table(key)] == sent
        assert [len(each["data"]) for each in sent] == [0, 6, 6]
        row = dict(zip(sent[-1]["columns"], sent[-1]["data"][0], strict=True))
        assert row["column_kind"] in ("harmful_refused", "harmful_complied", "benign")
        note, number = f"{NOTE} {row['pair']}", row["pair"]
        text = next(pair.text for window in logged.windows for pair in window.pairs_seen if pair.id == number)
        assert text is not None
        shown = {"none": (None, None), "hash": (digest(note), digest(text)), "full": (note, text)}[log_text]
        assert (row.get("column_note"), row.get("text_sha256", row.get("text"))) == shown


def check_artifact(logged: Logged, run: Run, offline: Path, log_text: LogText) -> None:
    """``offline`` holds the run and, as copies, all files of the artifacts that replace or repeat those of the store.

    The store itself, which keeps all texts, lies elsewhere.
    """
    tables = {f"tables/{name}.parquet" for name in ("pairs", "pair_totals", "pair_steps", "ledger")}
    assert tables < logged.contents("smda-store")
    local, found = all_bytes(logged.store / files.STEPS), all_bytes(offline)
    for secret in (TEXT, NOTE.encode()):
        assert secret in local
        assert (secret in found) == (log_text == "full")
    (table,) = parquets(offline)
    pairs = {pair.id: pair for window in run.windows for pair in window.pairs_seen}
    shown = [shown_pair(pairs[each], log_text) for each in table["pair"]]
    assert table["text"] == [pair.text for pair in shown]
    assert table["column_note"] == [pair.columns.get("note") for pair in shown]
    assert table["column_kind"] == [pairs[each].columns["kind"] for each in table["pair"]]


@pytest.mark.parametrize("log_text", ["none", "hash"])
def test_what_is_sent_is_the_store_but_for_the_texts(tmp_path: Path, log_text: Any) -> None:
    run = pairs_run(behaviours=("refusal", "hedging"), not_finite=[1])
    path = write_run(tmp_path / "run", run)
    copy = tmp_path / "copy"
    for name, content in shown_files(path, run.start.probes, log_text):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert TEXT not in all_bytes(copy)
    for step in files.list_steps(path):
        sent, kept = (files.read_record(files.step_file(each, step), type(run.windows[0])) for each in (copy, path))
        expected = replace(kept, pairs_seen=tuple(shown_pair(pair, log_text) for pair in kept.pairs_seen))
        files.write_record(tmp_path / "expected", expected)
        assert (tmp_path / "expected").read_bytes() == files.step_file(copy, step).read_bytes()
        assert [pair.rows for pair in sent.pairs_seen] == [pair.rows for pair in kept.pairs_seen]
    others = {"manifest.json", "policy.safetensors", "tables/pair_totals.parquet", "steps/000000000.safetensors"}
    assert all((copy / name).read_bytes() == (path / name).read_bytes() for name in others)
    assert not (copy / files.PROBES).exists()


def test_records_that_a_resume_set_aside_lose_their_texts_too(tmp_path: Path) -> None:
    run = pairs_run()
    path = write_run(tmp_path / "run", run)
    set_aside(path, 0)
    sent = list(shown_files(path, run.start.probes, "none"))
    assert [name for name, _ in sent if name.startswith("steps/superseded-1-")]
    assert TEXT in all_bytes(path)
    contents = [content if isinstance(content, bytes) else content.read_bytes() for _, content in sent]
    assert not [content for content in contents if TEXT in content or NOTE.encode() in content]


@pytest.mark.parametrize("log_text", ["none", "full"])
def test_the_trajectory_is_never_sent(tmp_path: Path, log_text: LogText) -> None:
    run = pairs_run()
    path = write_run(tmp_path / "run", run)
    (path / "trajectory" / "tokenizer").mkdir(parents=True)
    for name in ("pairs.jsonl", "step-000000001.safetensors", "tokenizer/tokenizer.json"):
        (path / "trajectory" / name).write_bytes(b"training data")
    names = [name for name, _ in shown_files(path, run.start.probes, log_text)]
    assert "manifest.json" in names
    assert not [name for name in names if "trajectory" in name]


def test_a_damaged_record_keeps_the_whole_store_here(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", pairs_run())
    files.step_file(path, 4).write_bytes(b"not a record, but perhaps a text")
    with pytest.raises(Exception, match=r"[Hh]eader"):
        list(shown_files(path, (), "none"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("harmful_refused", True), ("3", True), ("a/b-1.0:c+d", True), ("", False), ("two words", False),
        ("x" * 41, False), ("wie?", False), ("Ünwort", False), ("line\n", False),
    ],
)  # fmt: skip
def test_labels_are_short_words(value: str, expected: bool) -> None:
    assert is_label(value) == expected
