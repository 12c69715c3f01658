"""``smda rescore``: what it prints is what lies in the store; pairs and report show it beside the live effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smda_callbacks.cli.rescore import show
from smda_callbacks.config.load import ConfigError
from smda_callbacks.config.rescore import plan_of
from smda_callbacks.report.page import write_report
from smda_callbacks.sinks.rescored import read_rescored
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.runs import make_run, write_run

Smda = Callable[..., Any]


def test_a_run_without_steps_says_what_to_set(tmp_path: Path, smda: Smda) -> None:
    store = write_run(tmp_path / "run", make_run(windows=2, pairs=4))
    found = smda("rescore", store)
    assert found.code == 2
    assert "trajectory.keep: true" in found.err


def test_a_run_that_was_not_rescored_says_what_to_run(tmp_path: Path, smda: Smda) -> None:
    store = write_run(tmp_path / "run", make_run(windows=2, pairs=4))
    found = smda("pairs", store, "--quantity", "influence")
    assert found.code == 2
    assert "has not been rescored" in found.err
    assert "smda rescore" in found.err


def test_a_plan_made_in_a_script_is_refused(tmp_path: Path) -> None:
    run = make_run(windows=1, pairs=4)
    run.start.manifest["config"].clear()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="made in a script"):
        plan_of(RunStore.open(write_run(tmp_path / "run", run)))


def test_from_a_training_to_its_tables(tiny_quickstart: Path, smda: Smda, tmp_path: Path) -> None:
    assert smda("quickstart", "--dir", tiny_quickstart).code == 0
    run = tiny_quickstart / "run"
    found = smda("rescore", run, "--target", "refusal:harmful", "--target", "refusal:theft", "--top", 3, "--json")
    assert found.code == 0, found.err
    record, (first, second) = read_rescored(run), found.json["targets"]
    assert (first["target"], second["target"]) == record.targets == ("refusal:harmful", "refusal:theft")
    assert found.json["verified"]["exact"]
    order = np.argsort(-np.abs(record.influence[:, 1]))[:3]
    assert [row["pair"] for row in second["pairs"]] == record.ids[order].tolist()
    assert [row["influence"] for row in second["pairs"]] == record.influence[order, 1].tolist()

    # The change that is said to be measured is the one that the run itself booked.
    store = RunStore.open(run)
    start, end = (record.snapshot for record in (store.baseline, store.windows()[-1]))
    assert start is not None
    assert end is not None
    theft = store.groups == store.categories.index("theft")
    assert second["measured"] == pytest.approx(float((end.y - start.y)[theft].mean()), abs=1e-9)

    pairs = smda("pairs", run, "--by", "refusal:theft", "--quantity", "influence", "--top", 3, "--json").json
    assert [row["influence"] for row in pairs["rows"]] == [row["influence"] for row in second["pairs"]]
    assert [row["effect"] for row in pairs["rows"]] == [row["effect"] for row in second["pairs"]]
    table = smda("pairs", run, "--quantity", "influence").out
    assert "live effect" in table
    assert "by influence" in table
    refused = smda("pairs", run, "--by", "refusal:forgery", "--quantity", "influence")
    assert (refused.code, "refusal:harmful, refusal:theft" in refused.err) == (2, True)

    page = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Influence on the end of the run" in page
    assert 'data-ranking="influence"' in page
    assert "influence-1" in page
    assert "influence-2" not in page  # two targets, two figures


def test_the_summary_names_pairs_whose_text_or_account_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from smda_callbacks.cli.output import screen

    row = {"pair": 7, "rows": [], "columns": {}, "influence": -0.25, "effect": None, "exposures": 2, "text": None}
    target = {"target": "refusal:harmful", "measured": -0.5, "sum": 0.0, "agreement": None, "pairs": [row]}
    verified = {"steps": [1, 2], "exact": False, "worst": 2e-4, "worst_step": 2, "gradient_error": 0.0}
    show(
        screen(Any),
        {
            "run": "run", "steps": 4, "pairs": 9, "seconds": 3.0, "train_seconds": 1.5, "times_training": 2.0,
            "verified": verified, "targets": [target],
        },
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "pair 7" in out
    assert "−0.25000" in out
    assert "up to 2.0e-04 of a step off the record" in out
    assert "2.0 times the 1.5 s" in out
