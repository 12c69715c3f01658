"""The sections of the report, in reading order. Each says in a sentence or two how to read it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go

from smda_callbacks.maths.formula import format_policy
from smda_callbacks.report import figures_behaviour, figures_health, figures_policy, tables
from smda_callbacks.report.data import TIMES, FeatureShift, RunData, feature_shifts, gaps_now
from smda_callbacks.report.head import head
from smda_callbacks.report.markup import Html, count, element, fixed, join, percent, token
from smda_callbacks.report.verdict import sae_sentence, warning
from smda_callbacks.report.waterfall import bars_by_feature, bars_by_row, most_changed

#: Features in the bar chart.
CHARTED = 15


@dataclass(frozen=True)
class Page:
    """What the sections are built from, and the figures that they leave behind by key."""

    data: RunData
    figures: dict[str, go.Figure] = field(default_factory=dict)

    def figure(self, key: str, found: go.Figure, caption: str) -> Html:
        """Keep a figure and return its place in the page."""
        self.figures[key] = found
        return self.place(key, caption, found.layout.height)

    def place(self, key: str, caption: str, height: int) -> Html:
        """A place for the figure ``key``, as high as it will be."""
        box = element("div", class_="figure", data_figure=key, style=f"min-height:{height}px", role="img",
                      aria_label=caption)  # fmt: skip
        return element("figure", box, element("figcaption", caption))

    def for_behaviours(self, build: Callable[[Page, int], Html]) -> Html:
        """What ``build`` makes for every behaviour; one is shown at a time."""
        count_ = len(self.data.behaviours)
        return join(
            element("div", build(self, m), class_="behaviour", data_behaviour=m, hidden=m > 0) for m in range(count_)
        )


@dataclass(frozen=True)
class Section:
    name: str
    short: str
    title: str
    build: Callable[[Page], Html]


def _say(text: str) -> Html:
    return element("p", text, class_="say")


def _head(page: Page) -> Html:
    return page.for_behaviours(lambda page, m: head(page.data, m))


def _behaviour(page: Page) -> Html:
    return page.for_behaviours(_behaviour_of)


def _behaviour_of(page: Page, m: int) -> Html:
    data, name = page.data, page.data.behaviours[m]
    noise = (
        f"The grey band is {TIMES:g} times the noise floor around the start: an end inside it may be chance."
        if data.noise is not None
        else "The noise floor was not measured."
    )
    lines = "Solid: categories to refuse. Dashed: to comply with. Bold: means over the probes of each group. Grey: less changed."
    return join([
        _say(f"Each line is the mean {name} of a category's probes. The most changed categories are coloured; hover for "
             "values, click a name in the legend to hide it, double-click to see it alone."),
        page.figure(f"lines-{m}", figures_behaviour.category_lines(data, m), lines),
        _say(f"The same from start to end, sorted by change. {noise}"),
        page.figure(f"arrows-{m}", figures_behaviour.change_arrows(data, m), "Open circle: start. Filled: end."),
    ])  # fmt: skip


def _policy(page: Page) -> Html:
    return join([_warning(page.data), page.for_behaviours(_policy_of), _trust(page)])


def _policy_of(page: Page, m: int) -> Html:
    dotted = (
        "Dotted: the noise floor that random updates of the same sizes would add up to; a line near its floor says nothing."
        if page.data.noise is not None
        else "The noise floor was not measured."
    )
    text = (
        "How far the policy's coefficients have moved since the start, in three parts that sum to the change: ΔX magnitude "
        "(features respond more or less strongly), ΔX gating (features switch on or off) and ΔY (the behaviour changes "
        f"at given features). {dotted}"
    )
    caption = "L2 norm over features of the shifts summed since the start. Dotted vertical lines: windows not booked."
    found = figures_policy.pathway_norms(page.data, m)
    return join([_say(text), page.figure(f"pathways-{m}", found, caption)])


def _trust(page: Page) -> Html:
    text = (
        "Per window. Reliability is the correlation of a part over features between two halves of the probes: near 1 it "
        "would come out the same on other probes, near 0 it is noise. The first-order error is the distance of the "
        "analytic approximation from the exact shift: small means that the window's step is small enough for it."
    )
    return join([_say(text), page.figure("trust", figures_policy.window_trust(page.data), "Left: reliability. Right: error.")])


def _features(page: Page) -> Html:
    return join([_warning(page.data), page.for_behaviours(_features_of)])


def _features_of(page: Page, m: int) -> Html:
    data = page.data
    shifts = feature_shifts(data, m)
    above = sum(bool(each.above) and each.any_above for each in shifts)
    noise = (
        f"{above} of {count(len(shifts), 'feature')} shifted by more than {TIMES:g} times the noise floor in some part; the "
        "others, and parts below it, are greyed."
        if data.noise is not None
        else "The noise floor was not measured: nothing is greyed, and nothing is known to be above chance."
    )
    text = (
        f"Coefficients are in {data.unit} per standard deviation of the feature: what the policy adds to the behaviour when "
        f"the feature is one standard deviation stronger. {noise} Promoted tokens are a hint, not a measurement."
    )
    return join([_say(text), _feature_chart(page, m, shifts), tables.feature_table(data, shifts)])


def _feature_chart(page: Page, m: int, shifts: list[FeatureShift]) -> Html | None:
    if not page.data.ok:
        return None
    found = figures_policy.feature_bars(page.data, shifts[:CHARTED])
    return page.figure(f"features-{m}", found, "Parts stacked; the upright stroke is their sum. Pale: below the floor.")


def _waterfall(page: Page) -> Html:
    return join([_warning(page.data), page.for_behaviours(_waterfall_of)])


def _waterfall_of(page: Page, m: int) -> Html:
    data = page.data
    chosen = most_changed(data, m)
    unit = figures_behaviour.axis_title(data, m)
    for c in range(len(data.categories)):
        page.figures[f"waterfall-{m}-{c}-feature"] = figures_behaviour.waterfall(bars_by_feature(data, c, m), unit)
        page.figures[f"waterfall-{m}-{c}-row"] = figures_behaviour.waterfall(bars_by_row(data, c, m), unit)
    order = np.argsort(-np.abs(data.means[-1, :, m] - data.means[0, :, m]), kind="stable").tolist()
    categories = [_category_option(data, c, m, chosen) for c in order]
    views = [element("option", "by feature", value="feature"), element("option", "by row", value="row")]
    text = (
        "Read from top to bottom: from the category's mean at the start to its mean at the end. A feature's bar is all that "
        "went through it: its activations moved and its coefficient shifted. The hatched residual is what the policy cannot "
        "express. The bars close exactly."
    )
    key = f"waterfall-{m}-{chosen}-feature"
    place = page.place(key, "Blue: toward more of the behaviour. Orange: toward less.", page.figures[key].layout.height)
    controls = element(
        "p",
        element("label", "category ", element("select", *categories, data_part="category")),
        element("label", "view ", element("select", *views, data_part="view")),
        class_="controls",
    )
    return join([_say(text), element("div", controls, place, class_="chooser", data_prefix=f"waterfall-{m}")])


def _category_option(data: RunData, category: int, m: int, chosen: int) -> Html:
    start, end = (float(data.means[record, category, m]) for record in (0, -1))
    title = f"{figures_behaviour.category_title(data, category)}: {fixed(start)} → {fixed(end)}"
    return element("option", title, value=category, selected=category == chosen)


def _gaps(page: Page) -> Html:
    data = page.data
    text = (
        "A gap is a category that does not do what is expected. Low: fewer than half of the answers are refusals, or far "
        "fewer than in its peers. Over-refusal: the same for categories to comply with. Fragile: refusal hangs on features "
        "that no other category shares. Pulling features move the category away from what is expected, in the policy's "
        "units. The mean is a probability of refusal."
    )
    end = "end" if data.end is not None else f"now, step {data.steps[-1]}"
    return join([
        _say(text),
        element("h3", f"At the {end}" if data.end is not None else end.capitalize()),
        tables.gap_table(data, gaps_now(data)),
        element("details", element("summary", f"At the start, step {data.steps[0]}"),
                tables.gap_table(data, data.store.gaps_start), open=True),
    ])  # fmt: skip


def _health(page: Page) -> Html:
    text = (
        "The SAE was trained on another state of the model. FVU is the share of variance over probes that it misses; compare "
        "with its own start (dashed). Delta-FVU is the share of the window's change that it misses: above 1 (dashed) the "
        "features of that window must not be read. L0: active features per probe. Jaccard: overlap of the active features "
        "with those at the start."
    )
    found = figures_health.sae_health(page.data)
    caption = "SAE health, read at the last prompt token over all probes."
    return join([_say(f"{sae_sentence(page.data)} {text}"), page.figure("health", found, caption)])


def _formula(page: Page) -> Html:
    grid: Html | None = None
    if len(page.data.policy.lam_grid) > 1:
        found = figures_policy.lam_grid(page.data)
        grid = page.figure("lam", found, "Leave-one-out error of the policy over λ. Dashed: the λ that is used.")
    return join([page.for_behaviours(_formula_of), grid])


def _formula_of(page: Page, m: int) -> Html:
    data, policy = page.data, page.data.policy
    baseline = data.store.baseline.snapshot
    quality = policy.quality[m]
    text = format_policy(
        policy.features,
        policy.coef[:, m],
        float(policy.intercept[m]),
        policy.scale,
        behaviour=data.behaviours[m],
        target=policy.target,
        lam=policy.lam,
        r2=quality.r2,
        r2_loo=quality.r2_loo,
        edf=policy.edf,
        n=len(data.probes),
        labels={key: label.label or " ".join(map(token, label.promoted[:2])) for key, label in data.labels.items()},
        x_max=None if baseline is None else np.abs(baseline.x).max(axis=0),
    )
    return join([
        _say("The policy as distilled at the start. Its features, scales and λ stay fixed; every window refits the coefficients."),
        element("pre", text),
        _say("How well it predicts each category. RMSE is in the units of the behaviour; leave-one-out figures are on probes "
             "that the fit did not see. A dash: the category does not vary enough."),
        tables.quality_table(data, m),
    ])  # fmt: skip


def _cost(page: Page) -> Html:
    data = page.data
    seconds = sum(window.seconds for window in data.windows)
    typical = float(np.median([window.seconds for window in data.windows])) if data.windows else None
    text = f"Measuring took {fixed(seconds, 1)} s over {count(len(data.windows), 'window')}"
    text += f", {fixed(typical)} s in the median." if typical is not None else "."
    if data.end is not None and data.end.train_seconds > 0:
        share = data.end.seconds / data.end.train_seconds
        text += f" That is {percent(share)} of the {fixed(data.end.train_seconds, 1)} s that the run took, measuring included."
    if not data.windows:
        return _say(text)
    return join([_say(text), page.figure("cost", figures_health.cost_bars(data), "Wall time of each window's measurement.")])


def _check(page: Page) -> Html:
    command = f"smda verify {shlex.quote(str(page.data.store.path))}"
    text = (
        "Every number here comes from the run store. This command recomputes shifts, accounts and policy from the stored "
        "snapshots and compares them, without the model:"
    )
    return join([_say(text), element("pre", command)])


def _warning(data: RunData) -> Html | None:
    text = warning(data)
    return None if text is None else element("p", element("b", "Do not trust features here. "), text, class_="warning")


SECTIONS = (
    Section("summary", "Summary", "What the run did", _head),
    Section("behaviour", "Behaviour", "Behaviour per category", _behaviour),
    Section("policy", "Policy", "Policy over steps", _policy),
    Section("features", "Features", "Top features", _features),
    Section("waterfall", "Waterfall", "Behaviour change by feature", _waterfall),
    Section("gaps", "Gaps", "Gaps", _gaps),
    Section("health", "SAE health", "SAE health", _health),
    Section("formula", "Formula", "The policy as a formula", _formula),
    Section("cost", "Cost", "Cost", _cost),
    Section("check", "Check", "How to check", _check),
)
