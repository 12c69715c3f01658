"""A comparison of runs in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.output import Screen, change, count, number, show_table, styled

if TYPE_CHECKING:
    from smda_callbacks.report.compare import Comparison
    from smda_callbacks.report.compare_pairs import PairApart, PairIn
    from smda_callbacks.report.compare_policy import FeatureApart
    from smda_callbacks.report.compare_series import Apart

#: Steps of a trajectory, settings, and characters of a setting's value that are shown.
STEPS, SETTINGS, SETTING = 8, 8, 30


def show_comparison(out: Screen, found: Comparison, top: int) -> None:
    """Everything, ``top`` rows of each table."""
    from smda_callbacks.report.compare_text import sentences

    show_runs(out, found)
    for sentence in sentences(found):
        out.item(sentence, mark="•")
    out.say()
    for behaviour in found.behaviours:
        show_course(out, found, behaviour)
        show_categories(out, found, behaviour, top)
        show_policy(out, found, behaviour, top)
    show_pairs(out, found, top)
    show_summary(out, found, top)
    show_cost(out, found)


def show_runs(out: Screen, found: Comparison) -> None:
    """Which letter is which run, what they do not share, and in what settings they differ."""
    for run in found.runs:
        steps = f"steps {run.steps[0]} to {run.steps[-1]}" if run.steps else "no steps"
        out.lines(f"{run.name}  {run.source.given}  (run {run.manifest.get('run_id')}, {steps}, {run.status})")
    if found.mismatches:
        from smda_callbacks.report.compare_runs import mismatch_line

        out.say("The runs do not share all that makes numbers comparable:", "bold yellow")
        for each in found.mismatches:
            out.item(mismatch_line(each), "yellow", mark="!")
    if found.settings:
        names = [run.name for run in found.runs]
        rows = [(name, *(_setting(values[run]) for run in names)) for name, values in found.settings.items()]
        more = len(rows) - SETTINGS
        caption = f"and {count(more, 'further setting')}; --json and --html list all" if more > 0 else None
        show_table(out, "Settings that differ", ["setting", *names], rows[:SETTINGS], caption=caption)
    else:
        out.say("No recorded setting differs; what data a run was given is not recorded.")


def show_course(out: Screen, found: Comparison, behaviour: str) -> None:
    """The mean over the probes to refuse at some of the common steps."""
    for each in found.trajectories:
        if (each.behaviour, each.of, each.name) == (behaviour, "group", "refuse") and found.alignment.common:
            break
    else:
        return
    names = [run.name for run in found.runs]
    steps = _some(found.alignment.common, STEPS)
    rows = []
    for step in steps:
        values = [each.values.get(name, {}).get(step) for name in names]
        apart = [_minus(value, values[0]) for value in values[1:]]
        rows.append((step, *(number(value) for value in values), *(_change(value) for value in apart)))
    title = f"{behaviour.capitalize()} on probes to refuse"
    show_table(out, title, ["#step", *(f"#{name}" for name in names), *_against(found)], rows)


def show_categories(out: Screen, found: Comparison, behaviour: str, top: int) -> None:
    """Groups, and the categories that came out furthest apart."""
    series = [each for each in found.trajectories if each.behaviour == behaviour]
    groups = [each for each in series if each.of == "group"]
    others = sorted((each for each in series if each.of == "category"), key=lambda each: -each.largest)
    names = [run.name for run in found.runs]
    rows = []
    for each in (*groups, *others[:top]):
        title = f"all to {each.name}" if each.of == "group" else each.name
        ends = [number(_last(each.values.get(name))) for name in names]
        start = number(_first(each.values.get(names[0])))
        aparts = [cell for run in found.others for cell in _apart_cells(each.at_end.get(run.name), 3)]
        rows.append((title, each.expected, start, *ends, *aparts))
    columns = ["probes", "expected", "#start", *(f"#end {name}" for name in names)]
    columns += [name for run in found.others for name in (f"#{run.name} − {found.reference.name}", "#noise")]
    title = f"{behaviour.capitalize()} at the end of each run ({found.reference.target})"
    rest = len(others) - top
    caption = f"and {count(rest, 'category', 'categories')} with smaller differences" if rest > 0 else None
    show_table(out, title, columns, rows, caption=caption)


def show_policy(out: Screen, found: Comparison, behaviour: str, top: int) -> None:
    """The difference in policy: by pathway, then by feature."""
    if found.features is None or found.pathways is None:
        return
    from smda_callbacks.report.figures import PART_NAMES

    names, reference = [run.name for run in found.runs], found.reference.name
    unit = f"{found.reference.target} per standard deviation"
    rows = []
    for way in (each for each in found.pathways if each.behaviour == behaviour):
        aparts = [cell for run in found.others for cell in _apart_cells(way.apart[run.name], 4, sign=False)]
        rows.append((PART_NAMES.get(way.part, "all of it"), *(number(way.norm[name], 4) for name in names), *aparts))
    columns = ["pathway", *(f"#shift {name}" for name in names)]
    columns += [name for run in found.others for name in (f"#{run.name} − {reference}", "#noise")]
    show_table(out, f"Shift of the policy over each run, as L2 norms over features ({unit})", columns, rows)
    features = [each for each in found.features if each.behaviour == behaviour]
    for run in found.others:
        rows = [_feature_row(each, reference, run.name) for each in features[:top]]
        columns = ["feature", f"#end {reference}", f"#end {run.name}", *(f"#{part}" for part in PART_NAMES.values())]
        title = f"Features whose shift differs most, {run.name} − {reference} ({unit})"
        rest = len(features) - top
        caption = "Pale: below twice its noise." + (f" And {count(rest, 'further feature')}." if rest > 0 else "")
        show_table(out, title, [*columns, "#all", "#noise"], rows, caption=caption)


def show_pairs(out: Screen, found: Comparison, top: int) -> None:
    """Pairs that act in one run and not in another."""
    pairs = found.pairs
    if pairs is None or not pairs.differing:
        return  # the sentences say so
    names = [run.name for run in found.runs]
    column = next((name for each in pairs.differing for name in each.columns), None)
    head = [*(f"#rows {name}" for name in names), *([column] if column else []), *(f"#effect {name}" for name in names)]
    rows = [_pair_row(each, names, column) for each in pairs.differing[:top]]
    shown = f"{len(rows)} of {len(pairs.differing)}" if len(rows) < len(pairs.differing) else str(len(rows))
    title = f"Pairs that act in one run and not in another: {shown}, by their effect on {pairs.functional}"
    caption = "Acts: above twice its noise floor. Pale: trained on, below it."
    show_table(out, title, [*head, "acts in", "text"], rows, caption=caption)


def show_summary(out: Screen, found: Comparison, top: int) -> None:
    """The values by which runs are ranked, where there is little else to show."""
    if all(run.data is not None for run in found.runs) or not found.summary:
        return
    names = [run.name for run in found.runs]
    rows = [(name, *(number(values.get(run), 4) for run in names)) for name, values in found.summary.items()]
    show_table(out, "Summary", ["metric", *(f"#{name}" for name in names)], rows[: 2 * top])


def show_cost(out: Screen, found: Comparison) -> None:
    """What measuring cost."""
    rows = []
    for name, cost in found.cost.items():
        share = None if cost.share is None else f"{100 * cost.share:.0f} %"
        seconds = [number(each, 2) for each in (cost.measuring, cost.median, cost.attribution, cost.training)]
        rows.append((name, cost.windows, *seconds, share))
    columns = ["run", "#windows", "#measuring s", "#median s", "#pairs s", "#whole run s", "#share"]
    caption = "share: of the whole run, measuring included. Pairs: attribution, capturing gradients included."
    show_table(out, "Cost of measuring", columns, rows, caption=caption)


def _feature_row(each: FeatureApart, reference: str, run: str) -> tuple[object, ...]:
    apart = each.apart[run]
    ends = [number(each.end[name], 4) for name in (reference, run)]
    if apart is None:
        missing = "not in policy " + " and ".join(name for name in (reference, run) if each.end[name] is None)
        return (f"{each.title}: {missing}", *ends, None, None, None, None, None)
    total = apart["total"]
    return (each.title, *ends, *(_apart(one, 4) for one in apart.values()), number(total.floor, 4))


def _pair_row(each: PairApart, names: Sequence[str], column: str | None) -> list[Any]:
    rows = [", ".join(map(str, each.rows[name][:3])) or None for name in names]
    named = [each.columns.get(column)] if column else []
    effects = [_effect(each.runs[name]) for name in names]
    return [*rows, *named, *effects, " ".join(each.acts_in), _cut(each.text, 34)]


def _effect(found: PairIn) -> object:
    if found.effect is None:
        return styled(found.state, "dim")
    return change(found.effect, 4) if found.state == "acts" else styled(change(found.effect, 4), "dim")


def _apart_cells(found: Apart | None, digits: int, *, sign: bool = True) -> list[object]:
    if found is None:
        return [None, None]
    shown = _apart(found, digits) if sign else _toned(number(found.difference, digits), found)
    return [shown, number(found.floor, 4)]


def _apart(found: Apart, digits: int) -> object:
    return _toned(change(found.difference, digits), found)


def _toned(text: str, found: Apart) -> object:
    return styled(text, "dim") if found.above_noise is False else text


def _against(found: Comparison) -> list[str]:
    return [f"#{run.name} − {found.reference.name}" for run in found.others]


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _change(value: float | None) -> str | None:
    return None if value is None else change(value)


def _first(values: Mapping[int, float] | None) -> float | None:
    return values[min(values)] if values else None


def _last(values: Mapping[int, float] | None) -> float | None:
    return values[max(values)] if values else None


def _some(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def _setting(value: Any) -> str | None:
    return None if value is None else _cut(str(value), SETTING)


def _cut(text: str | None, most: int) -> str | None:
    words = " ".join((text or "").split())
    return (words if len(words) <= most else words[: most - 1].rstrip() + "…") or None
