"""The tables of a comparison, as HTML. Text that comes from a run is escaped on the way in."""

from __future__ import annotations

from collections.abc import Sequence

from smda_callbacks.records import Pair
from smda_callbacks.report.compare import Comparison
from smda_callbacks.report.compare_pairs import PairApart, PairComparison, PairIn
from smda_callbacks.report.compare_policy import FeatureApart, PathwayApart
from smda_callbacks.report.compare_runs import IDENTITY, ComparedRun, mismatch_line, value_at
from smda_callbacks.report.compare_series import Apart, Trajectory
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.markup import NONE, Html, count, element, fixed, join, number, percent, signed, table
from smda_callbacks.report.pair_ranking import text_cell

#: Rows of the tables of features and of pairs.
MOST_FEATURES, MOST_PAIRS = 200, 200


def runs_table(found: Comparison) -> Html:
    """Which letter is which run."""
    rows = []
    for run in found.runs:
        steps = f"{run.steps[0]} to {run.steps[-1]}" if run.steps else NONE
        cells = [run.source.given, run.manifest.get("run_id"), run.manifest.get("created"), steps, run.status]
        texts = (element("td", NONE if cell is None else cell) for cell in cells)
        rows.append(element("tr", element("th", run.name, scope="row"), *texts))
    return table(["run", "given as", "id", "created", "steps", "status"], rows)


def mismatch_warning(found: Comparison) -> Html | None:
    """What the runs do not share, where that was allowed."""
    if not found.mismatches:
        return None
    items = [element("li", mismatch_line(each)) for each in found.mismatches]
    head = "The runs do not share all that makes their numbers comparable:"
    return element("div", element("p", head), element("ul", *items), class_="warning")


def ends_table(found: Comparison, series: Sequence[Trajectory]) -> Html:
    """Start and end of every group and category in every run."""
    names = [run.name for run in found.runs]
    numeric = ["start", *(f"end {name}" for name in names), *_aparts(found)]
    rows = []
    for each in series:
        values = [each.values.get(name) for name in names]
        start = values[0][min(values[0])] if values[0] else None
        ends = [None if not value else value[max(value)] for value in values]
        title = f"all to {each.name}" if each.of == "group" else each.name
        cells = [element("th", title, scope="row"), element("td", each.expected or NONE)]
        cells += [_number(fixed(value, 3)) for value in (start, *ends)]
        cells += [cell for run in found.others for cell in _apart(each.at_end.get(run.name), 3)]
        rows.append(element("tr", *cells))
    return table(["probes", "expected", *numeric], rows, numeric)


def pathway_table(found: Comparison, pathways: Sequence[PathwayApart]) -> Html:
    """L2 norms over features of the shifts, and of their differences."""
    names = [run.name for run in found.runs]
    numeric = [*(f"shift {name}" for name in names), *_aparts(found)]
    rows = []
    for each in pathways:
        cells = [element("th", PART_NAMES.get(each.part, "all of it"), scope="row")]
        cells += [_number(number(each.norm[name])) for name in names]
        cells += [cell for run in found.others for cell in _apart(each.apart[run.name], 4, sign=False)]
        rows.append(element("tr", *cells))
    return table(["pathway (L2 norm over features)", *numeric], rows, numeric)


def feature_table(found: Comparison, features: Sequence[FeatureApart], run: str) -> Html:
    """Every feature: coefficients at the end, and the difference in shift by pathway."""
    reference = found.reference.name
    numeric = [f"end {reference}", f"end {run}", *PART_NAMES.values(), "all", "noise"]
    rows = []
    for each in features[:MOST_FEATURES]:
        apart = each.apart[run]
        cells = [element("th", each.title, scope="row")]
        cells += [_number(fixed(each.end[name], 4)) for name in (reference, run)]
        if apart is None:
            cells += [_number(NONE)] * (len(PART_NAMES) + 2)
        else:
            cells += [_apart(one, 4)[0] for one in apart.values()] + [_number(number(apart["total"].floor, 2))]
        rows.append(element("tr", *cells))
    shown = table(["feature", *numeric], rows, numeric)
    rest = len(features) - MOST_FEATURES
    more = element("p", f"{count(rest, 'further feature')}: smda compare --json lists all.", class_="quiet")
    return join([shown, more if rest > 0 else None])


def pairs_table(found: Comparison, pairs: PairComparison) -> Html:
    """Pairs that act in one run and not in another, the largest effect first."""
    names = [run.name for run in found.runs]
    columns = list(dict.fromkeys(name for each in pairs.differing for name in each.columns))[:3]
    numeric = [f"effect {name}" for name in names]
    head = [*(f"rows {name}" for name in names), *columns, *numeric, "acts in", "text"]
    rows = [_pair_row(each, names, columns) for each in pairs.differing[:MOST_PAIRS]]
    rest = len(pairs.differing) - MOST_PAIRS
    more = element("p", f"{count(rest, 'further pair')}: smda compare --json lists all.", class_="quiet")
    return join([element("div", table(head, rows, numeric), class_="tall"), more if rest > 0 else None])


def _pair_row(each: PairApart, names: Sequence[str], columns: Sequence[str]) -> Html:
    cells = [element("td", ", ".join(map(str, each.rows[name][:3])) or NONE, class_="tight") for name in names]
    cells += [element("td", each.columns.get(name, NONE)) for name in columns]
    cells += [_effect(each.runs[name]) for name in names]
    words = text_cell(Pair(0, (), "row", {}, each.text, 0))
    cells += [element("td", " ".join(each.acts_in)), element("td", words, class_="pairtext")]
    return element("tr", *cells)


def _effect(found: PairIn) -> Html:
    if found.effect is None:
        return _number(found.state, weak=True)
    return _number(signed(found.effect, 4), weak=found.state != "acts")


def cost_table(found: Comparison) -> Html:
    """What measuring cost in every run."""
    numeric = ["windows", "measuring (s)", "median window (s)", "attribution to pairs (s)", "whole run (s)", "share"]
    rows = []
    for name, cost in found.cost.items():
        seconds = (cost.measuring, cost.median, cost.attribution, cost.training)
        cells = [str(cost.windows), *(fixed(each, 2) for each in seconds), percent(cost.share)]
        rows.append(element("tr", element("th", name, scope="row"), *map(_number, cells)))
    return table(["run", *numeric], rows, numeric)


def settings_table(found: Comparison) -> Html:
    """Settings that differ, with the value in every run."""
    names = [run.name for run in found.runs]
    rows = [
        element("tr", element("th", name, scope="row"), *(element("td", _value(values[run])) for run in names))
        for name, values in found.settings.items()
    ]
    return table(["setting", *names], rows)


def summary_table(found: Comparison) -> Html:
    """The values by which W&B ranks runs."""
    names = [run.name for run in found.runs]
    rows = [
        element("tr", element("th", name, scope="row"), *(_number(number(values.get(run), 4)) for run in names))
        for name, values in found.summary.items()
    ]
    return table(["metric", *names], rows, names)


def short_hash(run: ComparedRun, what: str) -> Html:
    """The beginning of a hash that runs must share."""
    return element("code", str(value_at(run.manifest, IDENTITY[what]))[:10])


def _aparts(found: Comparison) -> list[str]:
    return [name for run in found.others for name in (f"{run.name} − {found.reference.name}", f"noise {run.name}")]


def _apart(found: Apart | None, decimals: int, *, sign: bool = True) -> list[Html]:
    """A difference, pale within the noise, and the noise."""
    if found is None:
        return [_number(NONE), _number(NONE)]
    text = signed(found.difference, decimals) if sign else fixed(found.difference, decimals)
    return [_number(text, weak=found.above_noise is False), _number(number(found.floor, 2))]


def _number(text: str, *, weak: bool = False) -> Html:
    return element("td", text, class_="number weak" if weak else "number")


def _value(value: object) -> str:
    return NONE if value is None else str(value)
