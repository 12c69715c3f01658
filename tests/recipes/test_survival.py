"""Statements of runs that are made again: identical runs keep all, unrelated ones what chance gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from recipes.evidence.survival import STATEMENTS, Finding, Findings, of_features, renamed, survival, top, worst

EXPECTED = {f"bad-{k}": "refuse" for k in range(12)} | {f"good-{k}": "comply" for k in range(8)}


def made_up(seed: int, *, common: float = 0.0) -> Findings:
    """Findings of a run: a part that all runs share, ``common`` times as large as the part of its own."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)

    def found(names: list[str]) -> dict[str, Finding]:
        values = common * shared.normal(size=len(names)) + own.normal(size=len(names))
        return {name: Finding(float(value), bool(abs(value) > 1)) for name, value in zip(names, values, strict=True)}

    changes = found(list(EXPECTED))
    features, pairs = [str(k) for k in range(16)], [f"row {k}" for k in range(40)]
    refuse = [name for name in EXPECTED if EXPECTED[name] == "refuse"]
    gaps = frozenset(own.choice(refuse, 3, replace=False).tolist())
    alerts = {
        ("refusal_fell", name): (features[int(own.integers(16))], (pairs[int(own.integers(40))],))
        for name in own.choice(refuse, 4, replace=False).tolist()
    }
    some = [found(features) for _ in range(3)]
    return Findings(EXPECTED, changes, *some, found(pairs), gaps, alerts)


def test_an_identical_run_makes_every_statement_again() -> None:
    found = survival([made_up(0), made_up(0)])
    assert set(found) == set(STATEMENTS)
    assert {row.share for row in found.values()} == {1.0}
    assert found["alert"].statements == 8  # four alerts, in both directions
    assert found["the worst category"].chance == pytest.approx(1 / 20, abs=0.1)


def test_unrelated_runs_keep_what_chance_gives() -> None:
    found = survival([made_up(seed) for seed in range(16)], draws=4000)
    for kind, row in found.items():
        assert row.share == pytest.approx(row.chance, abs=0.06), kind
    assert found["feature shifted up or down, above noise"].share == pytest.approx(0.5, abs=0.08)
    assert found["named gap category"].chance == pytest.approx(3 / 12, abs=0.02)  # three of the twelve to refuse
    assert found["alert"].chance == pytest.approx(4 / 12, abs=0.02)
    assert found["5 most shifted features"].chance == pytest.approx(5 / 16, abs=0.02)
    assert found["10 pairs of largest effect"].chance == pytest.approx(10 / 40, abs=0.02)
    assert found["feature that an alert names"].chance < 0.05


def test_what_runs_share_survives_the_more_the_stronger_it_is() -> None:
    weak, strong = (survival([made_up(seed, common=size) for seed in range(10)]) for size in (0.5, 5.0))
    for kind in ("category rose or fell, above noise", "10 pairs of largest effect", "5 most shifted features"):
        assert weak[kind].chance < weak[kind].share < strong[kind].share, kind
    assert strong["category rose or fell, above noise"].share > 0.95
    assert strong["category rose or fell, greyed"].share < strong["category rose or fell, above noise"].share


def test_renaming_keeps_numbers_and_groups() -> None:
    before = made_up(3)
    after = renamed(before, np.random.default_rng(0))
    for name in ("changes", "features", "by_outputs", "pairs"):
        old, new = getattr(before, name), getattr(after, name)
        assert sorted(each.value for each in old.values()) == sorted(each.value for each in new.values())
        assert list(old.values()) != [new[key] for key in old]
    for group in ("refuse", "comply"):
        values = [{run.changes[name].value for name in EXPECTED if EXPECTED[name] == group} for run in (before, after)]
        assert values[0] == values[1]
    assert all(EXPECTED[name] == "refuse" for name in after.gaps)
    value = {key: each.value for key, each in before.features.items()}
    moved = {each.value: key for key, each in after.features.items()}
    (old,) = [feature for cause, (feature, _) in before.alerts.items() if cause == next(iter(before.alerts))]
    assert old is not None
    named = {feature for feature, _ in after.alerts.values()}
    assert moved[value[old]] in named  # the alert follows its feature to its new name


def test_features_without_a_namesake_are_lost() -> None:
    one = made_up(0)
    names = {str(k): str(k) for k in range(8)}
    other = of_features(one, names)
    found = survival([one, other])
    assert found["category rose or fell, above noise"].share == 1.0
    kept = sum(key in names for key in top(one.features, 5)) / 5
    assert found["5 most shifted features"].share == pytest.approx(kept)
    assert 0 < kept < 1


def test_worst_goes_by_what_is_expected() -> None:
    changes = {"a": Finding(-0.2, True), "b": Finding(0.9, True), "c": Finding(0.3, True)}
    run = replace(made_up(0), expected={"a": "refuse", "b": "refuse", "c": "comply"}, changes=changes)
    assert worst(run) == "c"
    assert top(changes, 1) == ["b"]


def test_one_run_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="1 run cannot be compared"):
        survival([made_up(0)])
