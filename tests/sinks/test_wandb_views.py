"""Saved views: what is in them, by the names that runs really log, and that W&B's package takes them."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from smda_callbacks.sinks import wandb_media
from smda_callbacks.sinks.metric_axes import names_of
from smda_callbacks.sinks.metrics import METRICS, SUMMARY, metric_names
from smda_callbacks.sinks.wandb_views import compared, sections_of
from smda_callbacks.sinks.wandb_views_build import Named, ViewError, report, specification, workspace
from tests.helpers.runs import make_run

TITLES = ["Verdict", "Refusal by category", "Policy and pathways", "Pairs", "SAE health", "Cost"]
PLAIN, PAIRS = make_run(windows=1).start, make_run(windows=2, pairs=4, behaviours=("refusal", "hedging")).start
ONE = [Named("me", "smda", "a"), Named("me", "smda", "b")]


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there


def test_sections_are_in_reading_order_and_those_of_pairs_only_where_there_are_some() -> None:
    assert [each.title for each in sections_of([PAIRS])] == TITLES
    assert [each.title for each in sections_of([PLAIN])] == [each for each in TITLES if each != "Pairs"]
    assert [each.title for each in sections_of([PLAIN, PAIRS])] == TITLES


@pytest.mark.parametrize("start", [PLAIN, PAIRS])
def test_every_name_is_one_that_the_run_logs(start: Any) -> None:
    summary = {name for metric in SUMMARY if metric.known(start) for name in names_of(metric.pattern, start)}
    history = {*metric_names(start), *wandb_media.history_keys(start)}
    for panel in (*(panel for each in sections_of([start]) for panel in each.panels), compared([start])):
        assert panel.names
        assert set(panel.names) <= (summary if panel.kind in ("bars", "parallel") else history), panel
        assert len(set(panel.names)) == len(panel.names)


def test_every_metric_of_the_history_is_somewhere() -> None:
    shown = {name for each in sections_of([PAIRS]) for panel in each.panels for name in panel.names}
    left = set(metric_names(PAIRS)) - shown
    patterns = {metric.pattern for metric in METRICS for name in names_of(metric.pattern, PAIRS) if name in left}
    assert patterns <= {
        "smda/pathways/total{further}", "smda/pathways/first_order_error", "smda/pairs/count",
        "smda/pairs/capture_error", "smda/pairs/update_error",
    }  # fmt: skip


def test_bars_name_columns_that_their_table_has() -> None:
    from smda_callbacks.sinks.metric_values import Progress
    from smda_callbacks.sinks.wandb_tables import gaps_table

    progress = Progress.at(PAIRS)
    tables = {medium.history_key: medium.build(PAIRS, progress, "none") for medium in wandb_media.media_of(PAIRS)}
    tables[wandb_media.GAPS] = gaps_table(PAIRS.gaps)
    bars = [panel for each in sections_of([PAIRS]) for panel in each.panels if panel.kind == "table bars"]
    assert len(bars) == 4
    for panel in bars:
        assert panel.columns is not None
        assert set(panel.columns) <= set(tables[panel.names[0]].columns), panel


def panels_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    grids = [block for block in spec["spec"]["blocks"] if block["type"] == "panel-grid"]
    return [panel for grid in grids for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]]


def test_a_report_holds_what_the_sections_say() -> None:
    sections = sections_of([PAIRS])
    spec = specification(report("title", ONE, sections, compared([PAIRS]), offline=True))
    blocks = spec["spec"]["blocks"]
    heads = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert heads == [*TITLES, "Settings"]
    panels = panels_of(spec)
    assert len(panels) == sum(len(each.panels) for each in sections) + 2
    drawn = [tuple(panel["config"]["metrics"]) for panel in panels if panel["viewType"] == "Run History Line Plot"]
    wanted = [panel.names for each in sections for panel in each.panels if panel.kind in ("lines", "stack")]
    assert drawn == wanted
    assert {panel["config"]["xAxis"] for panel in panels if panel["viewType"] == "Run History Line Plot"} == {
        "train/global_step"
    }
    (parallel,) = (panel["config"] for panel in panels if panel["viewType"] == "Parallel Coordinates Plot")
    assert [each["accessor"] for each in parallel["columns"]][:3] == [
        "config:smda_policy.value.lam",
        "config:smda.value.trainer.learning_rate",
        "config:smda.value.adapter.default.r",
    ]
    chosen = next(block for block in blocks if block["type"] == "panel-grid")["metadata"]["runSets"]
    (only,) = (each["value"] for each in chosen[0]["filters"]["filters"])
    assert only == ["a", "b"]


def test_panels_do_not_lie_on_each_other() -> None:
    spec = specification(report("title", ONE, sections_of([PAIRS]), compared([PAIRS]), offline=True))
    for block in spec["spec"]["blocks"]:
        if block["type"] == "panel-grid":
            places = [tuple(each["layout"].values()) for each in block["metadata"]["panelBankSectionConfig"]["panels"]]
            assert len(set(places)) == len(places)


def test_a_workspace_has_the_same_sections_over_the_optimizer_step() -> None:
    spec = specification(workspace("name", ONE, sections_of([PAIRS])))
    assert spec["spec"]["section"]["settings"]["xAxis"] == "train/global_step"
    banks = spec["spec"]["section"]["panelBankConfig"]["sections"]
    assert [each["name"] for each in banks][: len(TITLES)] == TITLES


def test_a_workspace_is_of_one_project() -> None:
    with pytest.raises(ViewError, match=r"one project, these are of me/smda, me/other"):
        workspace("name", [ONE[0], Named("me", "other", "c")], sections_of([PLAIN]))
    two = report("t", [ONE[0], Named("me", "other", "c")], sections_of([PLAIN]), compared([PLAIN]), offline=True)
    blocks = specification(two)["spec"]["blocks"]
    names = [each["name"] for each in next(b for b in blocks if b["type"] == "panel-grid")["metadata"]["runSets"]]
    assert names == ["smda", "other"]


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.expr", None)
    with pytest.raises(ViewError, match=r'pip install "smda-callbacks\[views\]"'):
        workspace("name", ONE, sections_of([PLAIN]))
