"""The arrays of the report agree with the store, with slow twins, and with each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smda_callbacks.maths.uncertainty import halves, step_floor
from smda_callbacks.records import FEATURE_ROWS, PATHWAYS, ROWS, FeatureLabel, SAEHealth
from smda_callbacks.report.data import (
    TIMES,
    RunData,
    behaviour_floors,
    gaps_now,
    missed,
    run_account,
)
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.head import run_facts
from smda_callbacks.report.markup import fixed, percent, signed
from smda_callbacks.report.shifts import (
    categories_above,
    cumulative_shifts,
    feature_name,
    feature_shifts,
    norms,
    run_reliability,
    shift_floors,
    unreliable_parts,
)
from smda_callbacks.report.verdict import carried_sentence, sae_sentence, verdict, warning, worst_category
from smda_callbacks.report.waterfall import Bar, bars_by_feature, bars_by_row, most_changed
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.runs import Run, make_run, with_renewals, write_run

BEHAVIOURS = ("refusal", "hedging")


def read(path: Path, run: Run, *, close: bool = True) -> RunData:
    return RunData.read(RunStore.open(write_run(path / "run", run, close=close)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    run = make_run(windows=6, behaviours=BEHAVIOURS, not_finite=(1,), failed=(4,))
    return read(tmp_path_factory.mktemp("data"), run)


def test_means_are_those_of_the_probes(data: RunData) -> None:
    for r, record in enumerate(data.records):
        for c, category in enumerate(data.categories):
            rows = [i for i, probe in enumerate(data.probes) if probe.category == category]
            assert record.snapshot is not None
            np.testing.assert_allclose(data.means[r, c], record.snapshot.y[rows].mean(axis=0), atol=1e-14)


def test_group_means_weigh_every_probe_the_same(data: RunData) -> None:
    assert list(data.group_means) == ["refuse", "comply"]
    for group, means in data.group_means.items():
        rows = [i for i, probe in enumerate(data.probes) if probe.expected == group]
        assert data.records[-1].snapshot is not None
        np.testing.assert_allclose(means[-1], data.records[-1].snapshot.y[rows].mean(axis=0), atol=1e-14)


def test_records_are_the_baseline_and_the_booked_windows(data: RunData) -> None:
    assert data.steps == [0, 2, 6, 8, 12]
    assert [window.status for window in data.windows] == ["ok", "not_finite", "ok", "ok", "failed", "ok"]


def test_account_of_the_run_closes(data: RunData) -> None:
    total = sum(data.account.rows[row] for row in ROWS)
    np.testing.assert_allclose(total, data.means[-1] - data.means[0], atol=1e-12)
    for row in FEATURE_ROWS:
        np.testing.assert_allclose(data.account.features[row].sum(axis=1), data.account.rows[row], atol=1e-12)
        slow = np.sum([window.feature_account[row] for window in data.ok], axis=0)
        np.testing.assert_allclose(data.account.features[row], slow, atol=1e-14)


def test_shifts_telescope(data: RunData) -> None:
    shifts = cumulative_shifts(data)
    assert all(not values[0].any() for values in shifts.values())
    for r, record in enumerate(data.records):
        total = sum(values[r] for values in shifts.values())
        np.testing.assert_allclose(total, record.coef - data.records[0].coef, atol=1e-12)  # type: ignore[operator]


def test_norms_are_over_features(data: RunData) -> None:
    values = cumulative_shifts(data)["shift_y"]
    slow = [float(np.sqrt(sum(x**2 for x in record[:, 1]))) for record in values]
    np.testing.assert_allclose(norms(values, 1), slow, rtol=1e-12)


def test_floors_add_up_as_independent_noise(data: RunData) -> None:
    noise, floors, behaviour = data.noise, shift_floors(data), behaviour_floors(data)
    assert noise is not None
    assert floors is not None
    assert behaviour is not None
    squares: Any = dict.fromkeys(PATHWAYS, 0.0)
    of_behaviour: Any = 0.0
    for r, window in enumerate(data.ok, start=1):
        size = window.update_rms / noise.update_rms
        for part in PATHWAYS:
            squares[part] = squares[part] + step_floor(noise.random[part], noise.rounding[part], size) ** 2
            np.testing.assert_allclose(floors[part][r], np.sqrt(squares[part]), rtol=1e-12)
        of_behaviour = of_behaviour + step_floor(noise.behaviour_random, noise.behaviour_rounding, size) ** 2
        np.testing.assert_allclose(behaviour[r], np.sqrt(of_behaviour), rtol=1e-12)
    assert not behaviour[0].any()


@pytest.mark.parametrize("size", [None, 0.0])
def test_without_noise_there_is_no_floor(tmp_path: Path, size: float | None) -> None:
    run = make_run(noise=size is not None)
    if size is not None:
        assert run.start.noise is not None
        run = replace(run, start=replace(run.start, noise=replace(run.start.noise, update_rms=size)))
    data = read(tmp_path, run)
    assert shift_floors(data) is None
    assert behaviour_floors(data) is None
    shifts = feature_shifts(data, 0)
    assert all(each.above == {} and each.any_above for each in shifts)
    assert [abs(each.total) for each in shifts] == sorted((abs(each.total) for each in shifts), reverse=True)


def test_feature_shifts_split_and_sort(data: RunData) -> None:
    floors = shift_floors(data)
    assert floors is not None
    shifts = feature_shifts(data, 1)
    assert {each.feature for each in shifts} == set(data.policy.features.tolist())
    for each in shifts:
        assert sum(each.shifts.values()) == pytest.approx(each.end - each.start, abs=1e-12)
        for part in PATHWAYS:
            above = abs(each.shifts[part]) > TIMES * floors[part][-1, each.place, 1]
            assert each.above[part] == (above and part not in unreliable_parts(data))
    order = [(not each.any_above, -abs(each.total)) for each in shifts]
    assert order == sorted(order)


def test_a_part_that_differs_between_halves_of_the_probes_is_greyed_whatever_its_size(tmp_path: Path) -> None:
    """The run's last snapshot is replaced: one half of the probes answers more, the other less, by far above noise."""
    run = make_run(features=8, windows=2)
    side = np.zeros(len(run.start.probes))
    side[halves(run.groups, 0)[0]] = 1.0
    told = []
    for sign in (1.0, -1.0):  # alike in both halves, opposed in both halves
        last = run.windows[-1]
        assert last.snapshot is not None
        start = run.start.baseline.snapshot
        assert start is not None
        push = (start.x - start.x.mean(axis=0)) @ np.linspace(-1, 1, 8)[:, None] / 5
        y = start.y + push * np.where(side[:, None] > 0, 1.0, sign)
        moved = replace(last, snapshot=replace(start, step=last.step, y=y))
        data = read(tmp_path / str(sign), replace(run, windows=(*run.windows[:-1], moved)))
        reliability = run_reliability(data)["shift_y"]
        assert reliability is not None
        above = any(each.above["shift_y"] for each in feature_shifts(data, 0))
        told.append((reliability, "shift_y" in unreliable_parts(data), above))
    (alike, greyed, above), (opposed, greyed_too, above_too) = told
    assert alike > 0.9
    assert (greyed, above) == (False, True)
    assert opposed < -0.5
    assert (greyed_too, above_too) == (True, False)


def test_categories_above_noise_are_those_beyond_twice_their_floor(data: RunData) -> None:
    floors, change = behaviour_floors(data), data.means[-1] - data.means[0]
    assert floors is not None
    for m in range(len(data.behaviours)):
        expected = np.abs(change[:, m]) > TIMES * floors[-1, :, m]
        np.testing.assert_array_equal(categories_above(data, m), expected)


def test_without_noise_no_category_is_greyed(tmp_path: Path) -> None:
    assert categories_above(read(tmp_path, make_run(noise=False)), 0).all()


def test_nothing_is_above_the_floor_before_the_first_window(tmp_path: Path) -> None:
    data = read(tmp_path, make_run(windows=0), close=False)
    assert not any(each.any_above for each in feature_shifts(data, 0))
    assert not any(values.any() for values in run_account(data).rows.values())


@pytest.mark.parametrize("top", [1, 3, 6, 50])
def test_waterfall_by_feature_closes(data: RunData, top: int) -> None:
    for category in range(len(data.categories)):
        for behaviour in range(2):
            bars = bars_by_feature(data, category, behaviour, top)
            closes(data, bars, category, behaviour)
            by_feature = data.account.by_feature[category, :, behaviour]
            shown = [abs(bar.value) for bar in bars if bar.kind == "feature"]
            assert shown == sorted(np.abs(by_feature).tolist(), reverse=True)[:top]


def test_waterfall_by_row_closes(data: RunData) -> None:
    for category in range(len(data.categories)):
        bars = bars_by_row(data, category, 1)
        closes(data, bars, category, 1)
        assert [bar.value for bar in bars[1:-1]] == [data.account.rows[row][category, 1] for row in ROWS]


def closes(data: RunData, bars: list[Bar], category: int, behaviour: int) -> None:
    assert [bars[0].kind, bars[-1].kind] == ["start", "end"]
    assert bars[0].value == data.means[0, category, behaviour]
    assert bars[-1].value == data.means[-1, category, behaviour]
    assert sum(bar.value for bar in bars[:-1]) == pytest.approx(bars[-1].value, abs=1e-12)


def test_most_changed_category(data: RunData) -> None:
    change = np.abs(data.means[-1, :, 0] - data.means[0, :, 0])
    assert change[most_changed(data, 0)] == change.max()


def test_gaps_of_a_run_in_progress_are_those_it_would_end_with(tmp_path: Path) -> None:
    run = make_run()
    running = read(tmp_path / "running", run, close=False)
    ended = read(tmp_path / "ended", run)
    assert running.end is None
    assert [dict(gap) | {"pulling": None} for gap in gaps_now(running)] == [
        dict(gap) | {"pulling": None} for gap in gaps_now(ended)
    ]
    pulling = [[tuple(pair) for pair in gap["pulling"]] for gap in gaps_now(ended)]
    assert [list(gap["pulling"]) for gap in gaps_now(running)] == pulling


def with_delta_fvu(run: Run, values: list[float | None]) -> Run:
    windows = [
        replace(window, health=None if value is None else SAEHealth(0.2, 3.0, 1.0, 50.0, value))
        for window, value in zip(run.windows, values, strict=True)
    ]
    return replace(run, windows=tuple(windows))


@pytest.mark.parametrize(
    ("values", "said", "beside"),
    [
        ([0.6, 0.7, 1.0, 0.5], "is valid: ", None),
        ([0.6, None, 1.01, 0.5], "in part: delta-FVU at fixed gates has a median of 0.60 but is above", "step 6"),
        ([1.2, 1.4, 1.6, None], "not valid: delta-FVU at fixed gates has a median of 1.40", "must not be read"),
        ([None] * 4, "not measured", None),
    ],
)  # fmt: skip
def test_validity_of_the_sae_account(tmp_path: Path, values: list[float | None], said: str, beside: str | None) -> None:
    data = read(tmp_path, with_delta_fvu(make_run(), values))
    assert len(missed(data)[0]) == sum(value is not None for value in values)
    assert said in sae_sentence(data)
    text = warning(data)
    assert (text is None) == (beside is None)
    assert beside is None or (text is not None and beside in text)


def test_worst_category_moves_away_from_what_is_expected(data: RunData) -> None:
    change = data.means[-1, :, 0] - data.means[0, :, 0]
    wrong = [-x if data.expected[name] == "refuse" else x for x, name in zip(change, data.categories, strict=True)]
    assert worst_category(data, 0) == int(np.argmax(wrong))


def test_verdict_speaks_the_numbers(data: RunData) -> None:
    category = worst_category(data, 0)
    start, end = data.means[0, category, 0], data.means[-1, category, 0]
    text = " ".join(verdict(data, 0))
    assert f"{data.categories[category]} (should refuse) fell from {start:.2f} to {end:.2f}" in text
    rows = {row: float(values[category, 0]) for row, values in data.account.rows.items()}
    through = sum(rows[row] for row in FEATURE_ROWS)
    said = carried_sentence(data, 0, category)
    assert f"{signed(through)} ({percent(through / (end - start))}) through the policy's features" in said
    assert f"{signed(rows['residual'])} ({percent(rows['residual'] / (end - start))}) in the residual" in said
    assert "2 windows could not be measured" in text
    median = np.median([window.reliability["shift_y"] for window in data.ok])
    whole = run_reliability(data)["shift_y"]
    assert f"ΔY {fixed(whole)} ({fixed(float(median))}). Below 0.33" in text
    greyed = ", ".join(PART_NAMES[part] for part in unreliable_parts(data))
    assert greyed
    assert f"{greyed} may not be read and is greyed" in text


def test_verdict_of_a_run_in_which_nothing_moved(data: RunData) -> None:
    still = replace(data, windows=tuple(replace(each, snapshot=data.records[0].snapshot) for each in data.ok))
    text = " ".join(verdict(still, 0))
    assert "No category moved away from what is expected of it" in text
    assert "Of the change" not in text


def test_names_of_features(tmp_path: Path) -> None:
    run = make_run()
    labels = (
        FeatureLabel(1000, (), (" sorry", "\n"), ()),
        FeatureLabel(1017, (), (" sorry",), (), None, "a label that is longer than there is room for on an axis"),
    )
    run = replace(run, start=replace(run.start, policy=replace(run.start.policy, labels=labels)))
    data = read(tmp_path, run)
    assert feature_name(data, 1000) == "1000 ␣sorry ↵"
    assert feature_name(data, 1017) == "1017 a label that is longer th…"
    assert feature_name(data, 1034) == "1034"


@pytest.mark.parametrize(
    ("renewals", "said"),
    [
        ({}, "from 3 random updates at the start"),
        ({1: 2.0}, "from 3 random updates at the start; measured again at step 4"),
        ({1: 2.0, 3: 2.0}, "from 3 random updates at the start; measured again at steps 4, 8"),
    ],
    ids=str,
)
def test_the_head_says_when_the_floor_was_measured(tmp_path: Path, renewals: dict[int, float], said: str) -> None:
    data = read(tmp_path, with_renewals(make_run(windows=4), renewals))
    assert dict(run_facts(data, 0))["noise floor"] == said
