"""The page of a comparison loads nothing, escapes everything and has a place for every figure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from smda_callbacks.report import page as report_page
from smda_callbacks.report.compare import compare
from smda_callbacks.report.compare_page import render_comparison, write_comparison
from tests.helpers.compared import stored, with_effects, with_manifest, without_pairs
from tests.helpers.runs import Run, make_run
from tests.report.test_page import EVIL, Parsed


@pytest.fixture(scope="module", autouse=True)
def _short_plotly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "get_plotlyjs", lambda: "/* plotly.js */")
        yield


@pytest.fixture(scope="module")
def run() -> Run:
    made = make_run(windows=4, pairs=8, behaviours=("refusal", "hedging"))
    return with_effects(made, dict.fromkeys(range(8), 100.0))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Parsed:
    other = with_manifest(replace(without_pairs(run, {2}), windows=without_pairs(run, {2}).windows[:3]), run_id="b")
    return Parsed(render_comparison(compare(stored(tmp_path_factory.mktemp("page"), run, other, run))))


def test_sections_and_their_anchors(page: Parsed) -> None:
    names = ["summary", "behaviour", "policy", "pairs", "cost", "settings", "check"]
    assert [attributes["id"] for attributes in page.all("section")] == names
    assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in names]


def test_every_place_has_its_figure_and_every_figure_a_place(page: Parsed) -> None:
    places = {a["data-figure"] for a in page.all("div") if "data-figure" in a}
    figures = page.figures["figures"]
    assert places <= figures.keys()
    choosers = {a["data-prefix"] for a in page.all("div") if "data-prefix" in a}
    assert choosers == {"category-0", "category-1"}
    chosen = {f"{prefix}-{place}" for prefix in choosers for place in range(4)}
    assert figures.keys() == {*places, *chosen}
    assert {f"features-{m}-{name}" for m in (0, 1) for name in "BC"} <= places


def test_nothing_is_loaded(page: Parsed) -> None:
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {"src", "srcset", "data", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert len(page.all("script")) == 3


def test_figures_show_the_numbers(tmp_path: Path, run: Run) -> None:
    found = compare(stored(tmp_path, run, replace(run, windows=run.windows[:3])))
    figures = Parsed(render_comparison(found)).figures["figures"]
    refuse = next(each for each in found.trajectories if each.metric == "smda/refusal_group/refuse")
    lines = {trace["name"]: trace for trace in figures["courses-0"]["data"]}
    for name in "AB":
        assert lines[f"{name}: should refuse"]["x"] == list(refuse.values[name])
        assert lines[f"{name}: should refuse"]["y"] == list(refuse.values[name].values())
    (ends,) = figures["ends-0"]["data"]
    shown = dict(zip(ends["y"], zip(ends["x"], ends["error_x"]["array"], strict=True), strict=True))
    apart = refuse.at_end["B"]
    assert apart is not None
    assert apart.floor is not None
    assert shown["<b>all to refuse</b>"] == (apart.difference, 2 * apart.floor)


def test_text_of_a_run_is_escaped(tmp_path: Path, run: Run) -> None:
    def evil(run: Run) -> Run:
        windows = [
            replace(w, pairs_seen=tuple(replace(p, text=f"{EVIL}{p.id % 100}") for p in w.pairs_seen))
            for w in run.windows
        ]
        return with_manifest(replace(run, windows=tuple(windows)), trainer__class=EVIL, run_id=EVIL)

    other = with_manifest(evil(without_pairs(run, {2})), trainer__class="other")
    page = Parsed(render_comparison(compare(stored(tmp_path, evil(run), other))))
    assert not page.all("img")
    assert len(page.all("script")) == 3
    assert EVIL in page.text


def test_what_is_not_shared_is_told_at_the_top(tmp_path: Path, run: Run) -> None:
    other = with_manifest(run, sae__hash="0ther")
    page = Parsed(render_comparison(compare(stored(tmp_path, run, other), allow_mismatch=True)))
    assert "SAE: A 5ae, B 0ther" in page.text
    assert "policy" not in [attributes["id"] for attributes in page.all("section")]


def test_the_page_is_written_and_a_folder_is_refused(tmp_path: Path, run: Run) -> None:
    found = compare(stored(tmp_path, run, run))
    path = write_comparison(found, tmp_path / "new" / "compare.html")
    assert path.read_text(encoding="utf-8") == render_comparison(found)
    with pytest.raises(ValueError, match=r"is a folder; the page is one file. Pass .*compare.html"):
        write_comparison(found, tmp_path)
