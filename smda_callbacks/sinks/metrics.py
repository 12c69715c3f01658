"""The one table of metric names: what a tracker is sent, what each number means, and how it comes from the records.

Whatever reads or writes a metric takes its name from here. Names have no dots (W&B takes a dot for a path separator)
and no wildcards. A number that is missing or not finite is left out of a row, never replaced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smda_callbacks.records import RunStart, WindowRecord
from smda_callbacks.sinks import metric_values as values
from smda_callbacks.sinks import pair_values
from smda_callbacks.sinks.metric_axes import AXES, names_of
from smda_callbacks.sinks.metric_values import Reading
from smda_callbacks.sinks.noise_in_force import in_force

#: The x axis of every metric, as the Hugging Face trainer names it.
STEP = "train/global_step"

#: Alone in a row, an alert outside a window; and what every window's row has.
ALERTS, UNREADABLE = "smda/alerts/count", "smda/run/unreadable"

BEHAVIOUR = "Behaviour by group and category"
POLICY = "Policy and pathways"
PAIRS = "Training pairs, in windows that are attributed to them"
NOISE = "Reliability and noise"
HEALTH = "SAE health"
COST = "Cost"
AT_END = "Summary, once at the end"

#: In reading order.
SECTIONS = (BEHAVIOUR, POLICY, PAIRS, NOISE, HEALTH, COST, AT_END)

_BEHAVIOUR_UNIT, _COEF_UNIT, _SHARE = "behaviour", "coefficient", "share in [0, 1]"


@dataclass(frozen=True)
class Metric:
    """One line of the table.

    ``pattern``: the name, with axes in braces (metric_axes.AXES). ``compute``: its numbers over these axes, in their
    order. ``known``: whether a run has the metric at all; in a single row it may be missing all the same.
    """

    pattern: str
    section: str
    unit: str
    meaning: str
    compute: Callable[[Reading], Any]
    known: Callable[[RunStart], bool] = lambda start: True


def _of_health(name: str) -> Callable[[Reading], float | None]:
    return lambda r: None if r.window.health is None else getattr(r.window.health, name)


def _has_noise(start: RunStart) -> bool:
    return start.noise is not None


def _at_start(compute: Callable[[Reading], Any]) -> Callable[[Reading], Any]:
    return lambda r: compute(Reading(r.start.baseline, r.start))


METRICS: tuple[Metric, ...] = (
    Metric("smda/{behaviour}_group/{group}", BEHAVIOUR, _BEHAVIOUR_UNIT,
           "mean over the probes of the group", values.group_means),
    Metric("smda/{behaviour}/{category}", BEHAVIOUR, _BEHAVIOUR_UNIT,
           "mean over the probes of the category", values.category_means),
    Metric("smda/{behaviour}_change/{category}", BEHAVIOUR, _BEHAVIOUR_UNIT,
           "change of that mean since the start", values.category_changes),
    Metric(ALERTS, BEHAVIOUR, "alerts",
           "alerts raised in the window; an alert outside a window has a row of its own",
           lambda r: len(r.window.alerts)),
    Metric("smda/{behaviour}_account_{group}/{row}", POLICY, _BEHAVIOUR_UNIT,
           "part of the change of the group's mean in the window; the rows sum to the change",
           values.group_account, values.categories_are_pure),
    Metric("smda/pathways/{part}{further}", POLICY, _COEF_UNIT,
           "L2 norm over features of this part of the window's shift", values.shift_norms),
    Metric("smda/pathways/total{further}", POLICY, _COEF_UNIT,
           "L2 norm of the window's whole shift", values.shift_norm),
    Metric("smda/pathways/cumulative_{part}{further}", POLICY, _COEF_UNIT,
           "L2 norm of this part summed over all windows since the start", values.total_norms),
    Metric("smda/pathways/cumulative{further}", POLICY, _COEF_UNIT,
           "L2 norm of the coefficients' change since the start", values.coef_norm),
    Metric("smda/pathways/first_order_error", POLICY, "relative to the exact shift",
           "how far the first-order shift is from the exact one", lambda r: r.window.first_order_error),
    Metric("smda/policy/r2{further}", POLICY, "R²", "fit of the window's policy, in sample", values.r2),
    Metric("smda/policy/r2_loo{further}", POLICY, "R²", "the same, leave-one-out", values.r2_loo),
    Metric("smda/{behaviour}_ledger_refuse/{line}", PAIRS, _BEHAVIOUR_UNIT,
           "line of the ledger of the mean over the probes to refuse", pair_values.ledger, pair_values.has_ledger),
    Metric("smda/pairs/count", PAIRS, "pairs", "pairs that the window was trained on",
           pair_values.of_book(lambda book: len(book.ids)), pair_values.attributes),
    Metric("smda/pairs/flagged", PAIRS, "pairs",
           "those whose largest effect on a coefficient is unintended, and more than twice its noise floor",
           pair_values.flagged, pair_values.attributes),
    Metric("smda/pairs/capture_error", PAIRS, "relative",
           "difference between the sum of the pairs' gradients and the optimizer's gradient",
           pair_values.of_book(lambda book: book.capture_error), pair_values.attributes),
    Metric("smda/pairs/update_error", PAIRS, "share of the update",
           "weight update that its parts miss; large on ill-conditioned bf16 steps",
           pair_values.of_book(lambda book: book.update_error), pair_values.attributes),
    Metric("smda/reliability/{part}", NOISE, "correlation",
           "of this part of the shift between two halves of the probes, over features", values.reliability),
    Metric("smda/reliability/above_floor_{part}{further}", NOISE, _SHARE,
           "features whose shift is more than twice its noise floor", values.features_above_floor, _has_noise),
    Metric("smda/reliability/above_floor_categories{further}", NOISE, _SHARE,
           "categories whose change in the window is more than twice its noise floor",
           values.categories_above_floor, _has_noise),
    Metric("smda/reliability/update_rms", NOISE, "weight",
           "root mean square change per trained weight over the window",
           lambda r: r.window.update_rms if r.window.status == "ok" else None),
    Metric("smda/sae/fvu", HEALTH, "share of variance",
           "variance over probes that the SAE's reconstruction misses", _of_health("fvu")),
    Metric("smda/sae/delta_fvu", HEALTH, "share of the change",
           "what the SAE misses of the change since the last snapshot; above 1 is as good as nothing",
           _of_health("delta_fvu")),
    Metric("smda/sae/delta_fvu_magnitude", HEALTH, "share of the change",
           "the same at fixed gates", _of_health("delta_fvu_magnitude")),
    Metric("smda/sae/l0", HEALTH, "features", "mean number of active features", _of_health("l0")),
    Metric("smda/sae/jaccard", HEALTH, _SHARE,
           "mean overlap of the active features with those at the start", _of_health("jaccard")),
    Metric("smda/cost/seconds", COST, "s", "wall time of the measurement", lambda r: r.window.seconds),
    Metric("smda/cost/attribution_seconds", COST, "s", "wall time of the attribution, beside the measurement's",
           pair_values.of_book(lambda book: book.seconds), pair_values.attributes),
    Metric("smda/run/skipped_steps", COST, "steps",
           "optimizer steps of the window that the optimizer skipped", lambda r: len(r.window.skipped)),
    Metric(UNREADABLE, COST, "0 or 1",
           "1 where the window could not be measured; the next one spans it",
           lambda r: float(r.window.status != "ok")),
)  # fmt: skip

#: Values of the whole run, by which runs are ranked; the window they are computed from is the last ok one.
SUMMARY: tuple[Metric, ...] = (
    Metric("smda/summary/{behaviour}_{group}_start", AT_END, _BEHAVIOUR_UNIT,
           "mean over the probes of the group at the start", _at_start(values.group_means)),
    Metric("smda/summary/{behaviour}_{group}_end", AT_END, _BEHAVIOUR_UNIT, "the same at the end", values.group_means),
    Metric("smda/summary/{behaviour}_worst_drop", AT_END, _BEHAVIOUR_UNIT,
           "largest fall of a category to refuse, start to end; negative if all rose", values.worst_drop),
    Metric("smda/summary/{behaviour}_worst_rise", AT_END, _BEHAVIOUR_UNIT,
           "largest rise of a category to comply with, start to end; negative if all fell", values.worst_rise),
    Metric("smda/summary/total_{part}{further}", AT_END, _COEF_UNIT,
           "L2 norm over features of this part summed over the run", values.total_norms),
    Metric("smda/summary/total{further}", AT_END, _COEF_UNIT,
           "L2 norm of the coefficients' change, start to end", values.coef_norm),
    Metric("smda/summary/{behaviour}_unexplained", AT_END, "relative to what was measured",
           "what the ledger leaves unexplained of the change of the probes to refuse, over the attributed windows",
           pair_values.unexplained, pair_values.has_ledger),
    Metric("smda/summary/pairs_flagged", AT_END, "pairs",
           "pairs whose largest effect on a coefficient, over the run, is unintended and above twice its noise floor",
           pair_values.of_run(lambda table: float(table.flagged.sum())), pair_values.attributes),
    Metric("smda/summary/top_interfering_row", AT_END, "row of the data set",
           "the flagged pair with the largest share of its effect on unintended features",
           pair_values.of_run(pair_values.top_interfering), pair_values.attributes),
    Metric("smda/summary/attributed_windows", AT_END, "windows", "windows that were attributed to pairs",
           pair_values.attributed_windows, pair_values.attributes),
)  # fmt: skip


def metric_names(start: RunStart) -> list[str]:
    """The exact names of all metrics that a run can log, in reading order.

    In the names of behaviours and categories, what is not a letter, a digit, ``_`` or ``-`` becomes ``_``. Raises
    ValueError where two metrics would get one name.
    """
    names = [name for metric in METRICS if metric.known(start) for name in names_of(metric.pattern, start)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"two metrics would be called {twice[0]!r}; every name must be used once. Rename the behaviour or the "
            f"category behind it; behaviours are {', '.join(start.policy.behaviours)}."
        )
    return names


def rows_of_window(window: WindowRecord, start: RunStart, progress: values.Progress | None = None) -> dict[str, float]:
    """All metrics of a window, by name; the baseline is a window too.

    ``progress``: what the run has come to at this window; without it the cumulative norms of the parts are left out,
    and the noise floor is the window's own or that of the start.
    """
    if progress is None:
        return _row(METRICS, Reading(window, start, noise=in_force(start.noise, window)))
    return _row(METRICS, Reading(window, start, progress.total, noise=progress.noise))


def summary_of_run(start: RunStart, windows: Iterable[WindowRecord]) -> dict[str, float]:
    """The values by which runs are ranked, by name (:data:`SUMMARY`)."""
    progress = values.progress_of(start, windows)
    return summary_of_progress(start, progress)


def summary_of_progress(start: RunStart, progress: values.Progress) -> dict[str, float]:
    """The same as :func:`summary_of_run` from running sums, for a writer that does not keep the windows."""
    return _row(SUMMARY, Reading(progress.last, start, progress.total, progress.pair_table, progress.noise))


def markdown_table() -> str:
    """The table for the README: one section after another, then what the braces and the units mean."""
    lines = []
    for section in SECTIONS:
        lines += [f"**{section}**", "", "| name | unit | meaning |", "|---|---|---|"]
        found = [metric for metric in (*METRICS, *SUMMARY) if metric.section == section]
        lines += [f"| `{metric.pattern}` | {metric.unit} | {metric.meaning} |" for metric in found] + [""]
    lines += [f"- `{{{name}}}`: {axis.meaning}" for name, axis in AXES.items()]
    lines += [
        f"- unit *{_BEHAVIOUR_UNIT}*: probability, or logit where the policy's target is the logit",
        f"- unit *{_COEF_UNIT}*: behaviour units per standard deviation of the feature at distillation",
        f"- x axis of all: `{STEP}`",
    ]
    return "\n".join(lines) + "\n"


def _row(metrics: Iterable[Metric], reading: Reading) -> dict[str, float]:
    row: dict[str, float] = {}
    for metric in metrics:
        found = metric.compute(reading) if metric.known(reading.start) else None
        if found is not None:
            numbers = np.asarray(found, dtype=np.float64).ravel().tolist()
            named = zip(names_of(metric.pattern, reading.start), numbers, strict=True)
            row |= {name: number for name, number in named if np.isfinite(number)}
    return row
