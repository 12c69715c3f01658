"""The sections of the report, in reading order. Each says in a sentence or two how to read it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from smda_callbacks.maths.formula import format_policy
from smda_callbacks.records import PairBook
from smda_callbacks.report import figures_behaviour, figures_health, figures_policy, tables, texts, texts_pairs
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors, gaps_now
from smda_callbacks.report.gap_pairs import pairs_behind_gaps
from smda_callbacks.report.head import head
from smda_callbacks.report.markup import Html, count, element, fixed, join, number, percent, token
from smda_callbacks.report.pairs_data import has_pairs, pair_data
from smda_callbacks.report.section import Page, Section, feature_warning, say, unreliable_note
from smda_callbacks.report.sections_groups import groups_section, interference_section
from smda_callbacks.report.sections_pairs import ledger_section, pairs_section
from smda_callbacks.report.shifts import FeatureShift, categories_above, feature_shifts
from smda_callbacks.report.verdict import sae_sentence
from smda_callbacks.report.waterfall import bars_by_feature, bars_by_row, most_changed

#: Features in the bar chart.
CHARTED = 15


def _summary(page: Page) -> Html:
    return page.for_behaviours(lambda page, m: head(page.data, m))


def _behaviour(page: Page) -> Html:
    return page.for_behaviours(_behaviour_of)


def _behaviour_of(page: Page, m: int) -> Html:
    data = page.data
    noise = texts.NO_FLOOR if data.noise is None else texts.BAND
    return join([
        say(texts.LINES, behaviour=data.behaviours[m]),
        page.figure(f"lines-{m}", figures_behaviour.category_lines(data, m), texts.LINES_CAPTION),
        say(texts.ARROWS, noise=noise),
        page.figure(f"arrows-{m}", figures_behaviour.change_arrows(data, m), texts.ARROWS_CAPTION),
    ])  # fmt: skip


def _policy(page: Page) -> Html:
    if not page.data.ok:
        return say(texts.NOTHING)
    trust = page.figure("trust", figures_policy.window_trust(page.data), texts.TRUST_CAPTION)
    return join([feature_warning(page.data), page.for_behaviours(_policy_of), say(texts.TRUST), trust])


def _policy_of(page: Page, m: int) -> Html:
    noise = texts.NO_FLOOR if page.data.noise is None else texts.DOTTED
    found = figures_policy.pathway_norms(page.data, m)
    return join([say(texts.PATHWAYS, noise=noise), page.figure(f"pathways-{m}", found, texts.PATHWAYS_CAPTION)])


def _features(page: Page) -> Html:
    return join([feature_warning(page.data), page.for_behaviours(_features_of)])


def _features_of(page: Page, m: int) -> Html:
    data = page.data
    shifts = feature_shifts(data, m)
    noise = texts.FEATURES_UNKNOWN
    if data.noise is not None:
        above = sum(each.any_above for each in shifts)
        features = count(len(shifts), "feature")
        noise = texts.FEATURES_ABOVE.format(above=above, features=features, unreliable=unreliable_note(data))
    said = say(texts.FEATURES, unit=data.unit, noise=noise)
    return join([said, _feature_chart(page, m, shifts), tables.feature_table(data, shifts)])


def _feature_chart(page: Page, m: int, shifts: list[FeatureShift]) -> Html | None:
    if not page.data.ok:
        return None
    found = figures_policy.feature_bars(page.data, shifts[:CHARTED])
    return page.figure(f"features-{m}", found, texts.FEATURES_CAPTION)


def _waterfall(page: Page) -> Html:
    if not page.data.ok:
        return say(texts.NOTHING)
    return join([feature_warning(page.data), page.for_behaviours(_waterfall_of)])


def _waterfall_of(page: Page, m: int) -> Html:
    data, chosen = page.data, most_changed(page.data, m)
    unit, floors = figures_behaviour.axis_title(data, m), behaviour_floors(data)
    for c in range(len(data.categories)):
        limit = 0.0 if floors is None else TIMES * float(floors[-1, c, m])
        for view, bars in (("feature", bars_by_feature(data, c, m)), ("row", bars_by_row(data, c, m))):
            page.figures[f"waterfall-{m}-{c}-{view}"] = figures_behaviour.waterfall(bars, unit, limit=limit)
    order = np.argsort(-np.abs(data.means[-1, :, m] - data.means[0, :, m]), kind="stable").tolist()
    categories = [_category_option(data, c, m, chosen) for c in order]
    views = [element("option", f"by {view}", value=view) for view in ("feature", "row")]
    controls = element(
        "p",
        element("label", "category ", element("select", *categories, data_part="category")),
        element("label", "view ", element("select", *views, data_part="view")),
        class_="controls",
    )
    place = page.place(f"waterfall-{m}-{chosen}-feature", texts.WATERFALL_CAPTION)
    chooser = element("div", controls, place, class_="chooser", data_prefix=f"waterfall-{m}")
    return join([say(texts.WATERFALL), chooser])


def _category_option(data: RunData, category: int, m: int, chosen: int) -> Html:
    start, end = (float(data.means[record, category, m]) for record in (0, -1))
    title = f"{figures_behaviour.category_title(data, category)}: {fixed(start)} → {fixed(end)}"
    title += "" if categories_above(data, m)[category] else ", not above noise"
    return element("option", title, value=category, selected=category == chosen)


def _gaps(page: Page) -> Html:
    data, pairs = page.data, pair_data(page.data)
    behind = None if pairs is None else pairs_behind_gaps(data, pairs)
    if data.audit:
        return join([say(texts.GAPS), say(texts_pairs.AUDIT_GAPS), tables.gap_table(data, gaps_now(data)), behind])
    now = "At the end" if data.end is not None else f"Now, step {data.steps[-1]}"
    start = element("summary", f"At the start, step {data.steps[0]}")
    return join([
        say(texts.GAPS),
        element("h3", now),
        tables.gap_table(data, gaps_now(data)),
        element("details", start, tables.gap_table(data, data.store.gaps_start), open=True),
        behind,
    ])  # fmt: skip


def _health(page: Page) -> Html:
    found = figures_health.sae_health(page.data)
    verdict = element("p", element("b", sae_sentence(page.data)))
    text = texts_pairs.AUDIT_HEALTH if page.data.audit else texts.HEALTH
    return join([verdict, say(text), page.figure("health", found, texts.HEALTH_CAPTION)])


def _formula(page: Page) -> Html:
    grid: Html | None = None
    if len(page.data.policy.lam_grid) > 1:
        grid = page.figure("lam", figures_policy.lam_grid(page.data), texts.LAM_CAPTION)
    return join([page.for_behaviours(_formula_of), grid])


def _formula_of(page: Page, m: int) -> Html:
    formula, quality = element("pre", _policy_text(page.data, m)), tables.quality_table(page.data, m)
    return join([say(texts.FORMULA), formula, say(texts.QUALITY), quality])


def _policy_text(data: RunData, m: int) -> str:
    policy, baseline = data.policy, data.store.baseline.snapshot
    return format_policy(
        policy.features,
        policy.coef[:, m],
        float(policy.intercept[m]),
        policy.scale,
        behaviour=data.behaviours[m],
        target=policy.target,
        lam=policy.lam,
        r2=policy.quality[m].r2,
        r2_loo=policy.quality[m].r2_loo,
        edf=policy.edf,
        n=len(data.probes),
        labels={key: each.label or " ".join(map(token, each.promoted[:2])) for key, each in data.labels.items()},
        x_max=None if baseline is None else np.abs(baseline.x).max(axis=0),
    )


def _cost(page: Page) -> Html:
    data = page.data
    if not data.windows:
        return say(texts.NOTHING)
    seconds = [window.seconds for window in data.windows]
    text = (
        f"Measuring took {fixed(sum(seconds), 1)} s over {count(len(seconds), 'window')}, "
        f"{fixed(float(np.median(seconds)))} s in the median."
    )
    if data.end is not None and data.end.train_seconds > 0:
        share = percent(data.end.seconds / data.end.train_seconds)
        text += f" That is {share} of the {fixed(data.end.train_seconds, 1)} s that the run took, measuring included."
    books = [(window.step, window.pairs) for window in data.windows if window.pairs is not None]
    return join(
        [
            element("p", text),
            element("p", _attribution_cost(books)) if books else None,
            page.figure("cost", figures_health.cost_bars(data), texts.COST_CAPTION),
        ]
    )


def _attribution_cost(books: Sequence[tuple[int, PairBook]]) -> str:
    """What attributing pairs took, and how far its parts are from what really happened."""
    step, worst = max(books, key=lambda each: each[1].update_error)
    captured = max(book.capture_error for _, book in books)
    return (
        f"Attributing {count(len(books), 'window')} to pairs took {fixed(sum(book.seconds for _, book in books), 1)} s "
        "of it, the readings with gradients included; gradients of single pairs held at most "
        f"{fixed(max(book.held_bytes for _, book in books) / 2**20, 1)} MiB. Their sum differs from the optimizer's "
        f"gradient by at most {number(captured, 2)} of it, and the parts of an update miss at most "
        f"{number(worst.update_error, 2)} of it (step {step}; large where AdamW divides tiny gradients by themselves)."
    )


def _check(page: Page) -> Html:
    return join([say(texts.CHECK), element("pre", f"smda verify {shlex.quote(str(page.data.store.path))}")])


def _over_time(data: RunData) -> bool:
    """Not in an audit, whose windows all start from the same model."""
    return not data.audit


def _has_ledger(data: RunData) -> bool:
    return has_pairs(data) and not data.audit


SECTIONS = (
    Section("summary", "Summary", "What the run did", _summary),
    Section("behaviour", "Behaviour", "Behaviour per category", _behaviour, _over_time),
    Section("policy", "Policy", "Policy over steps", _policy, _over_time),
    Section("features", "Features", "Top features", _features, _over_time),
    Section("waterfall", "Waterfall", "Behaviour change by feature", _waterfall, _over_time),
    Section("pairs", "Pairs", "Training pairs", pairs_section, has_pairs),
    Section("groups", "Groups", "Groups of pairs", groups_section, has_pairs),
    Section("interference", "Interference", "Interference", interference_section, has_pairs),
    Section("ledger", "Ledger", "The ledger of shares", ledger_section, _has_ledger),
    Section("gaps", "Gaps", "Gaps", _gaps),
    Section("health", "SAE health", "SAE health", _health),
    Section("formula", "Formula", "The policy as a formula", _formula),
    Section("cost", "Cost", "Cost", _cost, _over_time),
    Section("check", "Check", "How to check", _check),
)


def sections_of(data: RunData) -> list[Section]:
    """Those sections that a run has, in reading order."""
    return [each for each in SECTIONS if each.applies(data)]
