"""The page loads nothing, escapes everything, says what it should, and can be built at any moment of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from smda_callbacks.records import Alert, FeatureLabel, probe_hash
from smda_callbacks.report import page as report_page
from smda_callbacks.report.markup import Html, element, fixed, number, percent, script_json, signed, token
from smda_callbacks.report.page import write_report
from smda_callbacks.report.sections import SECTIONS
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers import runs
from tests.helpers.runs import Run, make_run, write_run

EVIL = "</script><script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>\"'&{behaviour}%{x}"

#: Sections of a run that was not attributed.
WITHOUT_PAIRS = [each.name for each in SECTIONS if each.name not in ("pairs", "groups", "interference", "ledger")]


class Parsed(HTMLParser):
    """Elements, texts and script bodies of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        elif not self._open or self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def page_of(path: Path, run: Run, *, close: bool = True) -> Parsed:
    return Parsed(write_report(write_run(path / "run", run, close=close)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _short_plotly() -> Iterator[None]:
    """Five megabytes of plotly.js in every page would make these tests slow; one test has the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "get_plotlyjs", lambda: "/* plotly.js */")
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Parsed:
    run = make_run(windows=5, behaviours=("refusal", "hedging"), skipped=(3,))
    return page_of(tmp_path_factory.mktemp("page"), run)


def test_sections_in_reading_order(page: Parsed) -> None:
    assert [attributes["id"] for attributes in page.all("section")] == WITHOUT_PAIRS
    anchors = [attributes["href"] for attributes in page.all("a") if (attributes["href"] or "").startswith("#")]
    assert anchors == [f"#{name}" for name in WITHOUT_PAIRS]


def test_nothing_is_loaded(page: Parsed) -> None:
    loading = {"link", "img", "iframe", "object", "embed", "video", "audio", "source", "base", "form", "image", "use"}
    assert not loading & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "background", "data", "poster", "action"} & attributes.keys()
        assert "href" not in attributes or tag == "a"
        assert not [name for name in attributes if name.startswith("on")]
    assert [attributes.get("http-equiv") for attributes in page.all("meta")].count("Content-Security-Policy") == 1


def test_styles_load_nothing(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", make_run(windows=1))).read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in style


def test_only_these_scripts_may_run(page: Parsed) -> None:
    (content,) = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv")]
    assert content.startswith("default-src 'none';")
    allowed = re.findall(r"'sha256-([^']+)'", content)
    figures, *scripts = page.scripts
    assert allowed == [b64encode(sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(page.all("script")) == 3
    assert page.all("script")[0]["type"] == "application/json"
    assert figures.startswith('{"dark"')


def test_plotly_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "get_plotlyjs", get_plotlyjs)
    page = page_of(tmp_path, make_run(windows=1))
    test_only_these_scripts_may_run(page)
    test_nothing_is_loaded(page)
    assert page.scripts[1] == get_plotlyjs()


def test_every_place_has_its_figure(page: Parsed) -> None:
    places = {a["data-figure"] for a in page.all("div") if "data-figure" in a}
    figures = page.figures["figures"]
    assert places <= figures.keys()
    assert all(key in places or key.startswith("waterfall-") for key in figures)
    choosers = {a["data-prefix"] for a in page.all("div") if "data-prefix" in a}
    wanted = {f"{prefix}-{c}-{view}" for prefix in choosers for c in range(4) for view in ("feature", "row")}
    assert wanted == {key for key in figures if key.startswith("waterfall-")}


def test_every_axis_has_a_title(page: Parsed) -> None:
    for key, figure in page.figures["figures"].items():
        axes = {name: axis for name, axis in figure["layout"].items() if re.fullmatch(r"[xy]axis\d*", name)}
        for name, axis in axes.items():
            above = {"health": ("xaxis", "xaxis2"), "ledger": ("xaxis",)}
            shares = name in above.get(key.partition("-")[0], ())  # the plots below say it
            assert axis["title"].get("text") or axis.get("type") == "category" or shares, (key, name)


def test_one_behaviour_is_shown_at_a_time(page: Parsed) -> None:
    parts = [a for a in page.all("div") if a.get("class") == "behaviour"]
    assert {a["data-behaviour"] for a in parts} == {"0", "1"}
    assert all(("hidden" in a) == (a["data-behaviour"] != "0") for a in parts)
    assert [a["id"] for a in page.all("select") if "id" in a] == ["chosen-behaviour"]


def evil_run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(runs, "CATEGORIES", {EVIL: "refuse", "other": "refuse", f"{EVIL}2": "comply"})
    run = make_run(windows=3, behaviours=(EVIL, "other"), run_id=EVIL, failed=(1,))
    probes = tuple(replace(probe, text=EVIL) for probe in run.start.probes)
    features = run.start.policy.features.tolist()
    labels = [FeatureLabel(j, ((probes[0].id, 1.0),), (EVIL,), (EVIL,), f"https://x/{EVIL}", EVIL) for j in features]
    labels[0] = replace(labels[0], url="javascript:alert(3)")
    policy = replace(run.start.policy, labels=tuple(labels), probe_hash=probe_hash(probes))
    manifest = dict(run.start.manifest) | {"probe_hash": probe_hash(probes)}
    manifest["sae"] = {"id": EVIL, "hash": EVIL, "hook_name": EVIL, "architecture": EVIL}
    windows = (*run.windows[:1], replace(run.windows[1], error=EVIL), *run.windows[2:])
    start = replace(run.start, probes=probes, policy=policy, manifest=manifest)
    return replace(run, start=start, windows=windows, alerts=(Alert(6, EVIL, EVIL, EVIL),))


def test_text_from_a_run_is_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, evil_run(monkeypatch))
    test_nothing_is_loaded(page)
    test_only_these_scripts_may_run(page)
    assert page.text.count(EVIL) > 20
    links = {a["href"] for a in page.all("a") if not (a["href"] or "").startswith("#")}
    assert links == {f"https://x/{EVIL}"}


def test_text_in_figures_has_no_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = page_of(tmp_path, evil_run(monkeypatch)).figures["figures"]
    for text in strings(figures):
        tags = set(re.findall(r"<[^>]*>?", text))
        assert tags <= {"<b>", "</b>", "<br>", "<extra>", "</extra>"}, text


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def without_health(run: Run) -> Run:
    start = replace(run.start, baseline=replace(run.start.baseline, health=None))
    return replace(run, start=start, windows=tuple(replace(window, health=None) for window in run.windows))


@pytest.mark.parametrize(
    ("run", "close", "said"),
    [
        (make_run(windows=0), False, "Nothing has been booked yet"),
        (make_run(windows=0), True, "Nothing has been booked yet"),
        (make_run(windows=1), True, "finished at step 2"),
        (make_run(windows=3, failed=(0, 1, 2)), True, "3 windows not booked"),
        (make_run(windows=4, failed=(0,), not_finite=(3,)), True, "2 windows could not be measured and were not"),
        (make_run(windows=2, steps_per_window=1), False, "The run has no end record"),
        (make_run(noise=False), True, "The noise floor was not measured"),
        (without_health(make_run()), True, "Delta-FVU was not measured"),
        (make_run(start_step=40), True, "step 40 to 48"),
        (make_run(mean_readout=True, behaviours=("a", "b", "c")), True, "A (probability)"),
    ],
    ids=["empty", "empty-closed", "one", "all-failed", "some-failed", "running", "no-noise", "no-health", "later",
         "three-behaviours"],
)  # fmt: skip
def test_any_moment_of_a_run(tmp_path: Path, run: Run, close: bool, said: str) -> None:
    page = page_of(tmp_path, run, close=close)
    assert said in page.text
    assert len(page.all("section")) == len(WITHOUT_PAIRS)
    test_nothing_is_loaded(page)


def test_logits_are_named_and_not_cut_to_the_unit_interval(tmp_path: Path) -> None:
    run = make_run()
    policy = replace(run.start.policy, target="logit")
    manifest = dict(run.start.manifest) | {"target": "logit"}
    manifest.pop("policy_hash")
    run = replace(run, start=replace(run.start, policy=policy, manifest=manifest))
    page = page_of(tmp_path, run)
    layout = page.figures["figures"]["lines-0"]["layout"]
    assert layout["yaxis"]["title"]["text"] == "mean refusal (logit)"
    assert "range" not in layout["yaxis"]


def test_gap_rows_are_marked(page: Parsed) -> None:
    assert "▲ over-refusal" in page.text
    assert [a for a in page.all("tr") if a.get("class") == "gap"]


def test_path_in_the_command_is_quoted(tmp_path: Path) -> None:
    store = write_run(tmp_path / "a run; rm", make_run(windows=1))
    page = Parsed(write_report(store).read_text(encoding="utf-8"))
    assert f"smda verify '{store}'" in page.text


def test_same_store_same_page(tmp_path: Path) -> None:
    store = RunStore.open(write_run(tmp_path / "run", make_run(windows=2)))
    first = write_report(store)
    assert first == tmp_path / "run" / "report.html"
    second = write_report(tmp_path / "run", tmp_path / "new" / "other.html")
    assert second == tmp_path / "new" / "other.html"
    assert first.read_bytes() == second.read_bytes()
    assert len(RunStore.open(store.path).windows()) == 2  # the report is no part of the store


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        write_report(tmp_path)
    store = write_run(tmp_path / "run", make_run(windows=1))
    with pytest.raises(ValueError, match=r"out is .*, a folder; the report is one file\. Pass '.*report\.html'\."):
        write_report(store, tmp_path)


@pytest.mark.parametrize(("module", "loaded"), [("smda_callbacks.report.page", False), ("torch", True)])
def test_no_model_library_is_imported(module: str, loaded: bool) -> None:
    """The second case shows that the first can fail."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(loaded)


def test_elements_escape_what_is_not_html() -> None:
    assert element("p", "<b>", Html("<i>"), None, class_="a&\"'", hidden=True, title=None) == (
        '<p class="a&amp;&quot;&#x27;" hidden>&lt;b&gt;<i></p>'
    )
    text = script_json({"a": "</script><!--&"})
    assert not re.search(r"[<>&]", text)
    assert json.loads(text) == {"a": "</script><!--&"}


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (number(0.012345), "0.0123"),
        (number(-1234.5), "−1234"),
        (number(1.5e-7, 2), "1.5e−07"),
        (number(0.0), "0.00"),
        (number(float("nan")), "–"),
        (number(float("-inf")), "−∞"),
        (fixed(-0.001), "0.00"),
        (fixed(None), "–"),
        (signed(0.126), "+0.13"),
        (signed(-0.126), "−0.13"),
        (signed(0.001), "0.00"),
        (signed(float("inf")), "+∞"),
        (percent(0.333), "33\u00a0%"),
        (percent(0.0333), "3.3\u00a0%"),
        (percent(None), "–"),
        (token(" a\n\t\x00"), "␣a↵⇥�"),
        (token(""), "∅"),
    ],
)
def test_numbers_and_tokens_as_text(found: str, wanted: str) -> None:
    assert found == wanted
