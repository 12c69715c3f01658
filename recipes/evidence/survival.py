"""Which statements of a run's report survive when the run is made again otherwise? Arrays of findings alone, no model.

A run's report says that a category fell, that a feature shifted up, that a pair is among the ten that moved refusal
most, and so on. :func:`survival` asks of every such statement of one run whether another run says it too. What chance
would give is found by renaming: categories (within those to refuse and those to comply with), features and pairs of the
other run are permuted, so that its numbers stay and their meaning goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np

TOP_CATEGORIES, TOP_FEATURES, TOP_PAIRS = 3, 5, 10


@dataclass(frozen=True)
class Finding:
    """A number of the report. ``strong``: the report shows it plainly, not greyed as within its noise."""

    value: float
    strong: bool


Found = Mapping[str, Finding]


@dataclass(frozen=True)
class Findings:
    """What one run's report says.

    ``changes``: category -> change of its mean behaviour; ``expected``: category -> refuse or comply. ``features``,
    ``by_strength``, ``by_outputs``: feature -> shift of its coefficient, whole and by two pathways. ``pairs``: pair ->
    effect on the mean over the probes to refuse. ``gaps``: categories named at the end. ``alerts``: (kind, category) ->
    the feature and the pairs that it names.
    """

    expected: Mapping[str, str]
    changes: Found
    features: Found
    by_strength: Found
    by_outputs: Found
    pairs: Found
    gaps: frozenset[str]
    alerts: Mapping[tuple[str, str], tuple[str | None, tuple[str, ...]]]


#: Of each statement of one kind in the first findings: does the second say it too?
Kept = list[bool]


def _signs(name: str, strong: bool) -> Callable[[Findings, Findings], Kept]:
    def kept(a: Findings, b: Findings) -> Kept:
        first, second = getattr(a, name), getattr(b, name)
        said = {key: each.value for key, each in first.items() if each.strong == strong and each.value}
        return [key in second and bool(np.sign(second[key].value) == np.sign(value)) for key, value in said.items()]

    return kept


def _top(name: str, most: int) -> Callable[[Findings, Findings], Kept]:
    def kept(a: Findings, b: Findings) -> Kept:
        second = set(top(getattr(b, name), most))
        return [key in second for key in top(getattr(a, name), most)]

    return kept


def _order(a: Findings, b: Findings) -> Kept:
    pairs = combinations([key for key in a.changes if key in b.changes], 2)
    apart = [tuple(each.changes[x].value - each.changes[y].value for each in (a, b)) for x, y in pairs]
    return [bool(np.sign(first) == np.sign(second)) for first, second in apart if first]


def _worst(a: Findings, b: Findings) -> Kept:
    return [worst(a) == worst(b)] if a.changes and b.changes else []


def _gaps(a: Findings, b: Findings) -> Kept:
    return [name in b.gaps for name in sorted(a.gaps)]


def _alerts(a: Findings, b: Findings) -> Kept:
    return [cause in b.alerts for cause in a.alerts]


def _alert_features(a: Findings, b: Findings) -> Kept:
    return [cause in b.alerts and b.alerts[cause][0] == feature for cause, (feature, _) in a.alerts.items() if feature]


def _alert_pairs(a: Findings, b: Findings) -> Kept:
    return [
        cause in b.alerts and pair in b.alerts[cause][1] for cause, (_, pairs) in a.alerts.items() for pair in pairs
    ]


#: Kind of statement -> which of them the other run makes too.
STATEMENTS: dict[str, Callable[[Findings, Findings], Kept]] = {
    "category rose or fell, above noise": _signs("changes", True),
    "category rose or fell, greyed": _signs("changes", False),
    "the worst category": _worst,
    f"{TOP_CATEGORIES} most changed categories": _top("changes", TOP_CATEGORIES),
    "which of two categories changed more": _order,
    "feature shifted up or down, above noise": _signs("features", True),
    "feature shifted up or down, greyed": _signs("features", False),
    "feature by strength, above noise": _signs("by_strength", True),
    "feature by strength, greyed": _signs("by_strength", False),
    "feature by outputs, above noise": _signs("by_outputs", True),
    "feature by outputs, greyed": _signs("by_outputs", False),
    f"{TOP_FEATURES} most shifted features": _top("features", TOP_FEATURES),
    "named gap category": _gaps,
    "alert": _alerts,
    "feature that an alert names": _alert_features,
    "pair that an alert names": _alert_pairs,
    "pair raised or lowered refusal, above noise": _signs("pairs", True),
    "pair raised or lowered refusal, greyed": _signs("pairs", False),
    f"{TOP_PAIRS} pairs of largest effect": _top("pairs", TOP_PAIRS),
}


@dataclass(frozen=True)
class Survival:
    """Of ``statements`` of one kind, over all ordered pairs of runs: the share that survived, and what chance gives."""

    share: float
    chance: float
    statements: int


def survival(runs: Sequence[Findings], *, draws: int = 200, seed: int = 0) -> dict[str, Survival]:
    """Kind of STATEMENTS -> how many survive from each of ``runs`` to each other; kinds without statements left out.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run cannot be compared with another. Next step: give two or more.")
    rng = np.random.default_rng(seed)
    couples = list(permutations(runs, 2))
    found = {}
    for kind, kept in STATEMENTS.items():
        real = [each for a, b in couples for each in kept(a, b)]
        if not real:
            continue
        by_chance: Kept = []
        while len(by_chance) < max(draws, len(real)):  # statements, not draws: a run may make but one
            a, b = couples[int(rng.integers(len(couples)))]
            by_chance += kept(a, renamed(b, rng))
        found[kind] = Survival(float(np.mean(real)), float(np.mean(by_chance)), len(real))
    return found


def renamed(findings: Findings, rng: np.random.Generator) -> Findings:
    """The same numbers under other names: categories within their group, features, pairs."""
    names: dict[str, str] = {}
    for group in sorted(set(findings.expected.values())):
        names |= _shuffled([key for key, expected in findings.expected.items() if expected == group], rng)
    features = _shuffled(list(findings.features), rng)
    pairs = _shuffled(list(findings.pairs), rng)
    return replace(
        findings,
        changes=_named(findings.changes, names),
        features=_named(findings.features, features),
        by_strength=_named(findings.by_strength, features),
        by_outputs=_named(findings.by_outputs, features),
        pairs=_named(findings.pairs, pairs),
        gaps=frozenset(names[name] for name in findings.gaps),
        alerts={
            (kind, names.get(category, category)): (
                None if feature is None else features.get(feature, feature),
                tuple(pairs.get(pair, pair) for pair in some),
            )
            for (kind, category), (feature, some) in findings.alerts.items()
        },
    )


def of_features(findings: Findings, names: Mapping[str, str]) -> Findings:
    """The same with features renamed; those that ``names`` lacks keep theirs, marked as unknown to the other run."""

    def new(feature: str) -> str:
        return names.get(feature, f"only there: {feature}")

    return replace(
        findings,
        features={new(key): each for key, each in findings.features.items()},
        by_strength={new(key): each for key, each in findings.by_strength.items()},
        by_outputs={new(key): each for key, each in findings.by_outputs.items()},
        alerts={
            cause: (None if feature is None else new(feature), pairs)
            for cause, (feature, pairs) in findings.alerts.items()
        },
    )


def top(found: Found, most: int) -> list[str]:
    """The names of the ``most`` largest values by size."""
    return sorted(found, key=lambda key: -abs(found[key].value))[:most]


def worst(findings: Findings) -> str:
    """The category that moved furthest away from what is expected of it."""
    signs = {"refuse": -1.0, "comply": 1.0}
    return max(findings.changes, key=lambda key: signs[findings.expected[key]] * findings.changes[key].value)


def _shuffled(keys: Sequence[str], rng: np.random.Generator) -> dict[str, str]:
    return dict(zip(keys, rng.permutation(np.array(keys, dtype=object)).tolist(), strict=True)) if keys else {}


def _named(found: Found, names: Mapping[str, str]) -> dict[str, Finding]:
    return {names[key]: each for key, each in found.items()}
