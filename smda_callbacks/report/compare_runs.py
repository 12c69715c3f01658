"""The runs of a comparison: their names, what they must share, and in what else they differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase
from typing import Any

import numpy as np

from smda_callbacks.records import Array, PolicyRecord
from smda_callbacks.report.data import RunData
from smda_callbacks.report.shifts import cumulative_shifts, shift_floors
from smda_callbacks.sinks.attribution import is_audit
from smda_callbacks.sinks.metric_axes import slugs
from smda_callbacks.sinks.run_source import RunSource

#: What the commands and the errors call the option that lets runs be compared which do not share all of IDENTITY.
OPTION = "--allow-mismatch"

#: What two runs must share so that their numbers mean the same, by its name for people -> in the manifest.
IDENTITY: Mapping[str, str] = {
    "probes": "probe_hash",
    "SAE": "sae.hash",
    "policy": "policy_hash",
    "behaviours": "behaviours",
    "target": "target",
    "scoring": "scored_by",
}

#: Parts of a manifest that say how a run was made, without what is its own, or is in IDENTITY.
SETTINGS = ("model", "adapter", "trainer", "config", "seeds", "attribution", "versions", "git_sha")
_OWN = {"config.store.dir", "config.wandb", "attribution.functionals", "attribution.notes", "config.probes"}


class CompareError(ValueError):
    """Runs that cannot be compared, or not without being told to."""


@dataclass(frozen=True)
class ComparedRun:
    """A run with its name in the comparison, ``A``, ``B`` …; ``data`` is None where only W&B's metrics are known."""

    name: str
    source: RunSource
    data: RunData | None

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.source.manifest

    @cached_property
    def behaviours(self) -> tuple[str, ...]:
        """Names of the scored behaviours."""
        return tuple(map(str, self.manifest.get("behaviours") or ("refusal",)))

    @property
    def target(self) -> str:
        """Unit of the behaviours: ``probability`` or ``logit``."""
        return str(self.manifest.get("target", "probability"))

    @cached_property
    def steps(self) -> list[int]:
        """Steps at which the behaviour was read, from the start on."""
        if self.data is not None:
            return self.data.steps
        names = tuple(f"smda/{name}{kind}/" for name in slugs(self.behaviours) for kind in ("_group", ""))
        rows = self.source.logged.rows if self.source.logged else ()
        return [step for step, row in rows if any(name.startswith(names) for name in row)]

    @property
    def status(self) -> str:
        """``finished``, ``interrupted``, or ``not finished``: it goes on, or was killed."""
        if self.data is not None:
            return self.data.end.status if self.data.end is not None else "not finished"
        return "finished" if self.source.logged and self.source.logged.finished else "not finished"

    @cached_property
    def shifts(self) -> dict[str, Array]:
        """Part of PATHWAYS -> shift since the start, ``[record, feature, behaviour]``; needs ``data``."""
        assert self.data is not None
        return cumulative_shifts(self.data)

    @cached_property
    def floors(self) -> dict[str, Array] | None:
        """Noise floors of :attr:`shifts`, same shape; None where they were not measured."""
        assert self.data is not None
        return shift_floors(self.data)


def named_runs(sources: Sequence[RunSource]) -> tuple[ComparedRun, ...]:
    """The runs, read, with the names A, B … in the order given.

    Raises:
        CompareError: fewer than two, more than there are letters, or an audit.
        StoreError: a file of a store is damaged.
    """
    if not 2 <= len(sources) <= len(ascii_uppercase):
        raise CompareError(
            f"{len(sources)} run{'' if len(sources) == 1 else 's'} given; a comparison takes 2 to "
            f"{len(ascii_uppercase)}. Next step: name the runs, smda compare A B."
        )
    for source in sources:
        if is_audit(source.manifest):
            raise CompareError(
                f"{source.given} is an audit: each of its windows starts from the same model, so it has no course "
                "that could be compared. Next step: leave it out; smda pairs ranks its pairs."
            )
    return tuple(
        ComparedRun(name, source, None if source.store is None else RunData.read(source.store))
        for name, source in zip(ascii_uppercase, sources, strict=False)
    )


@dataclass(frozen=True)
class Mismatch:
    """Something of IDENTITY that the runs do not share: its value in every run, and how far apart they are."""

    what: str
    values: Mapping[str, Any]
    note: str | None


def mismatches(runs: Sequence[ComparedRun]) -> tuple[Mismatch, ...]:
    """What of IDENTITY differs between the runs, in its order."""
    found = []
    for what, key in IDENTITY.items():
        values = {run.name: value_at(run.manifest, key) for run in runs}
        if _differ(values.values()):
            found.append(Mismatch(what, values, _policies_apart(runs) if what == "policy" else None))
    return tuple(found)


def check_same(runs: Sequence[ComparedRun], *, allow: bool) -> tuple[Mismatch, ...]:
    """The mismatches, where they are allowed or there are none.

    Raises:
        CompareError: the runs differ in one of IDENTITY and that is not allowed; or in the unit or in all of their
            behaviours, which leaves nothing to compare.
    """
    found = mismatches(runs)
    if found and not allow:
        raise CompareError(
            f"the runs do not share their {_listed(each.what for each in found)}, so their numbers do not mean the "
            f"same:\n{_lines(found)}\nNext step: compare runs that do"
            f"{_advice(found)}; or give {OPTION} to compare what can be compared all the same."
        )
    if any(each.what == "target" for each in found):
        raise CompareError(
            f"the runs' behaviours are in different units, which {OPTION} does not change:\n{_lines(found)}\n"
            "Next step: compare runs with the same behaviour.target."
        )
    if not common_behaviours(runs):
        raise CompareError(f"the runs share no behaviour:\n{_lines(found)}\nNext step: compare runs that do.")
    return found


def common_behaviours(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    """Behaviours that all runs score, in the order of the first."""
    return tuple(each for each in runs[0].behaviours if all(each in run.behaviours for run in runs))


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, dict[str, Any]]:
    """Settings that the runs do not share, by their place in the manifest -> value by run; None where a run has none.

    Left out: names, times, folders, W&B, and what is judged by hash.
    """
    flat = {run.name: dict(_flat({key: run.manifest.get(key) for key in SETTINGS})) for run in runs}
    names = dict.fromkeys(name for values in flat.values() for name in values)
    found = {name: {run: values.get(name) for run, values in flat.items()} for name in names}
    return {name: values for name, values in found.items() if _differ(values.values())}


def mismatch_line(found: Mismatch) -> str:
    """One line: what differs, both values, how far apart."""
    values = ", ".join(f"{run} {_short(value)}" for run, value in found.values.items())
    return f"{found.what}: {values}" + (f" ({found.note})" if found.note else "")


def _policies_apart(runs: Sequence[ComparedRun]) -> str | None:
    """How far the policies of the runs are from that of the first one with a store."""
    known = [run.data.policy for run in runs if run.data is not None]
    if len(known) < 2:
        return None
    first, notes = known[0], []
    for other in known[1:]:
        notes.append(_policy_apart(first, other))
    return next((each for each in notes if each), None)


def _policy_apart(first: PolicyRecord, other: PolicyRecord) -> str:
    if not np.array_equal(first.features, other.features):
        shared = len(np.intersect1d(first.features, other.features))
        return f"{shared} of {len(first.features)} and {len(other.features)} features shared"
    if first.coef.shape != other.coef.shape:
        return "other behaviours"
    if first.lam != other.lam:
        return f"the same features, λ {first.lam:g} and {other.lam:g}"
    largest = float(np.abs(first.coef - other.coef).max(initial=0.0))
    return f"the same features and λ, coefficients differ by at most {largest:.1e}"


def _advice(found: Sequence[Mismatch]) -> str:
    if any(each.what == "policy" for each in found) and not any(each.what in ("probes", "SAE") for each in found):
        return " (policy.path in the configuration takes that of another run's store)"
    return ""


def _lines(found: Sequence[Mismatch]) -> str:
    return "\n".join(f"  {mismatch_line(each)}" for each in found)


def _listed(words: Iterable[str]) -> str:
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)[:16]


def value_at(manifest: Mapping[str, Any], key: str) -> Any:
    """The entry of a manifest at a dotted key; None where there is none."""
    value: Any = manifest
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if name in _OWN:
            continue
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _differ(values: Iterable[Any]) -> bool:
    return len({json.dumps(each, sort_keys=True, default=str) for each in values}) > 1
