"""The report's tables, as HTML. Text that comes from a run is escaped on the way in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smda_callbacks.records import PATHWAYS, FeatureLabel
from smda_callbacks.report.data import RunData
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.markup import NONE, Html, count, element, fixed, join, number, percent, signed, table, token
from smda_callbacks.report.shifts import FeatureShift, feature_name

#: Rows of the feature table that are shown at once, and at all.
SHOWN, MOST = 20, 200

_SIGNS = {"low": "▼ low", "over-refusal": "▲ over-refusal", "fragile": "◆ fragile"}


def feature_table(data: RunData, shifts: Sequence[FeatureShift]) -> Html:
    """Features with their shifts, those above the noise floor strongly; further ones folded away."""
    strong = [each for each in shifts if each.any_above][:SHOWN]
    shown = strong or list(shifts[:5])
    rest = [each for each in shifts if each not in shown]
    first = _feature_rows(data, shown)
    if not rest:
        return first
    listed = rest[: MOST - len(shown)]
    title = f"{count(len(rest), 'further feature')}, not above noise or with a smaller shift"
    if len(listed) < len(rest):
        title += f"; the first {len(listed)} are listed, all are in tables/features.parquet"
    return join([first, element("details", element("summary", title), _feature_rows(data, listed))])


def _feature_rows(data: RunData, shifts: Iterable[FeatureShift]) -> Html:
    numeric = ["start", "end", *(PART_NAMES[part] for part in PATHWAYS), "sum"]
    head = ["feature", "label, promoted tokens", "most active probes", *numeric]
    return table(head, [_feature_row(data, each) for each in shifts], numeric)


def _feature_row(data: RunData, shift: FeatureShift) -> Html:
    label = data.labels.get(shift.feature)
    cells = [
        element("th", _feature_link(shift.feature, label), scope="row"),
        element("td", *_label_cell(label)),
        element("td", _probes_cell(data, label), class_="probes"),
        *(_number_cell(fixed(value, 4)) for value in (shift.start, shift.end)),
        *(_number_cell(signed(shift.shifts[part], 4), weak=not shift.above.get(part, True)) for part in PATHWAYS),
        _number_cell(signed(shift.total, 4), weak=not shift.any_above),
    ]
    return element("tr", *cells, class_=None if shift.any_above else "weak")


def _feature_link(feature: int, label: FeatureLabel | None) -> Html:
    url = label.url if label is not None else None
    if url is None or not url.startswith(("https://", "http://")):
        return element("span", feature)
    return element("a", feature, href=url, rel="noopener noreferrer", target="_blank")


def _label_cell(label: FeatureLabel | None) -> list[Html]:
    if label is None:
        return [Html(NONE)]
    cells = [element("div", label.label)] if label.label else []
    if label.promoted:
        suppressed = element("div", element("span", "suppressed: ", class_="quiet"), _chips(label.suppressed))
        cells.append(element("details", element("summary", _chips(label.promoted)), suppressed, class_="tokens"))
    return cells or [Html(NONE)]


def _chips(tokens: Iterable[str]) -> Html:
    return join((element("code", token(each)) for each in tokens), " ")


def _probes_cell(data: RunData, label: FeatureLabel | None) -> Html:
    texts = {probe.id: probe for probe in data.probes}
    found = [(texts[name], value) for name, value in (label.top_probes if label else ()) if name in texts]
    if not found:
        return Html(NONE)
    lines = [
        element("li", element("b", probe.category), " ", probe.text, " ", element("i", number(value)))
        for probe, value in found
    ]
    first = element("summary", element("b", found[0][0].category), " ", found[0][0].text)
    return element("details", first, element("ol", *lines))


def gap_table(data: RunData, gaps: Iterable[Mapping[str, Any]]) -> Html:
    """One row per category, gaps marked; worst first, as they come."""
    numbers = ["n", "mean", "predicted", "residual", "shortfall"]
    head = ["category", "expected", *numbers, "gap", "pulling away", "unshared"]
    return table(head, [_gap_row(data, gap) for gap in gaps], {*numbers, "unshared"})


def _gap_row(data: RunData, gap: Mapping[str, Any]) -> Html:
    numbers = [fixed(gap["mean"]), fixed(gap["predicted"]), signed(gap["residual"]), fixed(gap["shortfall"])]
    pulling = [
        element("div", feature_name(data, int(feature)), " ", element("i", signed(value, 3)))
        for feature, value in gap["pulling"]
    ]
    cells = [
        element("th", gap["category"], scope="row"),
        element("td", gap["expected"]),
        _number_cell(str(gap["n_probes"])),
        *(_number_cell(text) for text in numbers),
        element("td", element("b", _SIGNS.get(gap["reason"])) if gap["is_gap"] else NONE, class_="tight"),
        element("td", _folded(pulling), class_="tight"),
        _number_cell(percent(gap["unshared"])),
    ]
    return element("tr", *cells, class_="gap" if gap["is_gap"] else None)


def _folded(items: Sequence[Html]) -> Html:
    """Items of which all but the first are folded away."""
    if not items:
        return Html(NONE)
    if len(items) == 1:
        return items[0]
    more = element("span", f" +{len(items) - 1}", class_="quiet")
    return element("details", element("summary", items[0], more), *items[1:])


def quality_table(data: RunData, behaviour: int) -> Html:
    """How well the policy fits each category at distillation."""
    head = ["category", "expected", "mean", "predicted", "RMSE", "RMSE leave-one-out", "R²", "R² leave-one-out"]
    rows = []
    for name, figures in data.policy.quality[behaviour].by_category.items():
        keys = ("mean", "predicted", "rmse", "rmse_loo", "r2", "r2_loo")
        cells = [_number_cell(fixed(figures.get(key))) for key in keys]
        expected = element("td", data.expected.get(name, NONE))
        rows.append(element("tr", element("th", name, scope="row"), expected, *cells))
    return table(head, rows, head[2:])


def alert_list(data: RunData, shown: int = 8) -> Html:
    """Alerts by step; all but the first few folded away."""
    if not data.alerts:
        return element("p", "No alerts.")
    noun = "measurement" if data.audit else "step"
    items = [
        element("li", element("b", noun, " ", alert.step), " ", element("code", alert.kind), " ", alert.message)
        for alert in data.alerts
    ]
    first = element("ul", *items[:shown], class_="alerts")
    if len(items) <= shown:
        return first
    more = element("summary", count(len(items) - shown, "further alert"))
    return join([first, element("details", more, element("ul", *items[shown:], class_="alerts"))])


def unbooked_list(data: RunData) -> Html | None:
    """Windows that were not booked, with their reason; None if there are none."""
    noun = "measurement" if data.audit else "step"
    items = [
        element(
            "li", element("b", f"{noun} {window.step}"), " ", element("code", window.status), " ", window.error or ""
        )
        for window in data.windows
        if window.status != "ok"
    ]
    if not items:
        return None
    title = f"{count(len(items), 'measurement' if data.audit else 'window')} not booked"
    return element("details", element("summary", title), element("ul", *items, class_="alerts"))


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """A list of names and values."""
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs))


def _number_cell(text: str, *, weak: bool = False) -> Html:
    return element("td", text, class_="number weak" if weak else "number")
