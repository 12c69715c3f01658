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
from tests.helpers.runs import Run, louder, make_run, with_renewals, write_run

BEHAVIOURS = ("refusal", "hedging")


def with_noise(run: Run, times: float) -> Run:
    """The same run with all noise floors so many times as large."""
    assert run.start.noise is not None
    return replace(run, start=replace(run.start, noise=louder(run.start.noise, times)))


@pytest.fixture(params=[(1.0, {}), (8.0, {}), (1e6, {}), (1.0, {3: 20.0}), (8.0, {1: 0.1, 4: 3.0})], ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    """Some, few and none of the shifts are above noise, which may be measured again."""
    times, renewals = request.param
    made = make_run(windows=6, pairs=7, features=8, behaviours=BEHAVIOURS, failed=[2])
    return with_renewals(with_noise(made, times), renewals)


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
    quiet = with_noise(make_run(windows=4, pairs=5), 1e9)
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


def test_what_is_between_the_floors_of_two_halves_of_a_run_is_above_in_the_first_only(tmp_path: Path) -> None:
    """One change in the first window, none after it; the floor of the later windows is ten times as large."""
    quiet = make_run(windows=4, features=4)
    assert quiet.start.noise is not None
    rms = quiet.windows[0].update_rms
    zero = {part: np.zeros_like(values) for part, values in quiet.start.noise.rounding.items()}
    unit = {part: np.ones_like(values) for part, values in zero.items()}
    means = np.ones_like(quiet.start.noise.behaviour_random)
    noise = replace(
        quiet.start.noise, update_rms=rms, random=unit, rounding=zero, behaviour_random=0.01 * means,
        behaviour_rounding=0 * means,
    )  # fmt: skip
    sudden = quiet.windows[0]
    shift = {part: 3.0 * values for part, values in unit.items()}  # three times its floor, then less than once
    assert quiet.start.baseline.snapshot is not None
    moved = replace(quiet.start.baseline.snapshot, y=quiet.start.baseline.snapshot.y + 0.03)
    windows = [
        replace(window, update_rms=rms, snapshot=moved, shift=shift if window is sudden else zero)
        for window in quiet.windows
    ]
    windows[2] = replace(windows[2], noise=louder(noise, 10.0))
    run = replace(quiet, start=replace(quiet.start, noise=noise), windows=tuple(windows))
    along = [progress_of(run.start, run.windows[:count]) for count in range(1, 5)]
    floors = [progress.floors for progress in along]
    expected = np.sqrt([1, 2, 2 + 100, 2 + 200])
    for progress, floor in zip(floors, expected, strict=True):
        assert progress is not None
        np.testing.assert_allclose(progress["shift_y"], floor, rtol=1e-12)
        np.testing.assert_allclose(progress["means"], 0.01 * floor, rtol=1e-12)
    above = [categories_above(run.start, progress) for progress in along]
    assert [each is not None and bool(each.all()) for each in above] == [True, True, False, False]
    assert [each is not None and bool(each.any()) for each in above] == [True, True, False, False]
    for count, loud in zip(range(1, 5), (True, True, False, False), strict=True):
        part = replace(run, windows=run.windows[:count])
        data = report_data.RunData.read(RunStore.open(write_run(tmp_path / str(count), part, close=False)))
        assert set(report_shifts.categories_above(data, 0).tolist()) == {loud}
        assert data.renewed == ([] if count < 3 else [run.windows[2].step])
        strong = report_shifts.shift_floors(data)
        assert strong is not None
        assert bool(
            (np.abs(report_shifts.cumulative_shifts(data)["shift_y"][-1]) > 2 * strong["shift_y"][-1]).all()
        ) == (count == 1 or count == 2)


def test_a_window_is_judged_by_the_floor_in_force_at_it() -> None:
    run = with_renewals(make_run(windows=4, features=8), {2: 1e6})
    strong = []
    for count in range(1, 5):
        rows = dicts(features_table(run.start, progress_of(run.start, run.windows[:count])))
        strong.append(any(row["window_above_floor"] for row in rows))
    assert strong == [True, True, False, False]
