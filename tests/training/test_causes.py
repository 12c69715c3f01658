"""The feature and the pairs that an alert names, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smda_callbacks.records import Alert
from smda_callbacks.training.causes import MOST, Causes
from tests.helpers.runs import Run, make_run


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(windows=5, pairs=9, unattributed=(2,), failed=(3,))


def fresh(run: Run) -> Causes:
    return Causes(run.start.policy, run.start.probes, run.start.manifest["attribution"]["functionals"])


def alert(category: str, value: float) -> Alert:
    return Alert(4, "refusal_fell", "it moved", category, value, 0.1)


def effects_by_hand(run: Run, category: str) -> dict[int, float]:
    column = run.start.manifest["attribution"]["functionals"].index(f"refusal:{category}")
    totals: dict[int, float] = {}
    for window in run.windows:
        book = window.pairs
        if book is None:
            continue
        for ids, effects in ((book.ids, book.effect), (book.later_ids, book.later_effect)):
            for place, number in enumerate(ids.tolist()):
                totals[number] = totals.get(number, 0.0) + effects[place, column]
    return totals


@pytest.mark.parametrize("category", ["fraud", "cooking"])
@pytest.mark.parametrize("value", [-0.3, 0.3])
def test_an_alert_names_what_moved_its_category_its_way(run: Run, category: str, value: float) -> None:
    causes = fresh(run)
    causes.add_all(run.windows)
    found = causes.named(alert(category, value))
    totals = effects_by_hand(run, category)
    ranked = sorted(totals, key=lambda number: totals[number] if value < 0 else -totals[number])
    wanted = [number for number in ranked[:MOST] if totals[number] * value > 0]
    assert list(found.pairs) == wanted
    assert wanted
    names = list(dict.fromkeys(probe.category for probe in run.start.probes))
    moved = sum(part[names.index(category), :, 0] for window in run.windows for part in window.feature_account.values())
    place = int(np.argmin(moved) if value < 0 else np.argmax(moved))
    assert found.feature == run.start.policy.features[place]
    assert f"most through feature {found.feature}" in found.message
    rows = {pair.id: pair.rows for window in run.windows for pair in window.pairs_seen}
    for number in wanted:
        assert f"row {'='.join(map(str, rows[number]))}" in found.message


def test_windows_may_come_one_by_one(run: Run) -> None:
    at_once, singly = fresh(run), fresh(run)
    at_once.add_all(run.windows)
    singly.add_all(run.windows[:2])
    for window in run.windows[2:]:
        singly.add(window.feature_account, window.pairs, window.pairs_seen)
    assert at_once.named(alert("fraud", -1.0)) == singly.named(alert("fraud", -1.0))


def test_what_is_not_known_is_not_named(run: Run) -> None:
    causes = fresh(run)
    assert causes.named(alert("fraud", -1.0)) == alert("fraud", -1.0)  # nothing has moved yet
    causes.add_all(replace(window, pairs=None) for window in run.windows)
    found = causes.named(alert("fraud", -1.0))
    assert found.pairs == ()
    assert "effects" not in found.message
    health = Alert(4, "sae_fvu", "the SAE misses much", None, 0.4, 0.2)
    assert causes.named(health) == health
