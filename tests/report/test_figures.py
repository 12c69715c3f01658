"""The figures show the arrays that they claim to show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.utils import PlotlyJSONEncoder

from smda_callbacks.records import PATHWAYS, SAEHealth
from smda_callbacks.report import figures, figures_behaviour, figures_health, figures_policy
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors
from smda_callbacks.report.shifts import categories_above, cumulative_shifts, feature_shifts, norms, shift_floors
from smda_callbacks.report.waterfall import Bar, bars_by_feature, bars_by_row
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.runs import make_run, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    run = make_run(windows=6, behaviours=("refusal", "hedging"), failed=(2,))
    bad = SAEHealth(float("nan"), 3.0, 1.0, float("inf"), 0.0)
    windows = [replace(run.windows[0], health=None), replace(run.windows[1], health=bad), *run.windows[2:]]
    run = replace(run, windows=tuple(windows))
    return RunData.read(RunStore.open(write_run(tmp_path_factory.mktemp("figures") / "run", run)))


def trace(figure: go.Figure, name: str) -> Any:
    return next(each for each in figure.data if each.name == name)


def test_lines_are_the_means(data: RunData) -> None:
    found = figures_behaviour.category_lines(data, 1)
    for c, category in enumerate(data.categories):
        line = trace(found, category)
        assert list(line.x) == data.steps
        np.testing.assert_array_equal(line.y, data.means[:, c, 1])
        assert line.line.dash == ("solid" if data.expected[category] == "refuse" else "dash")
    for group in ("refuse", "comply"):
        np.testing.assert_array_equal(trace(found, f"<b>mean, should {group}</b>").y, data.group_means[group][:, 1])


def test_windows_that_were_not_booked_are_marked(data: RunData) -> None:
    found = figures_behaviour.category_lines(data, 0)
    assert [shape.x0 for shape in found.layout.shapes] == [6]


def test_arrows_lead_from_start_to_end_and_bands_are_the_floor(data: RunData) -> None:
    found = figures_behaviour.change_arrows(data, 0)
    floors = behaviour_floors(data)
    assert floors is not None
    names = [figures_behaviour.category_title(data, c) for c in range(len(data.categories))]
    for record, name in ((0, "start"), (-1, "end")):
        points = dict(zip(trace(found, name).y, trace(found, name).x, strict=True))
        assert points == dict(zip(names, data.means[record, :, 0].tolist(), strict=True))
    band = next(each for each in found.data if each.type == "bar")
    for name, base, width in zip(band.y, band.base, band.x, strict=True):
        c = names.index(name)
        assert width == pytest.approx(2 * TIMES * floors[-1, c, 0])
        assert base + width / 2 == pytest.approx(data.means[0, c, 0])


def test_what_is_not_above_noise_is_grey_in_every_figure_of_the_behaviour(tmp_path: Path) -> None:
    """The floor is raised so that half of the categories stay below it."""
    run = make_run(windows=4, noise=True)
    plain = RunData.read(RunStore.open(write_run(tmp_path / "plain", run)))
    change = np.abs(plain.means[-1] - plain.means[0])[:, 0]
    noise, weak = run.start.noise, np.argsort(change)[: len(change) // 2]
    assert noise is not None
    random = np.where(np.isin(np.arange(len(change)), weak)[:, None], 1.0, 1e-9)
    raised = replace(noise, behaviour_random=random, behaviour_rounding=np.zeros_like(random))
    data = RunData.read(
        RunStore.open(write_run(tmp_path / "run", replace(run, start=replace(run.start, noise=raised))))
    )
    strong = categories_above(data, 0)
    assert not strong[weak].any()
    assert strong.sum() == len(change) - len(weak)

    arrows = figures_behaviour.change_arrows(data, 0)
    colours = dict(zip(trace(arrows, "end").y, trace(arrows, "end").marker.color, strict=True))
    lines = {name: set(trace(arrows, name).y or ()) - {None} for name in ("rise", "fall", "not above noise")}
    drawn = figures_behaviour.category_lines(data, 0)
    highlights = {colour for colour, _ in figures.HIGHLIGHTS}
    for c, name in enumerate(data.categories):
        title = figures_behaviour.category_title(data, c)
        assert (colours[title] == figures.MUTED) == (not strong[c])
        assert (title in lines["not above noise"]) == (not strong[c])
        assert (trace(drawn, name).line.color in highlights) == bool(strong[c])
        bars = bars_by_row(data, c, 0)
        sizes = [abs(bar.value) for bar in bars[1:-1]]
        whole = abs(bars[-1].value - bars[0].value)
        for limit in (0.0, 0.999 * whole, 1.001 * whole):
            drawn_bars = figures_behaviour.waterfall(bars, "", limit=limit).data[:-1]
            grey = [bar.marker.color == figures.MUTED for bar in drawn_bars]
            assert grey == [size < limit or whole <= limit for size in sizes]


def test_waterfall_bars_join_and_end_at_the_end(data: RunData) -> None:
    for category in range(len(data.categories)):
        found = figures_behaviour.waterfall(bars_by_feature(data, category, 0), "probability")
        *bars, ends = found.data
        at = ends.x[0]
        for bar in bars:
            assert bar.base[0] == pytest.approx(at, abs=1e-12)
            at = bar.base[0] + bar.x[0]
        assert at == pytest.approx(ends.x[1], abs=1e-12)
        assert list(ends.x) == [data.means[0, category, 0], data.means[-1, category, 0]]
        *others, residual = bars
        assert not any(bar.marker.pattern.shape for bar in others)
        assert (residual.marker.pattern.shape, residual.marker.pattern.bgcolor) == ("/", residual.marker.color)


def test_small_changes_are_written_with_enough_decimals() -> None:
    bars = [Bar("start", 0.003, "start"), Bar("a", 2.5e-5, "feature"), Bar("end", 0.003025, "end")]
    found = figures_behaviour.waterfall(bars, "probability")
    assert found.data[0].text == ("+0.000025",)


def test_pathway_lines_and_floors(data: RunData) -> None:
    found, shifts, floors = figures_policy.pathway_norms(data, 0), cumulative_shifts(data), shift_floors(data)
    assert floors is not None
    for part in PATHWAYS:
        name = figures.PART_NAMES[part]
        np.testing.assert_array_equal(trace(found, name).y, norms(shifts[part], 0))
        np.testing.assert_array_equal(trace(found, f"noise floor of {name}").y, norms(floors[part], 0))


def test_feature_bars_show_every_part_once(data: RunData) -> None:
    shifts = feature_shifts(data, 0)
    found = figures_policy.feature_bars(data, shifts)
    for part in PATHWAYS:
        strong, pale = (each for each in found.data if each.legendgroup == part)
        assert pale.opacity < strong.opacity
        for each, above, below in zip(shifts, strong.x, pale.x, strict=True):
            assert (above, below)[not each.above[part]] == each.shifts[part]
            assert (above, below)[each.above[part]] is None


def test_what_is_not_finite_is_a_hole(data: RunData) -> None:
    found = figures_health.sae_health(data)
    fvu = trace(found, "FVU")
    assert list(fvu.x) == [0, 4, 8, 10, 12]  # the window that ends at step 2 has no health
    assert fvu.y[1] is None
    assert trace(found, "delta-FVU plain").y[1] is None  # infinite
    assert trace(found, "delta-FVU at fixed gates").y[1] is None  # 0 has no place on a log axis
    assert "NaN" not in json.dumps(found.to_plotly_json(), cls=PlotlyJSONEncoder)


def test_cost_shows_every_window_by_status(data: RunData) -> None:
    found = figures_health.cost_bars(data)
    assert {each.name: list(each.x) for each in found.data} == {"ok": [2, 4, 8, 10, 12], "failed": [6]}


def test_every_colour_of_a_figure_has_a_dark_twin(data: RunData) -> None:
    shown = [
        figures_behaviour.category_lines(data, 0),
        figures_behaviour.change_arrows(data, 0),
        figures_behaviour.waterfall(bars_by_feature(data, 0, 0), "probability"),
        figures_policy.pathway_norms(data, 0),
        figures_policy.window_trust(data),
        figures_policy.feature_bars(data, feature_shifts(data, 0)),
        figures_policy.lam_grid(data),
        figures_health.sae_health(data),
        figures_health.cost_bars(data),
    ]
    for found in shown:
        for colour in colours(found.to_plotly_json()):
            assert colour in figures.DARK or colour == "rgba(0,0,0,0)", colour


def colours(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [each for item in value.values() for each in colours(item)]
    if isinstance(value, list | tuple):
        return [each for item in value for each in colours(item)]
    return [value] if isinstance(value, str) and value.startswith(("#", "rgb")) else []


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_lines_stand_out_in_both_themes() -> None:
    for colour, _ in figures.HIGHLIGHTS:
        for shown, paper in ((colour, figures.PAPER), (figures.DARK[colour], figures.DARK[figures.PAPER])):
            low, high = sorted((luminance(shown), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 3.0  # WCAG 2.2, 1.4.11


def test_text_in_a_figure_is_escaped() -> None:
    assert figures.safe("<a href='x'>&amp;\n") == "&lt;a href='x'&gt;&amp;amp; "
