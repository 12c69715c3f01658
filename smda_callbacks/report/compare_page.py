"""A comparison of runs as one self-contained HTML page, in the style of the report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import plotly.graph_objects as go

from smda_callbacks.report import compare_figures, compare_html
from smda_callbacks.report.compare import Comparison
from smda_callbacks.report.compare_policy import FeatureApart
from smda_callbacks.report.compare_text import sentences
from smda_callbacks.report.data import TIMES
from smda_callbacks.report.markup import Html, element, join
from smda_callbacks.report.page import document, navigation
from smda_callbacks.report.section import chooser, figure_place, say
from smda_callbacks.report.tables import facts
from smda_callbacks.report.verdict import warning
from smda_callbacks.sinks.files import write_atomic

#: Features in a chart.
CHARTED = 15

_NOISE = (
    f"Noise is the root of the sum of the squares of both runs' noise floors, those of random updates; what is within "
    f"{TIMES:g} times it is pale. That runs differ by more does not say that another seed would not: only a further "
    "run does."
)


@dataclass(frozen=True)
class _Page:
    found: Comparison
    figures: dict[str, go.Figure] = field(default_factory=dict)

    def figure(self, key: str, drawn: go.Figure, caption: str) -> Html:
        self.figures[key] = drawn
        return figure_place(key, drawn, caption)

    def for_behaviours(self, build: Callable[[_Page, str, int], Html]) -> Html:
        built = ((m, build(self, each, m)) for m, each in enumerate(self.found.behaviours))
        return join(element("div", each, class_="behaviour", data_behaviour=m, hidden=m > 0) for m, each in built)


def write_comparison(found: Comparison, out: str | Path) -> Path:
    """Write the page to ``out`` and return where it lies; an old one is replaced. Raises ValueError for a folder."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the page is one file. Pass {str(path / 'compare.html')!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render_comparison(found).encode("utf-8", "replace"))
    return path


def render_comparison(found: Comparison) -> str:
    """The whole page as text. The same comparison gives the same text."""
    page = _Page(found)
    sections = [each for each in _SECTIONS if each[0] != "policy" or found.features is not None]
    sections = [each for each in sections if each[0] != "pairs" or found.pairs is not None]
    body = [element("section", element("h2", title), build(page), id=name) for name, _, title, build in sections]
    bar = navigation([(name, short) for name, short, _, _ in sections], found.behaviours)
    names = " and ".join(str(run.manifest.get("run_id") or run.name) for run in found.runs)
    return document(f"{names}: what differs", bar, body, page.figures)


def _summary(page: _Page) -> Html:
    found = page.found
    first, *others = sentences(found)
    return join([
        compare_html.runs_table(found),
        compare_html.mismatch_warning(found),
        element("p", first, class_="lead"),
        element("ul", *(element("li", each) for each in others), class_="verdict"),
    ])  # fmt: skip


def _behaviour(page: _Page) -> Html:
    return page.for_behaviours(_behaviour_of)


def _behaviour_of(page: _Page, behaviour: str, m: int) -> Html:
    found = page.found
    series = [each for each in found.trajectories if each.behaviour == behaviour]
    groups = [each for each in series if each.of == "group"]
    ranked = sorted((each for each in series if each.of == "category"), key=lambda each: -each.largest)
    parts: list[Html | None] = [
        say("Every run by optimizer step; hover for the difference to {a}.", a=found.reference.name)
    ]
    if groups:
        drawn = compare_figures.courses(found, groups)
        parts.append(page.figure(f"courses-{m}", drawn, "Mean over the probes to refuse, and to comply with (dashed)."))
    if ranked:
        for place, each in enumerate(ranked):
            page.figures[f"category-{m}-{place}"] = compare_figures.courses(found, [each])
        options = [(place, each.name) for place, each in enumerate(ranked)]
        parts.append(
            chooser(page.figures, f"category-{m}", {"category": options}, "One category, the largest difference first.")
        )
    if series:
        parts.append(say(_NOISE))
        drawn = compare_figures.ends_apart(found, [*groups, *ranked])
        parts.append(page.figure(f"ends-{m}", drawn, "Difference at the end; bars: twice the noise."))
        parts.append(compare_html.ends_table(found, [*groups, *ranked]))
    return join(parts)


def _policy(page: _Page) -> Html:
    warned = [join([element("b", run.name), ": ", said]) for run in page.found.runs
              if run.data is not None and (said := warning(run.data))]  # fmt: skip
    return join([*(element("p", each, class_="warning") for each in warned), page.for_behaviours(_policy_of)])


def _policy_of(page: _Page, behaviour: str, m: int) -> Html:
    found = page.found
    features = [each for each in found.features or () if each.behaviour == behaviour]
    parts: list[Html | None] = [
        say(
            "Features are the same where their SAE index is; one that a run's policy does not hold has a dash. "
            "Differences are of the shift over each run, end against end."
        ),
        compare_html.pathway_table(found, [each for each in found.pathways or () if each.behaviour == behaviour]),
    ]
    for run in found.others:
        shared = [each for each in features if each.apart[run.name] is not None and _held(found, each)]
        title = f"{run.name} − {found.reference.name}"
        parts.append(element("h3", title))
        if shared:
            drawn = compare_figures.features_apart(found, shared[:CHARTED], run.name)
            parts.append(
                page.figure(f"features-{m}-{run.name}", drawn, f"Difference in the shift by pathway, {title}.")
            )
        parts.append(compare_html.feature_table(found, features, run.name))
    return join(parts)


def _held(found: Comparison, each: FeatureApart) -> bool:
    return each.end[found.reference.name] is not None


def _pairs(page: _Page) -> Html:
    pairs = page.found.pairs
    assert pairs is not None
    warned = element("p", pairs.warning, class_="warning") if pairs.warning else None
    text = (
        "Pairs that act on {name} in one run and not in another. A pair acts where its effect, what would be missing "
        "had it been left out of its steps, is above {times:g} times its noise floor; absent: it was not trained on."
    )
    return join([say(text, name=pairs.functional, times=TIMES), warned, compare_html.pairs_table(page.found, pairs)])


def _cost(page: _Page) -> Html:
    return join([compare_html.cost_table(page.found), say("Share: of the whole run, measuring included.")])


def _settings(page: _Page) -> Html:
    found = page.found
    settings: Html = say("No recorded setting differs; what data a run was given is not recorded.")
    if found.settings:
        settings = compare_html.settings_table(found)
    return join([settings, element("h3", "Summary metrics"), compare_html.summary_table(found)])


def _check(page: _Page) -> Html:
    given = " ".join(shlex.quote(run.source.given) for run in page.found.runs)
    stores = [run.source.store.path for run in page.found.runs if run.source.store is not None]
    lines = [f"smda compare {given} --json", *(f"smda verify {shlex.quote(str(path))}" for path in stores)]
    hashes = [(f"{run.name} {name}", compare_html.short_hash(run, name)) for run in page.found.runs
              for name in ("probes", "SAE", "policy")]  # fmt: skip
    return join([element("pre", "\n".join(lines)), facts(hashes)])


Build = Callable[[_Page], Html]

#: Anchor, title in the bar, title, content.
_SECTIONS: Sequence[tuple[str, str, str, Build]] = (
    ("summary", "Summary", "What differs", _summary),
    ("behaviour", "Behaviour", "Behaviour, run against run", _behaviour),
    ("policy", "Policy", "Policy, run against run", _policy),
    ("pairs", "Pairs", "Pairs that act in one run only", _pairs),
    ("cost", "Cost", "Cost", _cost),
    ("settings", "Settings", "Settings that differ", _settings),
    ("check", "Check", "How to check", _check),
)
