"""How the behaviour went in every run of a comparison, step by step, and how far apart the runs came out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor, total_floor
from smda_callbacks.report.compare_runs import ComparedRun
from smda_callbacks.report.data import TIMES, RunData, behaviour_floors
from smda_callbacks.sinks.metric_axes import names_of, slugs
from smda_callbacks.sinks.metric_values import group_weights

Of = Literal["group", "category"]

_PATTERNS: Mapping[Of, str] = {"group": "smda/{behaviour}_group/{group}", "category": "smda/{behaviour}/{category}"}


@dataclass(frozen=True)
class Series:
    """Mean behaviour over a group or a category of probes in one run.

    ``floor``: step -> noise floor of the change since the start; empty where it was not measured.
    """

    behaviour: str
    of: Of
    name: str
    expected: str | None  # None where it is not known
    values: Mapping[int, float]  # by step
    floor: Mapping[int, float]


@dataclass(frozen=True)
class Apart:
    """How far a run is from the reference. ``above_noise``: beyond twice the floor, None where that is not known."""

    difference: float
    floor: float | None
    above_noise: bool | None


@dataclass(frozen=True)
class Trajectory:
    """One group or category in all runs that have it.

    ``at_end``: run -> apart from the reference, the end of each against the end; ``at_common``: at the last step that
    all runs share, None where they share none or the run lacks the series.
    """

    metric: str
    behaviour: str
    of: Of
    name: str
    expected: str | None
    values: Mapping[str, Mapping[int, float]]  # run -> step -> mean
    at_end: Mapping[str, Apart | None]
    at_common: Mapping[str, Apart | None]

    @property
    def largest(self) -> float:
        """Size of the largest difference at the end; below 0 where there is none."""
        return max((abs(one.difference) for one in self.at_end.values() if one is not None), default=-1.0)


@dataclass(frozen=True)
class Alignment:
    """On which optimizer steps the runs can be compared."""

    common: tuple[int, ...]
    last: Mapping[str, int]  # run -> last step
    text: str

    @property
    def same_end(self) -> bool:
        """Whether all runs end at the same step."""
        return len(set(self.last.values())) == 1


def align(runs: Sequence[ComparedRun]) -> Alignment:
    """The steps that all runs share, and in words how they are compared."""
    common = sorted(set.intersection(*(set(run.steps) for run in runs)))
    last = {run.name: run.steps[-1] if run.steps else 0 for run in runs}
    if all(run.steps == runs[0].steps for run in runs):
        text = f"The runs were read at the same {len(common)} steps, {common[0]} to {common[-1]}." if common else ""
        return Alignment(tuple(common), last, text or "No run was read at any step.")
    shared = f"{len(common)} steps are shared, the last is {common[-1]}" if common else "no step is shared"
    if len(set(last.values())) == 1:
        return Alignment(tuple(common), last, f"The runs were read at different steps; {shared}, and all end there.")
    ends = ", ".join(f"{name} at step {step}" for name, step in last.items())
    return Alignment(tuple(common), last, f"The runs end apart ({ends}); {shared}. The end is held against the end.")


def trajectories(runs: Sequence[ComparedRun], behaviours: Sequence[str], last_common: int | None) -> list[Trajectory]:
    """Groups first, then categories, in the order of the first run that has them. The first run is the reference."""
    found = {run.name: series_of(run) for run in runs}
    names = dict.fromkeys(metric for series in found.values() for metric in series)
    rows = []
    for metric in names:
        series = {name: each[metric] for name, each in found.items() if metric in each}
        some = next(iter(series.values()))
        if some.behaviour in behaviours:
            rows.append(_trajectory(metric, some, series, [run.name for run in runs], last_common))
    return sorted(rows, key=lambda row: (behaviours.index(row.behaviour), row.of != "group"))


def series_of(run: ComparedRun) -> dict[str, Series]:
    """Metric -> its series, from the store, or from what W&B has."""
    return _from_store(run.data) if run.data is not None else _from_metrics(run)


def _trajectory(
    metric: str, some: Series, series: Mapping[str, Series], runs: Sequence[str], last_common: int | None
) -> Trajectory:
    reference, others = runs[0], runs[1:]

    def apart(run: str, step: int | None, ends: bool) -> Apart | None:
        if reference not in series or run not in series:
            return None
        pair = [series[reference], series[run]]
        steps = [max(each.values) for each in pair] if ends else [step, step]
        if not all(at in each.values for each, at in zip(pair, steps, strict=True)):
            return None
        values = [each.values[at] for each, at in zip(pair, steps, strict=True)]  # type: ignore[index]
        floors = [each.floor.get(at) for each, at in zip(pair, steps, strict=True)]  # type: ignore[arg-type]
        return apart_by(values[1] - values[0], floors)

    return Trajectory(
        metric,
        some.behaviour,
        some.of,
        some.name,
        next((each.expected for each in series.values() if each.expected), None),
        {run: series[run].values for run in runs if run in series},
        {run: apart(run, None, True) for run in others},
        {run: apart(run, last_common, False) for run in others},
    )


def apart_by(difference: float, floors: Iterable[float | None]) -> Apart:
    """A difference between two runs with the noise of both: the root of the sum of the squares of their floors."""
    known = [each for each in floors if each is not None]
    if len(known) < 2:
        return Apart(difference, None, None)
    floor = float(total_floor(known))
    return Apart(difference, floor, bool(above_floor(difference, floor, TIMES)))


def _from_store(data: RunData) -> dict[str, Series]:
    """All series of a run store.

    The noise floor of a group is at most the mean of its categories' floors (the root mean square of a sum is at most
    the sum of the root mean squares); that is what is taken, because how they hang together was not measured.
    """
    floors = behaviour_floors(data)
    found: dict[str, Series] = {}
    for of, pattern in _PATTERNS.items():
        names = list(data.group_means) if of == "group" else list(data.categories)
        means = np.stack(list(data.group_means.values()), axis=1) if of == "group" else data.means
        limit = floors
        if floors is not None and of == "group":
            limit = np.einsum("gc,rcb->rgb", group_weights(data.store.start), floors)
        metrics = iter(names_of(pattern, data.store.start))
        for m, behaviour in enumerate(data.behaviours):
            for place, name in enumerate(names):
                floor = None if limit is None else limit[:, place, m].tolist()
                found[next(metrics)] = Series(
                    behaviour,
                    of,
                    name,
                    name if of == "group" else data.expected[name],
                    dict(zip(data.steps, means[:, place, m].tolist(), strict=True)),
                    {} if floor is None else dict(zip(data.steps, floor, strict=True)),
                )
    return found


def _from_metrics(run: ComparedRun) -> dict[str, Series]:
    """The series among the metrics that W&B was sent. Names are those of metrics; what is expected is not known."""
    rows = run.source.logged.rows if run.source.logged else ()
    found: dict[str, Series] = {}
    for behaviour, slug in zip(run.behaviours, slugs(run.behaviours), strict=True):
        for of, prefix in (("group", f"smda/{slug}_group/"), ("category", f"smda/{slug}/")):
            names = dict.fromkeys(name for _, row in rows for name in row if name.startswith(prefix))
            for metric in names:
                name = metric.removeprefix(prefix)
                values = {step: row[metric] for step, row in rows if metric in row}
                expected = name if of == "group" else None
                found[metric] = Series(behaviour, of, name, expected, values, {})  # type: ignore[arg-type]
    return found
