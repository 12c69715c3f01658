"""The page's sections on training pairs: right numbers, escaped texts, bounded size; audits without time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from smda_callbacks.records import Pair
from smda_callbacks.report import page as report_page
from smda_callbacks.report.data import RunData
from smda_callbacks.report.figures_pairs import colour_limit
from smda_callbacks.report.page import render, write_report
from smda_callbacks.report.pair_ranking import aligned, plus
from smda_callbacks.report.pairs_data import pair_name
from smda_callbacks.report.sections import SECTIONS, sections_of
from smda_callbacks.sinks.pair_table import PairTable, column, pair_table
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.pair_runs import make_audit
from tests.helpers.runs import Run, make_run, write_run
from tests.report import test_page as pages
from tests.report.test_page import EVIL, Parsed

NEW = ("pairs", "groups", "interference", "ledger")
OVER_TIME = ("behaviour", "policy", "features", "waterfall", "ledger", "cost")


class Tables(HTMLParser):
    """Rows of the tables of a page as texts of their cells, by section: heads, and whether a row is hidden."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.cell = "", False
        self.rows: dict[str, list[tuple[list[str], dict[str, str | None]]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "section":
            self.section = str(dict(attrs)["id"])
        if tag == "tr":
            self.rows.setdefault(self.section, []).append(([], dict(attrs)))
        if tag in ("td", "th"):
            self.rows[self.section][-1][0].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[self.section][-1][0][-1] += data


@pytest.fixture(scope="module", autouse=True)
def _short_plotly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "get_plotlyjs", lambda: "/* plotly.js */")
        yield


def text_of(path: Path, run: Run) -> str:
    return write_report(write_run(path / "run", run)).read_text(encoding="utf-8")


def table_of(run: Run) -> PairTable:
    table = pair_table(run.start, run.windows)
    assert table is not None
    return table


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(windows=8, pairs=12, features=5, behaviours=("refusal", "hedging"), unattributed=[2])


@pytest.fixture(scope="module")
def text(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(tmp_path_factory.mktemp("pairs"), run)


@pytest.fixture(scope="module")
def audit() -> Run:
    return make_audit(pairs=9, repeats=2, features=5, failed=[4])


@pytest.fixture(scope="module")
def audit_text(audit: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_of(tmp_path_factory.mktemp("audit"), audit)


def sections(text: str) -> list[str | None]:
    return [each["id"] for each in Parsed(text).all("section")]


def test_attributed_runs_have_all_sections(text: str) -> None:
    assert sections(text) == [each.name for each in SECTIONS]
    assert set(NEW) < set(sections(text))


def test_other_runs_have_none_of_them_and_say_why(tmp_path: Path) -> None:
    plain = make_run(windows=2)
    attribution = {"engine": "off", "why": "the adapter is of a kind that is not known", "functionals": []}
    off = replace(plain, start=replace(plain.start, manifest={**plain.start.manifest, "attribution": attribution}))
    for name, run, said in (("a", plain, "not attributed"), ("b", off, "not attributed: the adapter is of a kind")):
        text = text_of(tmp_path / name, run)
        assert not set(NEW) & set(sections(text))
        assert said in Parsed(text).text


def test_a_reward_model_s_behaviour_is_said_to_be_its_preference(text: str, tmp_path: Path) -> None:
    assert "of a reward model" not in Parsed(text).text
    run = make_run(windows=1)
    preferred = replace(run, start=replace(run.start, manifest={**run.start.manifest, "scored_by": "preference"}))
    assert "of a reward model: the probability that it prefers" in Parsed(text_of(tmp_path, preferred)).text


def test_windows_that_are_not_attributed_are_told_with_their_reason(run: Run, text: str, tmp_path: Path) -> None:
    assert "1 of 8 windows is not attributed: the store does not say why." in Parsed(text).text
    why = "the step needs <more> memory. Next step: raise it."
    windows = tuple(replace(each, unattributed=None if each.pairs else why) for each in run.windows)
    one = text_of(tmp_path / "one", replace(run, windows=windows))
    assert "1 of 8 windows is not attributed: the step needs <more> memory. Next step: raise it." in Parsed(one).text
    none = tuple(replace(each, pairs=None, unattributed=why) for each in run.windows)
    said = Parsed(text_of(tmp_path / "none", replace(run, windows=none))).text
    assert "8 of 8 windows are not attributed: the step needs <more> memory." in said


def test_the_page_loads_nothing_and_allows_only_its_scripts(text: str, audit_text: str) -> None:
    for each in (text, audit_text):
        pages.test_nothing_is_loaded(Parsed(each))
        pages.test_only_these_scripts_may_run(Parsed(each))
        pages.test_every_axis_has_a_title(Parsed(each))


@pytest.mark.parametrize("quantity", ["effect", "share"])
def test_rankings_hold_the_numbers_of_the_pair_table(run: Run, text: str, quantity: str) -> None:
    table, found = table_of(run), Parsed(text).figures["rankings"][quantity]
    values = getattr(table, quantity)
    names = list(table.functionals)
    listed = [re.search(r"smda pairs RUN --by (\S+)|by (\S+)\.$", each["rest"]) for each in found]
    assert {match[1] or match[2] for match in listed if match} == set(names)
    for each, match in zip(found, listed, strict=True):
        assert match is not None
        place = column(table, match[1] or match[2])
        order = np.argsort(-np.abs(values[:, place]), kind="stable").tolist()
        assert each["rows"] == order[: len(each["rows"])]
        assert each["cells"][0] == aligned(values[each["rows"], place])
        if quantity == "share":
            assert len(each["cells"]) == 1  # no noise floor, and no effect
            continue
        assert table.floor is not None
        ratios = np.abs(values[each["rows"], place]) / table.floor[each["rows"], place]
        assert each["weak"] == (ratios <= 2).astype(int).tolist()
        assert float(each["cells"][1][0].replace("−", "-")) == pytest.approx(ratios[0], rel=0.06)


def test_the_first_ranking_is_readable_without_a_script(run: Run, text: str) -> None:
    table, rows = table_of(run), Tables(text).rows["pairs"]
    head, body = rows[0][0], rows[1:]
    assert head[:6] == ["#", "pair", "kind", "category", "effect", "×\u00a0floor"]
    assert head[6:] == ["interference", "flag", "windows", "text"]
    place = column(table, "refusal:harmful")
    order = np.argsort(-np.abs(table.effect[:, place]), kind="stable").tolist()
    shown = [cells for cells, attributes in body if "hidden" not in attributes]
    assert [cells[1] for cells in shown] == [pair_name(table.pairs[row]) for row in order]
    assert [cells[4] for cells in shown] == aligned(table.effect[order, place])
    for cells, row in zip(shown, order, strict=True):
        assert cells[2] == table.pairs[row].columns["kind"]
        assert cells[7] == ("⚑" if table.flagged[row] else "–")
        assert cells[8] == str(table.windows[row])
        assert f"pair {table.pairs[row].id}" in cells[9]


def test_shares_and_effects_are_never_in_one_table_or_plot(text: str, audit_text: str) -> None:
    for each in (text, audit_text):
        for section in re.split(r"(?=<table>)", each)[1:]:
            head = re.search(r"<thead>.*?</thead>", section)
            assert head is not None
            assert not ("effect" in head[0] and "share" in head[0])
        for key, figure in Parsed(each).figures["figures"].items():
            words = json.dumps(figure["layout"]) + json.dumps([trace.get("name") for trace in figure["data"]])
            shares = key == "interference"  # shares of an effect, not the quantity
            assert not ("effect" in words and "share" in words) or shares, key


def test_ledger_bars_and_totals(run: Run, text: str) -> None:
    table, figures = table_of(run), Parsed(text).figures["figures"]
    bars = {trace["name"]: trace for trace in figures["ledger-0-0"]["data"]}
    books = [window.pairs for window in run.windows if window.pairs is not None]
    place = column(table, "refusal:harmful")
    np.testing.assert_allclose(bars["pairs"]["y"], [book.share[:, place].sum() for book in books], rtol=1e-5)
    for line in ("measured", "unexplained", "momentum"):
        np.testing.assert_allclose(bars[line]["y"], [book.lines[line][place] for book in books], rtol=1e-5)
    rows = {cells[0]: cells for cells, _ in Tables(text).rows["ledger"] if cells}
    part = abs(table.lines["unexplained"][place] / table.lines["measured"][place])
    values = [table.lines["measured"][place], sum(book.share[:, place].sum() for book in books)]
    assert rows["refusal:harmful"][1:3] == [f"{value:+.3f}".replace("-", "−") for value in values]
    assert rows["refusal:harmful"][7] == f"{100 * part:.1f}"
    assert rows["refusal:harmful"][8] == f"{table.lines['unattributed'][place]:+.3f}".replace("-", "−")
    assert "7 of 8 booked windows attributed to pairs." in text


def test_choosers_have_their_figures(text: str) -> None:
    page, figures = Parsed(text), Parsed(text).figures["figures"]
    prefixes = {a["data-prefix"] for a in page.all("div") if "data-prefix" in a} - {"waterfall-0", "waterfall-1"}
    assert prefixes == {"curves-0", "curves-1", "ledger-0", "ledger-1"}
    for prefix in prefixes:
        box = text[text.index(f'data-prefix="{prefix}"') :].split("</figure>")[0]
        options = re.findall(r'<option value="(\d+)"', box)
        assert options
        assert all(f"{prefix}-{option}" in figures for option in options)


def test_heat_map_shows_effects_above_noise_only(run: Run, text: str) -> None:
    table, figure = table_of(run), Parsed(text).figures["figures"]["map-0"]
    assert table.floor is not None
    names = {f"{pair_name(pair)} · {pair.columns['kind']}": row for row, pair in enumerate(table.pairs)}
    limit = figure["layout"]["coloraxis"]["cmax"]
    assert figure["layout"]["coloraxis"]["cmin"] == -limit
    for trace, suffix in zip(figure["data"], ("x", "y"), strict=True):
        for name, cells in zip(trace["y"], trace["z"], strict=True):
            for feature, value in zip(trace["x"], cells, strict=True):
                place = column(table, f"feature:{feature}:{suffix}")
                effect, floor = table.effect[names[name], place], table.floor[names[name], place]
                assert value == (float(f"{effect:.6g}") if abs(effect) > 2 * floor else None)


def test_colours_do_not_end_at_an_outlier() -> None:
    assert colour_limit(np.array([0.1, -0.2, 0.3])) == 0.3
    assert colour_limit(np.array([0.1] * 9 + [50.0])) == pytest.approx(1.2)
    assert colour_limit(np.zeros(3)) == 1.0


def test_gap_pairs_say_what_their_signs_mean(run: Run, text: str) -> None:
    table = table_of(run)
    rows = {cells[0]: cells for cells, _ in Tables(text).rows["gaps"] if len(cells) == 5}
    assert {gap["category"] for gap in run.start.gaps} <= set(rows)
    for name, expected in (("cooking", "comply"), ("fraud", "refuse")):
        place, cells = column(table, f"refusal:{name}"), rows[name]
        closing, widening = ("lower", "raise") if expected == "comply" else ("raise", "lower")
        for cell, verb in ((cells[2], closing), (cells[3], widening)):
            assert cell.startswith(f"{verb} refusal:") or cell == "none above noise"
            effect = table.effect[:, place] * (1 if verb == "raise" else -1)
            assert table.floor is not None
            best = int(np.argmax(np.where(effect > 2 * table.floor[:, place], effect, -1)))
            if cell.startswith(verb):
                assert f"{pair_name(table.pairs[best])} {plus(float(table.effect[best, place]))}" in cell


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(windows=4, pairs=8, features=3)

    def evil(pair: Pair) -> Pair:
        return replace(pair, columns={"kind": f"{EVIL}{pair.id % 2}", EVIL: EVIL}, text=f"{EVIL}\n{EVIL}" * 9)

    windows = tuple(replace(w, pairs_seen=tuple(evil(pair) for pair in w.pairs_seen)) for w in run.windows)
    attribution = {**run.start.manifest["attribution"], "why": EVIL, "notes": [EVIL]}
    start = replace(run.start, manifest={**run.start.manifest, "attribution": attribution})
    page = Parsed(text_of(tmp_path, replace(run, start=start, windows=windows)))
    pages.test_nothing_is_loaded(page)
    pages.test_only_these_scripts_may_run(page)
    assert page.text.count(EVIL) > 20
    for found in pages.strings(page.figures["figures"]):
        assert set(re.findall(r"<[^>]*>?", found)) <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}


def test_texts_that_are_kept_out_are_not_in_the_page(tmp_path: Path) -> None:
    text = text_of(tmp_path, make_run(windows=3, pairs=6, pair_text=False))
    assert "The configuration keeps texts out of the store" in text
    assert "Sorry, I can" not in text


def many(table: PairTable, pairs: int) -> PairTable:
    """The same with ``pairs`` pairs, whose effects are random and whose texts are long."""
    rng, old = np.random.default_rng(0), len(table.pairs)
    rows = np.arange(pairs) % old
    scale = rng.normal(size=(pairs, len(table.functionals)))
    return replace(
        table,
        pairs=tuple(replace(table.pairs[r], id=k, rows=(k,), text="word " * 1000) for k, r in enumerate(rows.tolist())),
        share=table.share[rows] * scale, effect=table.effect[rows] * scale,
        floor=None if table.floor is None else table.floor[rows], windows=table.windows[rows],
        intended=table.intended[rows], interference=table.interference[rows], flagged=table.flagged[rows],
    )  # fmt: skip


def test_ten_thousand_pairs_do_not_swell_the_page(tmp_path: Path) -> None:
    run = make_run(windows=6, pairs=12, features=24)
    data = RunData.read(RunStore.open(write_run(tmp_path / "run", run)))
    few = len(render(data))
    big = many(table_of(run), 10_000)
    data.__dict__["pairs"] = big
    found = render(data)
    assert len(found) - few < 2_000_000
    rankings = Parsed(found).figures["rankings"]
    assert len(rankings["effect"][0]["rows"]) == 50
    assert "The 50 largest of 10,000 pairs by refusal:harmful; the effect of no other is larger than" in found
    place = column(big, "refusal:harmful")
    limit = np.sort(np.abs(big.effect[:, place]))[-51]
    assert f"larger than {plus(float(limit)).lstrip('+')}." in rankings["effect"][0]["rest"]
    assert min(len(each["rows"]) for each in rankings["effect"]) >= 3


# --------------------------------------------------------------------------------------------------------- audits


def test_an_audit_has_no_course_of_time(audit_text: str) -> None:
    found = sections(audit_text)
    assert found == [each.name for each in SECTIONS if each.name not in OVER_TIME]
    page = Parsed(audit_text)
    assert "optimizer step" not in json.dumps(page.figures["figures"])
    assert not [key for key in page.figures["figures"] if key.startswith(("lines", "curves", "ledger", "waterfall"))]
    assert page.figures["rankings"].keys() == {"effect"}


def test_the_head_of_an_audit_says_what_it_is(audit: Run, audit_text: str) -> None:
    said, table = Parsed(audit_text).text, table_of(audit)
    assert "An audit of 9 pairs, 2 repeats each, from one fixed model: every pair alone makes 1 step" in said
    assert "The audit finished. 18 of 18 measurements made, 1 of which failed." in said
    place = column(table, "refusal:harmful")
    best = int(np.argmax(table.effect[:, place]))
    assert f"most raised by {pair_name(table.pairs[best])} ({plus(float(table.effect[best, place]))}" in said
    assert "Spread over a pair's repeats (standard deviation), in the median" in said
    assert "1 measurement not booked" in said


def test_an_audit_shows_means_and_spread_over_repeats(audit: Run, audit_text: str) -> None:
    table = table_of(audit)
    rows = Tables(audit_text).rows["pairs"]
    assert rows[0][0][4:7] == ["effect", "×\u00a0floor", "±\u00a0repeats"]
    place = column(table, "refusal:harmful")
    order = np.argsort(-np.abs(table.effect[:, place]), kind="stable").tolist()
    assert [cells[4] for cells, _ in rows[1:10]] == aligned(table.effect[order, place])
    assert table.spread is not None
    assert [cells[6] for cells, _ in rows[1:10]] == [each.lstrip("+") for each in aligned(table.spread[order, place])]


def test_an_audit_before_its_first_measurement(tmp_path: Path) -> None:
    run = replace(make_audit(pairs=3), windows=())
    text = write_report(write_run(tmp_path / "run", run, close=False)).read_text(encoding="utf-8")
    assert "Nothing has been booked yet" in text
    assert "The audit has not finished" in text
    assert not set(NEW) & set(sections(text))


@pytest.mark.parametrize(
    "run",
    [
        make_run(windows=3, pairs=5, noise=False),
        make_run(windows=3, pairs=5, attributed=0),
        make_run(windows=3, pairs=1, engine="exact"),
        make_run(windows=3, pairs=4, not_finite=[0, 1]),
        make_audit(pairs=1),
        make_audit(pairs=4, noise=False),
    ],
    ids=["no-noise", "no-features", "one-pair", "one-window", "audit-of-one", "audit-no-noise"],
)
def test_any_run_with_pairs(tmp_path: Path, run: Run) -> None:
    store = RunStore.open(write_run(tmp_path / "run", run))
    text = write_report(store).read_text(encoding="utf-8")
    assert sections(text) == [each.name for each in sections_of(RunData.read(store))]
    pages.test_nothing_is_loaded(Parsed(text))
    if run.start.noise is None:
        assert "The noise floor of effects was not measured" in text
        assert "above noise" not in Parsed(text).text.replace("pairs above noise", "")
    if len(run.start.manifest["attribution"]["functionals"]) == 12:
        assert "No feature is attributed to pairs" in text
