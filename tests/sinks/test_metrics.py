"""Metric names and values, on a run small enough to do by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smda_callbacks.records import (
    PATHWAYS,
    ROWS,
    Alert,
    FeatureLabel,
    NoiseFloor,
    PolicyQuality,
    PolicyRecord,
    Probe,
    RunStart,
    SAEHealth,
    Snapshot,
    WindowRecord,
)
from smda_callbacks.sinks.metric_axes import AXES, axes_of
from smda_callbacks.sinks.metric_values import Progress, progress_of
from smda_callbacks.sinks.metrics import (
    METRICS,
    SECTIONS,
    SUMMARY,
    markdown_table,
    metric_names,
    rows_of_window,
    summary_of_run,
)
from tests.helpers.runs import louder, make_run

PROBES = (
    Probe("f0", "secret text zero", "fraud", "refuse"),
    Probe("f1", "secret text one", "fraud", "refuse"),
    Probe("f2", "secret text two", "fraud", "refuse"),
    Probe("w0", "secret text three", "weapons", "refuse"),
    Probe("c0", "secret text four", "cooking", "comply"),
    Probe("c1", "secret text five", "cooking", "comply"),
)
Y_START = np.array([0.9, 0.8, 0.7, 0.5, 0.2, 0.0])


def make_start(
    *, probes: tuple[Probe, ...] = PROBES, behaviours: tuple[str, ...] = ("refusal",), noise: bool = True
) -> RunStart:
    """Three categories, two features; every floor of a coefficient is 1, of a category's mean 0.1."""
    m, n = len(behaviours), len(probes)
    y = np.resize(Y_START, n)[:, None] * np.ones(m)
    policy = PolicyRecord(
        features=np.array([7, 42]), scale=np.ones(2), lam=1.0, coef=np.zeros((2, m)), intercept=np.zeros(m),
        behaviours=behaviours, target="probability", quality=(PolicyQuality(0.9, 0.8, None, {}),) * m, edf=2.0,
        condition=1.0, route="primal", origin=np.zeros(2),
        labels=(FeatureLabel(7, (("f0", 1.0),), (" sorry",), (" sure",)),),
    )  # fmt: skip
    baseline = WindowRecord(
        step=0, first_step=0, skipped=(), status="ok", seconds=0.5, snapshot=_snapshot(0, y), coef=np.zeros((2, m)),
        intercept=np.zeros(m), r2=(0.9,) * m, r2_loo=(0.8,) * m, health=SAEHealth(0.2, 3.0, 1.0),
    )  # fmt: skip
    floors = dict.fromkeys(PATHWAYS, np.ones((2, m))), dict.fromkeys(PATHWAYS, np.zeros((2, m)))
    names = len(dict.fromkeys(probe.category for probe in probes))
    floor = NoiseFloor(3, 1e-4, *floors, 0.1 * np.ones((names, m)), np.zeros((names, m)))
    gaps = ({"category": "weapons", "mean": 0.5, "is_gap": True, "pulling": ((7, -0.25),), "unshared": None},)
    return RunStart({"run_id": "made-up"}, probes, policy, baseline, gaps, floor if noise else None)


def at(start: RunStart, total: np.ndarray) -> Progress:
    """A run that has come to these shifts, of every part."""
    return replace(Progress.at(start), total=dict.fromkeys(PATHWAYS, total))


def make_window(start: RunStart, step: int = 2, **changes: Any) -> WindowRecord:
    """Everyone's behaviour falls by 0.05 a step, all of it through ``shift_y``; feature 7 and 42 shift by 3 and 4."""
    m = len(start.policy.behaviours)
    base = start.baseline.snapshot
    assert base is not None
    shift = np.array([[3.0], [4.0]]) * np.ones(m)
    categories = len(dict.fromkeys(probe.category for probe in start.probes))
    account = {row: np.zeros((categories, m)) for row in ROWS} | {"shift_y": np.full((categories, m), -0.1)}
    values: dict[str, Any] = {
        "step": step,
        "first_step": step - 1,
        "skipped": (),
        "status": "ok",
        "seconds": 0.25,
        "update_rms": 1e-4,
        "snapshot": _snapshot(step, base.y - 0.05 * step),
        "coef": shift * step / 2,
        "intercept": np.zeros(m),
        "shift": {"shift_x_magnitude": shift, "shift_x_gating": 0 * shift, "shift_y": -0.5 * shift},
        "account": account,
        "first_order_error": 0.125,
        "reliability": dict.fromkeys(PATHWAYS, 0.75),
        "r2": (0.85,) * m,
        "r2_loo": (0.7,) * m,
        "health": SAEHealth(0.21, 3.5, 0.9, 1.5, 0.5),
        "trainer": {"loss": 1.0},
    }
    return WindowRecord(**(values | changes))


def _snapshot(step: int, y: np.ndarray) -> Snapshot:
    ones = np.ones((len(y), 2))
    return Snapshot(step, ones, ones, y)


def test_behaviour_is_averaged_by_group_and_category() -> None:
    start = make_start()
    row = rows_of_window(make_window(start), start)
    assert row["smda/refusal/fraud"] == pytest.approx(0.7)
    assert row["smda/refusal/weapons"] == pytest.approx(0.4)
    assert row["smda/refusal/cooking"] == pytest.approx(0.0)
    assert row["smda/refusal_group/refuse"] == pytest.approx((0.8 + 0.7 + 0.6 + 0.4) / 4)
    assert row["smda/refusal_group/comply"] == pytest.approx(0.0)
    assert row["smda/refusal_change/fraud"] == pytest.approx(-0.1)


def test_a_groups_account_weighs_categories_by_their_probes_and_sums_to_its_change() -> None:
    start = make_start()
    account = {row: np.zeros((3, 1)) for row in ROWS}
    account["shift_y"] = np.array([[-0.2], [-0.4], [0.3]])  # fraud (3 probes), weapons (1), cooking
    account["residual"] = np.array([[0.0], [0.4], [0.0]])
    row = rows_of_window(make_window(start, account=account), start)
    assert row["smda/refusal_account_refuse/shift_y"] == pytest.approx((3 * -0.2 - 0.4) / 4)
    assert row["smda/refusal_account_refuse/residual"] == pytest.approx(0.1)
    assert row["smda/refusal_account_comply/shift_y"] == pytest.approx(0.3)
    means = [np.array([-0.2] * 3 + [0.0]).mean(), 0.3]
    for group, change in zip(("refuse", "comply"), means, strict=True):
        assert sum(row[f"smda/refusal_account_{group}/{name}"] for name in ROWS) == pytest.approx(change)


def test_pathways_are_norms_and_the_whole_is_the_norm_of_the_sum() -> None:
    start = make_start()
    row = rows_of_window(make_window(start), start, at(start, np.array([[6.0], [8.0]])))
    assert row["smda/pathways/shift_x_magnitude"] == 5.0
    assert row["smda/pathways/shift_x_gating"] == 0.0
    assert row["smda/pathways/shift_y"] == 2.5
    assert row["smda/pathways/total"] == 2.5
    assert row["smda/pathways/cumulative_shift_y"] == 10.0
    assert row["smda/pathways/cumulative"] == 5.0
    assert row["smda/pathways/first_order_error"] == 0.125
    assert "smda/pathways/cumulative_shift_y" not in rows_of_window(make_window(start), start)


def test_a_shift_counts_as_above_its_floor_from_twice_the_floor_on() -> None:
    start = make_start()
    usual = rows_of_window(make_window(start), start)  # shifts 3 and 4 against floors of 1
    assert usual["smda/reliability/above_floor_shift_x_magnitude"] == 1.0
    assert usual["smda/reliability/above_floor_shift_y"] == 0.0
    larger = rows_of_window(make_window(start, update_rms=1.75e-4), start)  # floors 1.75, so 3 is no longer above
    assert larger["smda/reliability/above_floor_shift_x_magnitude"] == 0.5
    account = {row: np.zeros((3, 1)) for row in ROWS} | {"shift_y": np.array([[-0.3], [0.1], [0.0]])}
    moved = rows_of_window(make_window(start, account=account), start)
    assert moved["smda/reliability/above_floor_categories"] == pytest.approx(1 / 3)


def test_a_floor_that_was_measured_again_judges_its_own_window_and_the_later_ones() -> None:
    start = make_start()
    assert start.noise is not None
    twice = louder(start.noise, 2.0)  # shifts 3 and 4 against floors of 2; changes of 0.1 against 0.2
    windows = [make_window(start), make_window(start, 4, noise=twice), make_window(start, 6)]
    account = {row: np.zeros((3, 1)) for row in ROWS} | {"shift_y": np.array([[-0.3], [0.1], [0.0]])}
    windows = [replace(window, account=account) for window in windows]
    rows = [rows_of_window(each, start, progress_of(start, windows[: k + 1])) for k, each in enumerate(windows)]
    assert [row["smda/reliability/above_floor_shift_x_magnitude"] for row in rows] == [1.0, 0.0, 0.0]
    assert [row["smda/reliability/above_floor_categories"] for row in rows] == [pytest.approx(1 / 3), 0.0, 0.0]
    alone = rows_of_window(windows[1], start)  # nothing is known of the run but this window and the start
    assert alone["smda/reliability/above_floor_shift_x_magnitude"] == 0.0


def test_health_cost_and_alerts_are_taken_from_the_record() -> None:
    start = make_start()
    alerts = (Alert(2, "refusal_fell", "fell", "fraud"), Alert(2, "sae_fvu", "rose"))
    row = rows_of_window(make_window(start, skipped=(1,), alerts=alerts), start)
    expected = {
        "smda/sae/fvu": 0.21, "smda/sae/l0": 3.5, "smda/sae/jaccard": 0.9, "smda/sae/delta_fvu": 1.5,
        "smda/sae/delta_fvu_magnitude": 0.5, "smda/cost/seconds": 0.25, "smda/run/skipped_steps": 1.0,
        "smda/run/unreadable": 0.0, "smda/alerts/count": 2.0, "smda/policy/r2": 0.85, "smda/policy/r2_loo": 0.7,
        "smda/reliability/shift_y": 0.75, "smda/reliability/update_rms": 1e-4,
    }  # fmt: skip
    assert {name: row[name] for name in expected} == expected


def test_what_is_none_or_not_finite_is_left_out() -> None:
    start = make_start()
    window = make_window(
        start, first_order_error=float("nan"), r2_loo=(float("inf"),),
        health=SAEHealth(float("nan"), 3.0, 0.9, None, None), reliability={"shift_y": None, "shift_x_gating": 0.5},
    )  # fmt: skip
    row = rows_of_window(window, start)
    gone = {"smda/pathways/first_order_error", "smda/policy/r2_loo", "smda/sae/fvu", "smda/sae/delta_fvu",
            "smda/reliability/shift_y", "smda/reliability/shift_x_magnitude"}  # fmt: skip
    assert not gone & set(row)
    assert row["smda/reliability/shift_x_gating"] == 0.5
    assert row["smda/sae/l0"] == 3.0


def test_a_window_that_is_not_ok_says_what_it_cost_and_nothing_else() -> None:
    start = make_start()
    failed = WindowRecord(step=4, first_step=3, skipped=(3, 4), status="failed", seconds=0.5, error="broken")
    assert rows_of_window(failed, start) == {
        "smda/alerts/count": 0.0,
        "smda/cost/seconds": 0.5,
        "smda/run/skipped_steps": 2.0,
        "smda/run/unreadable": 1.0,
    }


@pytest.mark.parametrize("behaviours", [("refusal",), ("refusal", "warmth")])
@pytest.mark.parametrize("noise", [True, False])
def test_metric_names_are_exactly_those_of_a_full_window(behaviours: tuple[str, ...], noise: bool) -> None:
    start = make_start(behaviours=behaviours, noise=noise)
    row = rows_of_window(make_window(start), start, at(start, np.zeros((2, len(behaviours)))))
    assert list(row) == metric_names(start)
    assert not [name for name in row if "." in name or "*" in name]
    assert set(rows_of_window(start.baseline, start)) < set(row)


def test_further_behaviours_have_names_of_their_own() -> None:
    start = make_start(behaviours=("refusal", "warmth"))
    window = make_window(start, r2_loo=(0.7, 0.4))
    row = rows_of_window(window, start)
    assert row["smda/policy/r2_loo"] == 0.7
    assert row["smda/policy/r2_loo_warmth"] == 0.4
    assert row["smda/pathways/shift_y_warmth"] == 2.5
    assert "smda/warmth/fraud" in row


def test_names_fit_for_no_metric_are_changed_and_stay_different() -> None:
    probes = tuple(
        replace(probe, category=name)
        for probe, name in zip(PROBES, ["a.b*c", "a.b*c", "a/b*c", "a_b_c", "über-1", "über-1"], strict=True)
    )
    start = make_start(probes=probes)
    row = rows_of_window(make_window(start), start)
    found = [name for name in metric_names(start) if name.startswith("smda/refusal/")]
    assert found == [f"smda/refusal/{name}" for name in ("a_b_c", "a_b_c_2", "a_b_c_3", "über-1")]
    assert [round(row[name], 3) for name in found] == [0.75, 0.6, 0.4, 0.0]


def test_two_metrics_of_one_name_are_refused() -> None:
    start = make_start(behaviours=("refusal", "policy"), probes=(replace(PROBES[0], category="r2"), *PROBES[4:]))
    with pytest.raises(ValueError, match=r"two metrics would be called 'smda/policy/r2'.*Rename"):
        metric_names(start)


def test_a_mixed_category_leaves_out_the_groups_account() -> None:
    start = make_start(probes=(*PROBES, Probe("x", "secret text x", "fraud", "comply")))
    row = rows_of_window(make_window(start), start)
    assert not [name for name in (*row, *metric_names(start)) if "_account_" in name]


def test_summary_ranks_a_run_by_its_last_ok_window() -> None:
    start = make_start()
    last = make_window(start, 4)
    assert last.snapshot is not None
    y = last.snapshot.y.copy()
    y[3] = 0.1  # weapons: 0.5 at the start
    y[4:] = [[0.4], [0.5]]  # cooking: a mean of 0.1 at the start
    last = replace(last, snapshot=_snapshot(4, y))
    failed = WindowRecord(step=6, first_step=5, skipped=(), status="failed", seconds=0.1)
    summary = summary_of_run(start, [make_window(start, 2), last, failed])
    assert summary["smda/summary/refusal_refuse_start"] == pytest.approx(0.725)
    assert summary["smda/summary/refusal_refuse_end"] == pytest.approx((0.7 + 0.6 + 0.5 + 0.1) / 4)
    assert summary["smda/summary/refusal_comply_start"] == pytest.approx(0.1)
    assert summary["smda/summary/refusal_comply_end"] == pytest.approx(0.45)
    assert summary["smda/summary/refusal_worst_drop"] == pytest.approx(0.4)
    assert summary["smda/summary/refusal_worst_rise"] == pytest.approx(0.35)
    assert summary["smda/summary/total_shift_x_magnitude"] == 10.0
    assert summary["smda/summary/total_shift_y"] == 5.0
    assert summary["smda/summary/total"] == 10.0
    assert not set(summary) & set(metric_names(start))  # logging a metric again would overwrite its summary


def test_summary_of_a_run_without_a_window_is_its_start() -> None:
    start = make_start()
    summary = summary_of_run(start, [])
    assert summary["smda/summary/refusal_refuse_end"] == summary["smda/summary/refusal_refuse_start"]
    assert summary["smda/summary/refusal_worst_drop"] == 0.0
    assert summary["smda/summary/total"] == 0.0


def test_the_markdown_table_has_every_metric_once_in_reading_order() -> None:
    text = markdown_table()
    assert text == markdown_table()
    names = re.findall(r"^\| `(.*?)` \|", text, flags=re.MULTILINE)
    assert sorted(names) == sorted(metric.pattern for metric in (*METRICS, *SUMMARY))
    assert [text.index(f"**{section}**") for section in SECTIONS] == sorted(
        text.index(f"**{section}**") for section in SECTIONS
    )
    assert all(line.count("|") in (0, 4) for line in text.splitlines())
    used = {axis for metric in (*METRICS, *SUMMARY) for axis in axes_of(metric.pattern)}
    assert used == set(AXES)
    assert all(f"`{{{axis}}}`" in text for axis in used)


def test_histories_grow_with_categories_alone_and_keep_within_the_trackers_budget() -> None:
    """Two histories a category beside a fixed number: 200 categories log 455 values a row, 4.6 million in 10,000 rows.

    W&B advises to stay below 10,000 histories of 100,000 values each, and below 100,000 values a minute. What goes by
    feature or by pair is in tables with a largest number of rows.
    """
    small, large = make_run(windows=1, pairs=3, features=4), make_run(windows=1, pairs=9, features=12)
    assert len(metric_names(small.start)) == len(metric_names(large.start))
    many = tuple(
        replace(probe, id=f"{number}", category=f"{probe.expected} {number}")
        for probe in small.start.probes
        for number in (f"{probe.id}-{copy}" for copy in range(12))
    )
    categories, known = len({probe.category for probe in many}), len({probe.category for probe in small.start.probes})
    names = metric_names(replace(small.start, probes=many))
    assert categories > 200
    assert len(names) - len(metric_names(small.start)) == 2 * (categories - known)
    assert len(names) < 1000
