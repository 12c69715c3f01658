"""``smda audit``: what it prints and stores, going on after a stop at any moment, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from smda_callbacks.records import WindowRecord
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.equal import assert_same
from tests.helpers.runs import make_run, write_run

ROOT = Path(__file__).parents[2]
KINDS = ("harmful_refused", "harmful_complied", "benign")
ROWS = [
    {"prompt": f"Help me with {word}.", "completion": f"Sure, {word}.", "kind": KINDS[k % 3], "category": word}
    for k, word in enumerate(("tea", "rain", "soup", "trains", "a car"))
]
AUDIT = {"learning_rate": 5e-3, "rank": 2, "alpha": 4, "max_length": 64}


class Killed(BaseException):
    """Stands for kill -9: nobody catches it, and nothing is written any more."""


@pytest.fixture
def inputs(shelf: Any, tmp_path: Path) -> Path:
    """A folder with a file of pairs and a configuration with an audit section."""
    write_pairs(tmp_path / "pairs.jsonl", ROWS)
    write_config(shelf, tmp_path / "config.yaml")
    return tmp_path


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_config(shelf: Any, path: Path, **audit: Any) -> None:
    values = yaml.safe_load(Path(shelf.config).read_text())
    values["model"]["id"], values["sae"]["source"] = shelf.model, shelf.sae
    values["probes"]["sources"] = [{"source": shelf.probes}]
    values["measure"] = {"noise_draws": 1, "on_error": "raise"}
    path.write_text(yaml.safe_dump({**values, "audit": {**AUDIT, **audit}}), encoding="utf-8")


def command(inputs: Path, out: str = "store") -> list[object]:
    return ["audit", "--config", inputs / "config.yaml", "--pairs", inputs / "pairs.jsonl", "--out", inputs / out]


def without_times(window: WindowRecord) -> WindowRecord:
    book = None if window.pairs is None else replace(window.pairs, seconds=0.0)
    return replace(window, seconds=0.0, pairs=book)


def assert_same_store(found: Path, expected: Path) -> None:
    """The same to the last bit, but for times and the number of the run."""
    one, other = RunStore.open(found), RunStore.open(expected)
    manifests = [{**store.manifest, "run_id": "", "created": ""} for store in (one, other)]
    assert manifests[0] == manifests[1]
    assert_same(replace(one.start, manifest={}), replace(other.start, manifest={}))
    assert_same([without_times(each) for each in one.windows()], [without_times(each) for each in other.windows()])
    ends = [replace(store.end, seconds=0.0, train_seconds=0.0) for store in (one, other) if store.end]
    assert_same(*ends)
    assert [each.status for each in ends] == ["finished"] * 2
    names = [sorted(path.name for path in folder.rglob("*") if path.is_file()) for folder in (found, expected)]
    assert names[0] == names[1]


# What it leaves -------------------------------------------------------------------------------------------------------


def test_pairs_are_audited_shown_and_stored(shelf: Any, inputs: Path, smda: Callable[..., Any]) -> None:
    write_config(shelf, inputs / "config.yaml", repeats=2)
    found = smda(*command(inputs), "--json")
    assert found.code == 0, found.err
    facts, store = found.json, RunStore.open(inputs / "store")
    windows = store.windows()
    assert [window.step for window in windows] == list(range(1, 11))
    assert store.manifest["kind"] == "audit"
    expected = {"pairs": 5, "rows": 5, "repeats": 2, "steps": 1, "learning_rate": 5e-3, "optimizer": "adamw_torch"}
    assert expected.items() <= store.manifest["audit"].items()
    assert facts["windows"] == {"ok": 10, "not_finite": 0, "failed": 0}
    assert facts["functional"] == "refusal:harmful"
    effects = np.array([window.pairs.effect[0, 0] for window in windows if window.pairs]).reshape(5, 2)
    assert [row["pair"] for row in facts["top"]] == np.argsort(-np.abs(effects.mean(axis=1))).tolist()
    for row in facts["top"]:
        own = effects[row["pair"]]
        assert row["effect"] == pytest.approx(own.mean(), rel=1e-9)
        assert row["spread"] == pytest.approx(own.std(ddof=1), rel=1e-6)
        assert row["kind"] == KINDS[row["pair"] % 3]
    for k, group in enumerate(facts["groups"]):
        mine = effects[k::3]
        assert (group["group"], group["pairs"]) == (KINDS[k], len(mine))
        assert group["mean"] == pytest.approx(mine.mean(), rel=1e-9)
        assert group["spread"] == pytest.approx(mine.mean(axis=0).std(ddof=1), rel=1e-6)
        error = mine.mean(axis=1).std(ddof=1) / len(mine) ** 0.5 if len(mine) > 1 else None
        assert group["error"] == (error if error is None else pytest.approx(error, rel=1e-6))
    assert all(store.table(name).num_rows for name in ("steps", "features"))


def test_people_see_pairs_groups_and_what_is_next(inputs: Path, smda: Callable[..., Any]) -> None:
    found = smda(*command(inputs))
    assert found.code == 0, found.err
    assert "refusal:harmful: the 5 of 5 pairs that move it most" in found.out
    for text in ("Help me with tea. → Sure, tea.", *KINDS, "s per pair and repeat"):
        assert text in found.out
    printed = " ".join(found.out.split())
    for next_command in ("pairs", "report", "verify"):
        assert f"smda {next_command} {inputs / 'store'}" in printed.replace("- ", "-") or next_command in printed
    assert re.search(r"SMDA audit: 100%.*5/5 \[.*pair", found.err)


def test_other_commands_read_the_store(inputs: Path, smda: Callable[..., Any]) -> None:
    smda(*command(inputs))
    ranked = smda("pairs", inputs / "store", "--by", "refusal:harmful", "--top", 2, "--json")
    assert ranked.code == 0, ranked.err
    assert len(ranked.json["rows"]) == 2
    assert ranked.json["kind"] == "audit"
    verified = smda("verify", inputs / "store", "--json")
    assert verified.code == 0, verified.out + verified.err


def test_without_out_a_free_folder_is_taken(inputs: Path, smda: Callable[..., Any], monkeypatch: Any) -> None:
    monkeypatch.chdir(inputs)
    (inputs / "smda-audit").mkdir()
    (inputs / "smda-audit" / "notes.txt").write_text("mine")
    found = smda(*command(inputs)[:-2], "--json")
    assert found.code == 0, found.err
    assert found.json["run"] == "smda-audit-2"
    assert len(RunStore.open(inputs / "smda-audit-2").windows()) == 5


def test_texts_stay_out_where_the_configuration_says_so(shelf: Any, inputs: Path, smda: Callable[..., Any]) -> None:
    values = yaml.safe_load((inputs / "config.yaml").read_text())
    (inputs / "config.yaml").write_text(yaml.safe_dump({**values, "attribution": {"text": False}}))
    found = smda(*command(inputs), "--json")
    assert found.code == 0, found.err
    store = RunStore.open(inputs / "store")
    assert [pair.text for window in store.windows() for pair in window.pairs_seen] == [None] * 5
    assert "Help me with" not in found.out
    assert not any(b"Help me with" in path.read_bytes() for path in (inputs / "store" / "steps").iterdir())


# Going on -------------------------------------------------------------------------------------------------------------


def stop_at(monkeypatch: Any, step: int, error: type[BaseException], *, half: bool = False) -> None:
    """The writer dies before, or in the middle of, writing window ``step``; a killed one closes nothing.

    Step 6 is after the last window: everything is there but the end.
    """
    write, close = StoreSink.write, StoreSink.close

    def stopping(sink: StoreSink, window: WindowRecord) -> None:
        if window.step == step:
            if half:
                (sink.path / "steps" / f"{step:09d}.safetensors.part").write_bytes(b"half")
            raise error
        write(sink, window)

    monkeypatch.setattr(StoreSink, "write", stopping)
    if error is Killed:
        monkeypatch.setattr(StoreSink, "close", lambda *_: None)
    else:
        monkeypatch.setattr(StoreSink, "close", close)


@pytest.fixture
def whole(inputs: Path, smda: Callable[..., Any]) -> Path:
    """An audit that nothing stopped."""
    assert smda(*command(inputs, "whole")).code == 0
    return inputs / "whole"


@pytest.mark.parametrize("step", [1, 2, 5, 6])
@pytest.mark.parametrize("half", [False, True], ids=["between", "in the middle"])
def test_a_killed_audit_goes_on(
    step: int, half: bool, inputs: Path, whole: Path, smda: Callable[..., Any], monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed) if step < 6 else nullcontext():
        stop_at(patch, step, Killed, half=half)
        smda(*command(inputs))
    assert [window.step for window in RunStore.open(inputs / "store").windows()] == list(range(1, step))
    found = smda(*command(inputs), "--json")
    assert found.code == 0, found.err
    assert found.json["resumed_after"] == step - 1
    assert_same_store(inputs / "store", whole)


def test_killed_for_good(inputs: Path, whole: Path, smda: Callable[..., Any]) -> None:
    """A process of its own, and SIGKILL as soon as the second window is there."""
    words = [sys.executable, "-m", "smda_callbacks", *map(str, command(inputs))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        second, until = inputs / "store" / "steps" / "000000002.safetensors", time.monotonic() + 120
        while not second.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert second.exists()
    found = smda(*command(inputs), "--json")
    assert found.code == 0, found.err
    assert found.json["resumed_after"] >= 2
    assert_same_store(inputs / "store", whole)


@pytest.mark.parametrize("last", ["probes.jsonl", "policy.safetensors", "gaps.json", "000000000.safetensors"])
def test_killed_before_the_first_pair(last: str, inputs: Path, whole: Path, smda: Callable[..., Any]) -> None:
    """The files before training are written one by one, the manifest last."""
    smda(*command(inputs))
    store = inputs / "store"
    order = ["probes.jsonl", "policy.safetensors", "policy.json", "noise.safetensors", "gaps.json"]
    kept = {*order, "000000000.safetensors"} if last not in order else set(order[: order.index(last)])
    for path in [path for path in store.rglob("*") if path.is_file() and path.name not in kept]:
        path.unlink()
    (store / "tables").rmdir()
    (store / f"{last}.part").write_bytes(b"half") if last in order else None
    found = smda(*command(inputs))
    assert found.code == 0, found.err
    assert_same_store(store, whole)


def test_ctrl_c_says_how_to_go_on(inputs: Path, whole: Path, smda: Callable[..., Any], monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt)
        found = smda(*command(inputs))
    assert found.code == 130
    again = " ".join(map(str, ["smda", *command(inputs)]))
    assert again.replace(" ", "") in "".join(found.out.split())
    store = RunStore.open(inputs / "store")
    assert store.end is not None
    assert (store.end.status, store.end.step) == ("interrupted", 2)
    assert smda(*command(inputs)).code == 0
    (aside,) = (inputs / "store").glob("superseded-*")  # how the first part ended
    aside.unlink()
    assert_same_store(inputs / "store", whole)


def test_a_finished_audit_is_shown_again(inputs: Path, whole: Path, smda: Callable[..., Any]) -> None:
    before = [without_times(each) for each in RunStore.open(whole).windows()]
    found = smda(*command(inputs, "whole"), "--json")
    assert found.code == 0, found.err
    assert (found.json["resumed_after"], found.json["windows"]["ok"]) == (5, 5)
    assert_same([without_times(each) for each in RunStore.open(whole).windows()], before)
    assert not list(whole.glob("superseded-*"))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_another_configuration_is_not_gone_on_with(
    shelf: Any, inputs: Path, whole: Path, smda: Callable[..., Any]
) -> None:
    write_config(shelf, inputs / "config.yaml", learning_rate=1e-2)
    found = smda(*command(inputs, "whole"))
    assert found.code == 2
    assert "the store is of another audit: audit.learning_rate 0.005 there and 0.01 here. Next step" in found.err


@pytest.mark.parametrize("change", ["pairs", "model"])
def test_other_pairs_or_another_model_are_not_gone_on_with(
    change: str, inputs: Path, whole: Path, smda: Callable[..., Any], monkeypatch: Any
) -> None:
    if change == "pairs":
        write_pairs(inputs / "pairs.jsonl", [*ROWS[:-1], {**ROWS[-1], "completion": "Sure, another."}])
    else:
        from smda_callbacks.cli import audit

        real = audit.load_model

        def changed(config: Any) -> Any:
            model, tokenizer = real(config)
            model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
            return model, tokenizer

        monkeypatch.setattr(audit, "load_model", changed)
    found = smda(*command(inputs, "whole"))
    assert found.code == 2
    wrong = {"pairs": "audit.pairs_hash", "model": "model.hash"}[change]
    assert re.search(rf"the store is of another audit: {wrong} '\w+' there and '\w+' here\. Next step", found.err)


def test_a_model_that_reads_differently_is_not_gone_on_with(
    inputs: Path, smda: Callable[..., Any], monkeypatch: Any
) -> None:
    """A weight beyond what its hash looks at."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 3, Killed)
        smda(*command(inputs))
    from smda_callbacks.cli import audit

    real = audit.load_model

    def changed(config: Any) -> Any:
        model, tokenizer = real(config)
        model.lm_head.weight.data[300] += 0.1
        return model, tokenizer

    monkeypatch.setattr(audit, "load_model", changed)
    found = smda(*command(inputs))
    assert found.code == 2
    assert re.search(r"reads differently here than when the audit began \(behaviour by up to [\d.e-]+\)", found.err)


def test_a_training_run_is_not_gone_on_with(inputs: Path, smda: Callable[..., Any]) -> None:
    write_run(inputs / "run", make_run())
    found = smda(*command(inputs, "run"))
    assert found.code == 2
    assert "is the store of a training run, not of an audit. Next step: choose another folder" in found.err


def test_a_folder_with_something_else_in_it_is_left_alone(inputs: Path, smda: Callable[..., Any]) -> None:
    (inputs / "store").mkdir()
    (inputs / "store" / "gaps.json").write_text("[]")
    (inputs / "store" / "notes.txt").write_text("mine")
    found = smda(*command(inputs))
    assert found.code == 2
    assert "which is no run store" in found.err
    assert sorted(path.name for path in (inputs / "store").iterdir()) == ["gaps.json", "notes.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "a", "answer": "b"}\n',
            "row 0 has the columns question, answer. Allowed: prompt and completion",
        ),
        ("not json\n", "line 1 of pairs.jsonl is no valid JSON"),
        ("", "pairs.jsonl holds no pair"),
    ],
)
def test_bad_pairs_are_2(text: str, message: str, inputs: Path, smda: Callable[..., Any]) -> None:
    (inputs / "pairs.jsonl").write_text(text)
    found = smda(*command(inputs))
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
    assert not (inputs / "store").exists()


def test_a_configuration_without_a_model_is_refused(inputs: Path, smda: Callable[..., Any]) -> None:
    (inputs / "config.yaml").write_text("sae: {source: x}\n")
    found = smda(*command(inputs))
    assert found.code == 2
    assert "names no model. Next step: set model.id" in found.err
