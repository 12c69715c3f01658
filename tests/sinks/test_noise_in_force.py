"""Which floor holds at a window, and what floors add up to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from smda_callbacks.records import PATHWAYS, NoiseFloor, WindowRecord
from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import dumps, encode
from smda_callbacks.sinks.metric_values import Reading
from smda_callbacks.sinks.noise_in_force import MEANS, accumulated_floors, all_in_force, floors_at, in_force
from smda_callbacks.sinks.pair_table import pair_table
from smda_callbacks.sinks.pair_totals import effect_floors
from smda_callbacks.sinks.pair_values import flagged
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.equal import assert_same
from tests.helpers.runs import Run, louder, make_run, with_renewals, write_run


def noise_of(size: float) -> NoiseFloor:
    """Floors of ``size`` for an update of 1, without rounding."""
    some, zero = np.full((2, 1), size), np.zeros((2, 1))
    return NoiseFloor(1, 1.0, dict.fromkeys(PATHWAYS, some), dict.fromkeys(PATHWAYS, zero), 2 * some, zero)


def window(step: int, size: float, noise: NoiseFloor | None = None) -> WindowRecord:
    return WindowRecord(step, step, (), "ok", 0.0, update_rms=size, noise=noise)


def test_a_floor_holds_from_its_window_to_the_next() -> None:
    start, second, third = noise_of(1.0), noise_of(2.0), noise_of(3.0)
    windows = [window(1, 1.0), window(2, 1.0, second), window(3, 1.0), window(4, 1.0, third)]
    assert [id(each) for each in all_in_force(start, windows)] == [id(n) for n in (start, second, second, third)]
    assert in_force(None, windows[0]) is None
    assert all_in_force(None, windows[:1]) == [None]
    still = replace(second, update_rms=0.0)  # measured with updates that moved nothing: says nothing
    assert in_force(start, window(2, 1.0, still)) is start
    assert floors_at(still, 1.0) is None


def test_floors_of_windows_add_up_as_squares_each_with_its_own() -> None:
    windows = [window(1, 3.0), window(2, 2.0, noise_of(2.0)), window(3, 6.0)]  # floors of 3, 4 and 12
    found = accumulated_floors(noise_of(1.0), windows)
    assert found is not None
    for part in PATHWAYS:
        np.testing.assert_allclose(found[part][:, 0, 0], [0.0, 3.0, 5.0, 13.0])
    np.testing.assert_allclose(found[MEANS][:, 1, 0], [0.0, 6.0, 10.0, 26.0])
    assert accumulated_floors(None, windows) is None


@pytest.fixture(scope="module")
def run() -> Run:
    return with_renewals(make_run(windows=6, pairs=7, engine="exact", failed=(2,)), {1: 3.0, 4: 0.5})


def test_a_store_gives_renewed_floors_back_bit_for_bit(run: Run, tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", run))
    assert [each.noise is not None for each in store.windows()] == [False, True, False, False, True, False]
    for found, expected in zip(store.windows(), run.windows, strict=True):
        assert_same(found, expected)


def test_a_store_of_a_version_that_knew_no_renewals_opens(run: Run, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", run)
    for each in run.windows:
        value, arrays = encode(replace(each, noise=None))
        del value["noise"]
        files.write_atomic(files.step_file(path, each.step), files.save(arrays, {"record": dumps(value)}))
    for found, expected in zip(RunStore.open(path).windows(), run.windows, strict=True):
        assert_same(found, replace(expected, noise=None))


def test_tables_judge_every_window_by_the_floor_in_force(run: Run, tmp_path: Path) -> None:
    table = RunStore.open(write_run(tmp_path / "run", run)).table("features")
    assert run.start.noise is not None
    for each, times in zip(run.windows, (1.0, 3.0, None, 3.0, 0.5, 0.5), strict=True):
        rows = table.filter(pc.equal(table["step"], each.step))
        if times is None:  # failed: it has no row
            assert rows.num_rows == 0
            continue
        expected = floors_at(louder(run.start.noise, times), each.update_rms)
        assert expected is not None
        for part in PATHWAYS:
            np.testing.assert_allclose(rows[f"floor_{part}"].to_numpy(), expected[part].ravel(), rtol=1e-12)
            above = np.abs(each.shift[part]) > 2 * expected[part]
            assert rows[f"above_floor_{part}"].to_pylist() == above.ravel().tolist()


def test_effects_of_pairs_have_the_floors_in_force_at_their_windows(run: Run) -> None:
    """Against sums made by hand: a window of its own closes what went before, later parts add to the open one."""
    table = pair_table(run.start, run.windows)
    assert table is not None
    assert table.floor is not None
    opened: dict[int, np.ndarray] = {}
    closed: dict[int, np.ndarray] = {}
    for each, times in zip(run.windows, (1.0, 3.0, None, 3.0, 0.5, 0.5), strict=True):
        if times is None or each.pairs is None:
            continue
        assert run.start.noise is not None
        noise = louder(run.start.noise, times)
        own, later = effect_floors(each.pairs, noise), effect_floors(each.pairs, noise, later=True)
        assert own is not None
        assert later is not None
        for number, floor in zip(each.pairs.ids.tolist(), own, strict=True):
            closed[number] = closed.get(number, np.zeros_like(floor)) + opened.get(number, np.zeros_like(floor)) ** 2
            opened[number] = floor
        for number, floor in zip(each.pairs.later_ids.tolist(), later, strict=True):
            opened[number] = opened.get(number, np.zeros_like(floor)) + floor
    for pair, floor in zip(table.pairs, table.floor, strict=True):
        if pair.id in closed:
            np.testing.assert_allclose(floor, np.sqrt(closed[pair.id] + opened[pair.id] ** 2), rtol=1e-12)
    first = pair_table(run.start, [replace(each, noise=None) for each in run.windows])
    assert first is not None
    assert first.floor is not None
    assert not np.allclose(first.floor, table.floor, equal_nan=True)


def test_pairs_of_a_window_are_flagged_by_the_floor_in_force(run: Run) -> None:
    assert run.start.noise is not None
    few, many = (
        sum(flagged(Reading(each, run.start, noise=louder(run.start.noise, times))) or 0.0 for each in run.windows[:1])
        for times in (1e9, 1e-9)
    )
    assert few == 0.0
    assert many > 0.0
