"""What two or more runs have in common and in what they came apart: everything ``smda compare`` shows.

The first run is the reference. Differences stand beside their noise: the root of the sum of the squares of both runs'
floors, which are those of random updates; that two runs differ by more than that does not say that a third one with
another seed would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from smda_callbacks.report.compare_pairs import PairComparison, compare_pairs
from smda_callbacks.report.compare_policy import (
    FeatureApart,
    PathwayApart,
    feature_differences,
    pathway_differences,
)
from smda_callbacks.report.compare_runs import (
    ComparedRun,
    Mismatch,
    check_same,
    common_behaviours,
    differing_settings,
    named_runs,
)
from smda_callbacks.report.compare_series import Alignment, Trajectory, align, trajectories
from smda_callbacks.report.verdict import warning
from smda_callbacks.sinks.metrics import summary_of_run
from smda_callbacks.sinks.run_source import RunSource


@dataclass(frozen=True)
class Cost:
    """Of one run, in seconds, as stored. ``share``: measuring over the whole run; None for what is not known."""

    windows: int
    measuring: float
    median: float | None  # of a window
    attribution: float | None
    training: float | None  # the whole run, measuring included
    share: float | None


@dataclass(frozen=True)
class Comparison:
    """``features_common``: the features at the last step that all runs share, where the runs end apart.

    ``features``, ``pathways``, ``pairs`` are None where a run has no store or the runs' features have no names in
    common; ``notes`` say what is missing and why.
    """

    runs: tuple[ComparedRun, ...]
    behaviours: tuple[str, ...]
    mismatches: tuple[Mismatch, ...]
    settings: Mapping[str, Mapping[str, Any]]
    alignment: Alignment
    trajectories: tuple[Trajectory, ...]
    features: tuple[FeatureApart, ...] | None
    features_common: tuple[FeatureApart, ...] | None
    pathways: tuple[PathwayApart, ...] | None
    pairs: PairComparison | None
    cost: Mapping[str, Cost]
    summary: Mapping[str, Mapping[str, float]]  # metric -> run -> value
    notes: tuple[str, ...]

    @property
    def reference(self) -> ComparedRun:
        return self.runs[0]

    @property
    def others(self) -> tuple[ComparedRun, ...]:
        return self.runs[1:]


def compare(sources: Sequence[RunSource], *, by: str | None = None, allow_mismatch: bool = False) -> Comparison:
    """Compare runs; ``by``: the functional that their pairs are compared by, their first one if None.

    Raises:
        CompareError: fewer than two runs, an audit, or runs whose probes, SAE, policy, behaviours or target differ.
        ValueError: a run does not attribute ``by``.
    """
    runs = named_runs(sources)
    differ = check_same(runs, allow=allow_mismatch)
    behaviours, alignment = common_behaviours(runs), align(runs)
    last = alignment.common[-1] if alignment.common else None
    notes = [f"{run.name} was {note}." for run in runs for note in run.source.notes if run.data is not None]
    notes += [f"{run.name}: {note}." for run in runs for note in run.source.notes if run.data is None]
    notes += [f"{run.name} is {run.status}: its end is the last window that is there." for run in runs
              if run.status != "finished"]  # fmt: skip
    notes += _same_run(runs)
    notes += [f"{run.name}: {said}" for run in runs if run.data is not None and (said := warning(run.data))]
    whole = all(run.data is not None for run in runs)
    apart = [each.what for each in differ]
    with_policy = whole and "SAE" not in apart
    if whole and not with_policy:
        notes.append("Features of different SAEs have nothing but their numbers in common: policies are not compared.")
    if "policy" in apart and with_policy:
        notes.append("Coefficients are per standard deviation at each run's own distillation, so their units differ.")
    if "probes" in apart:
        notes.append("Means are over different probes: a difference may come from these alone.")
    pairs = compare_pairs(runs, by) if whole else None
    if isinstance(pairs, str):
        notes.append(f"{pairs[0].upper()}{pairs[1:]}.")
        pairs = None
    return Comparison(
        runs=runs,
        behaviours=behaviours,
        mismatches=differ,
        settings=differing_settings(runs),
        alignment=alignment,
        trajectories=tuple(trajectories(runs, behaviours, last)),
        features=_features(runs, behaviours) if with_policy else None,
        features_common=_features(runs, behaviours, last) if with_policy and last and not alignment.same_end else None,
        pathways=tuple(p for b in behaviours for p in pathway_differences(runs, b)) if with_policy else None,
        pairs=pairs,
        cost={run.name: cost_of(run) for run in runs},
        summary=_summary(runs),
        notes=tuple(notes),
    )


def _features(
    runs: Sequence[ComparedRun], behaviours: Sequence[str], step: int | None = None
) -> tuple[FeatureApart, ...]:
    return tuple(feature for behaviour in behaviours for feature in feature_differences(runs, behaviour, step))


def cost_of(run: ComparedRun) -> Cost:
    """What measuring a run cost."""
    if run.data is None:
        return _logged_cost(run)
    data = run.data
    seconds = [window.seconds for window in data.windows]
    books = [window.pairs.seconds for window in data.windows if window.pairs is not None]
    train = data.end.train_seconds if data.end is not None else None
    return Cost(
        windows=len(seconds),
        measuring=data.end.seconds if data.end is not None else float(sum(seconds)),
        median=float(np.median(seconds)) if seconds else None,
        attribution=float(sum(books)) if books else None,
        training=train,
        share=data.end.seconds / train if data.end is not None and train else None,
    )


def _logged_cost(run: ComparedRun) -> Cost:
    rows = [row for _, row in run.source.logged.rows] if run.source.logged else []
    seconds = [row["smda/cost/seconds"] for row in rows if "smda/cost/seconds" in row][1:]  # the first is the start
    books = [row["smda/cost/attribution_seconds"] for row in rows if "smda/cost/attribution_seconds" in row]
    median = float(np.median(seconds)) if seconds else None
    return Cost(len(seconds), float(sum(seconds)), median, float(sum(books)) if books else None, None, None)


def _summary(runs: Sequence[ComparedRun]) -> dict[str, dict[str, float]]:
    """The values by which runs are ranked in W&B, see sinks.metrics: metric -> run -> value."""
    values: dict[str, Mapping[str, float]] = {}
    for run in runs:
        if run.data is not None:
            values[run.name] = summary_of_run(run.data.store.start, run.data.windows)
        elif run.source.logged is not None:
            summary = run.source.logged.summary
            values[run.name] = {name: value for name, value in summary.items() if name.startswith("smda/summary/")}
    names = dict.fromkeys(name for each in values.values() for name in each)
    return {name: {run: each[name] for run, each in values.items() if name in each} for name in names}


def _same_run(runs: Sequence[ComparedRun]) -> list[str]:
    seen: dict[Any, str] = {}
    notes = []
    for run in runs:
        identity = run.manifest.get("run_id")
        if identity is not None and identity in seen:
            notes.append(f"{seen[identity]} and {run.name} are the same run.")
        seen.setdefault(identity, run.name)
    return notes


def as_json(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values with stable keys; see ``smda compare --help``."""
    pairs = found.pairs
    return {
        "reference": found.reference.name,
        "runs": {run.name: _run_json(run) for run in found.runs},
        "mismatches": {each.what: {"values": dict(each.values), "note": each.note} for each in found.mismatches},
        "settings": {name: dict(values) for name, values in found.settings.items()},
        "alignment": {
            "common_steps": list(found.alignment.common),
            "last_step": dict(found.alignment.last),
            "same_end": found.alignment.same_end,
            "text": found.alignment.text,
        },
        "unit": found.reference.target,
        "trajectories": {each.metric: _trajectory_json(each) for each in found.trajectories},
        "pathways": None if found.pathways is None else [asdict(each) for each in found.pathways],
        "features": None if found.features is None else [asdict(each) for each in found.features],
        "features_common": None if found.features_common is None else [asdict(each) for each in found.features_common],
        "pairs": None if pairs is None else {**asdict(pairs), "only": pairs.only, "differing": [
            {**asdict(each), "acts_in": list(each.acts_in)} for each in pairs.differing
        ]},
        "cost": {name: asdict(each) for name, each in found.cost.items()},
        "summary": {name: dict(values) for name, values in found.summary.items()},
        "notes": list(found.notes),
    }  # fmt: skip


def _run_json(run: ComparedRun) -> dict[str, Any]:
    return {
        "given": run.source.given,
        "source": run.source.kind,
        "store": None if run.source.store is None else str(run.source.store.path),
        "run_id": run.manifest.get("run_id"),
        "created": run.manifest.get("created"),
        "status": run.status,
        "first_step": run.steps[0] if run.steps else None,
        "last_step": run.steps[-1] if run.steps else None,
    }


def _trajectory_json(each: Trajectory) -> dict[str, Any]:
    values = {run: [[step, value] for step, value in series.items()] for run, series in each.values.items()}
    apart = {
        key: {run: None if one is None else asdict(one) for run, one in getattr(each, key).items()}
        for key in ("at_end", "at_common")
    }
    head = {"behaviour": each.behaviour, "of": each.of, "name": each.name, "expected": each.expected}
    return {**head, "values": values, **apart}
