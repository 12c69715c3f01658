"""What trackers show plainly is what the report shows plainly; what is left out is below noise there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smda_callbacks.records import PATHWAYS
from smda_callbacks.report import data as report_data
from smda_callbacks.report import shifts as report_shifts
from smda_callbacks.report.shifts import feature_shifts
from smda_callbacks.sinks.above_noise import categories_above, features_above
from smda_callbacks.sinks.metric_values import progress_of
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.wandb_pair_tables import effect_bars, effects_table
from smda_callbacks.sinks.wandb_tables import Table, categories_table, category_bars, feature_bars, features_table
from tests.helpers.runs import Run, make_run, write_run

BEHAVIOURS = ("refusal", "hedging")


def louder(run: Run, times: float) -> Run:
    """The same run with all noise floors so many times as large."""
    noise = run.start.noise
    assert noise is not None
    changed: dict[str, Any] = {
        name: {part: values * times for part, values in getattr(noise, name).items()} for name in ("random", "rounding")
    }
    for name in ("behaviour_random", "behaviour_rounding", "functional_random", "functional_rounding"):
        values = getattr(noise, name)
        changed[name] = None if values is None else values * times
    return replace(run, start=replace(run.start, noise=replace(noise, **changed)))


@pytest.fixture(params=[1.0, 8.0, 1e6])
def run(request: pytest.FixtureRequest) -> Run:
    """Some, few and none of the shifts are above noise."""
    return louder(make_run(windows=6, pairs=7, features=8, behaviours=BEHAVIOURS, failed=[2]), request.param)


def dicts(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.data]


def test_trackers_and_the_report_agree_on_what_is_above_noise(run: Run, tmp_path: Path) -> None:
    progress = progress_of(run.start, run.windows)
    data = report_data.RunData.read(RunStore.open(write_run(tmp_path / "run", run)))
    features, categories = features_above(run.start, progress), categories_above(run.start, progress)
    assert features is not None
    assert categories is not None
    for m in range(len(BEHAVIOURS)):
        np.testing.assert_array_equal(categories[m], report_shifts.categories_above(data, m))
        for each in feature_shifts(data, m):
            assert {part: bool(features[part][each.place, m]) for part in PATHWAYS} == dict(each.above)


def test_tables_mark_and_plots_leave_out_what_is_not_above_noise(run: Run) -> None:
    progress = progress_of(run.start, run.windows)
    features, categories = features_above(run.start, progress), categories_above(run.start, progress)
    assert features is not None
    assert categories is not None
    names = run.start.policy.features.astype(str).tolist()
    for row in dicts(features_table(run.start, progress)):
        place, m = names.index(row["feature"]), BEHAVIOURS.index(row["behaviour"])
        assert row["run_above_noise"] == ", ".join(part for part in PATHWAYS if features[part][place, m])
    marked = {
        (row["category"], row["behaviour"]): row["above_noise"] for row in dicts(categories_table(run.start, progress))
    }
    drawn = {row["category"] for row in dicts(category_bars(run.start, progress))}
    for (name, behaviour), above in marked.items():
        place = list(dict.fromkeys(probe.category for probe in run.start.probes)).index(name)
        assert above == categories[BEHAVIOURS.index(behaviour), place]
        if behaviour == BEHAVIOURS[0]:
            assert (name in drawn) == above
    bars = {row["feature"] for row in dicts(feature_bars(run.start, progress))}
    assert bars == {names[j] for j in np.flatnonzero(features[PATHWAYS[0]][:, 0])}
    effects = dicts(effects_table(run.start, progress, "none"))
    strong = {str(row["pair"]) for row in effects if row["above_noise"]}
    assert {row["pair"].split()[-1] for row in dicts(effect_bars(run.start, progress))} == strong


def test_nothing_is_shown_of_a_run_within_its_noise() -> None:
    quiet = louder(make_run(windows=4, pairs=5), 1e9)
    progress = progress_of(quiet.start, quiet.windows)
    assert effect_bars(quiet.start, progress).data == ()
    assert feature_bars(quiet.start, progress).data == ()
    assert category_bars(quiet.start, progress).data == ()


def test_without_a_floor_everything_is_shown_and_nothing_is_marked() -> None:
    run = make_run(windows=4, pairs=5, noise=False)
    progress = progress_of(run.start, run.windows)
    assert features_above(run.start, progress) is None
    assert {row["run_above_noise"] for row in dicts(features_table(run.start, progress))} == {None}
    assert {row["above_noise"] for row in dicts(categories_table(run.start, progress))} == {None}
    assert len(category_bars(run.start, progress).data) == 4
    assert len(feature_bars(run.start, progress).data) == 6


def test_before_the_first_window_nothing_is_above() -> None:
    run = make_run(windows=2)
    found = features_above(run.start, progress_of(run.start, []))
    assert found is not None
    assert not any(values.any() for values in found.values())
