"""The feature and the pairs that an alert names, against sums made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smda_callbacks.records import Alert, NoiseFloor
from smda_callbacks.sinks.pair_table import pair_table
from smda_callbacks.training.causes import MOST, Causes
from tests.helpers.runs import Run, make_run, with_renewals


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
        singly.add(window.feature_account, window.pairs, window.pairs_seen, window.update_rms)
    assert at_once.named(alert("fraud", -1.0)) == singly.named(alert("fraud", -1.0))


def with_floors(run: Run, *, category: float, pair: float) -> NoiseFloor:
    """The run's noise with floors of one size for every category, and of another for every effect of a pair."""
    noise = run.start.noise
    assert noise is not None
    assert noise.functional_random is not None
    return replace(
        noise,
        behaviour_random=np.full_like(noise.behaviour_random, category),
        behaviour_rounding=np.zeros_like(noise.behaviour_rounding),
        functional_random=np.full_like(noise.functional_random, pair),
        functional_rounding=np.zeros_like(noise.functional_random),
    )


def floors_by_hand(run: Run, noise: NoiseFloor, category: str) -> tuple[float, dict[int, float]]:
    """Of the category's change, and of every pair's effect on it as the tables of pairs have it."""
    start = replace(run.start, noise=noise)
    table = pair_table(start, run.windows)
    assert table is not None
    assert table.floor is not None
    column = table.functionals.index(f"refusal:{category}")
    floors = dict(zip((pair.id for pair in table.pairs), table.floor[:, column].tolist(), strict=True))
    sizes = [window.update_rms / noise.update_rms for window in run.windows if window.status == "ok"]
    names = list(dict.fromkeys(probe.category for probe in run.start.probes))
    one = noise.behaviour_random[names.index(category), 0]
    return float(one * np.sqrt(np.square(sizes).sum())), floors


@pytest.mark.parametrize("pair", [1e-6, 1e-3, 3e-3, 1e3])
def test_only_pairs_above_their_noise_are_named(run: Run, pair: float) -> None:
    causes = fresh(run)
    causes.noise = with_floors(run, category=0.0, pair=pair)
    causes.add_all(run.windows)
    _, floors = floors_by_hand(run, causes.noise, "fraud")
    totals = effects_by_hand(run, "fraud")
    strong = [number for number in totals if totals[number] < 0 and -totals[number] > 2 * floors[number]]
    expected = sorted(strong, key=lambda number: totals[number])[:MOST]
    assert list(causes.named(alert("fraud", -1.0)).pairs) == expected


def test_floors_of_pairs_span_from_all_to_none(run: Run) -> None:
    """So that the test above sees every case."""
    named = []
    for pair in (1e-6, 1e-3, 3e-3, 1e3):
        causes = fresh(run)
        causes.noise = with_floors(run, category=0.0, pair=pair)
        causes.add_all(run.windows)
        named.append(len(causes.named(alert("fraud", -1.0)).pairs))
    assert named[0] > 0
    assert named[-1] == 0


def test_a_feature_within_the_noise_of_the_category_is_not_named(run: Run) -> None:
    free = fresh(run)
    free.add_all(run.windows)
    names = list(dict.fromkeys(probe.category for probe in run.start.probes))
    moved = sum(part[names.index("fraud"), :, 0] for window in run.windows for part in window.feature_account.values())
    largest = -float(np.min(moved))
    assert largest > 0
    unit, _ = floors_by_hand(run, with_floors(run, category=1.0, pair=0.0), "fraud")
    for share, named in ((0.49, True), (0.51, False)):  # of the contribution, twice which is the limit
        causes = fresh(run)
        causes.noise = with_floors(run, category=share * largest / unit, pair=0.0)
        causes.add_all(run.windows)
        found = causes.named(alert("fraud", -10.0))
        assert (found.feature is not None) == named
        assert ("most through feature" in found.message) == named


def test_an_alert_within_noise_says_so_and_names_nothing(run: Run) -> None:
    causes = fresh(run)
    causes.noise = with_floors(run, category=1.0, pair=0.0)
    causes.add_all(run.windows)
    limit, _ = floors_by_hand(run, causes.noise, "fraud")
    quiet, loud = (causes.named(alert("fraud", -2 * limit * times)) for times in (0.99, 1.01))
    assert "may be chance" in quiet.message
    assert (quiet.feature, quiet.pairs) == (None, ())
    assert "may be chance" not in loud.message
    assert loud.pairs


def test_what_is_not_known_is_not_named(run: Run) -> None:
    causes = fresh(run)
    assert causes.named(alert("fraud", -1.0)) == alert("fraud", -1.0)  # nothing has moved yet
    causes.add_all(replace(window, pairs=None) for window in run.windows)
    found = causes.named(alert("fraud", -1.0))
    assert found.pairs == ()
    assert "effects" not in found.message
    health = Alert(4, "sae_fvu", "the SAE misses much", None, 0.4, 0.2)
    assert causes.named(health) == health


def test_every_window_is_judged_by_the_floor_in_force(run: Run) -> None:
    """Renewed floors a thousandth and a thousand times as large, as a store gives them back and as a run sets them."""
    for times, chance in ((1e-3, False), (1e3, True)):
        start = with_floors(run, category=1.0, pair=1e-3)
        renewed = with_renewals(replace(run, start=replace(run.start, noise=start)), {1: times})
        at_once, singly = fresh(run), fresh(run)
        at_once.noise = singly.noise = start
        at_once.add_all(renewed.windows)
        for window in renewed.windows:
            singly.noise = window.noise or singly.noise
            singly.add(window.feature_account, window.pairs, window.pairs_seen, window.update_rms)
        sizes = [window.update_rms / start.update_rms for window in run.windows if window.status == "ok"]
        limit = 2 * np.sqrt(sizes[0] ** 2 + np.square(np.multiply(times, sizes[1:])).sum())  # floors of 1, then others
        for value in (0.99 * limit, 1.01 * limit):
            found = at_once.named(alert("fraud", -value))
            assert found == singly.named(alert("fraud", -value))
            assert ("may be chance" in found.message) == (value < limit)
        loud = at_once.named(alert("fraud", -1.01 * limit))
        table = pair_table(renewed.start, renewed.windows)
        assert table is not None
        assert table.floor is not None
        column = table.functionals.index("refusal:fraud")
        strong = table.effect[:, column] < -2 * np.nan_to_num(table.floor[:, column], nan=np.inf)
        assert set(loud.pairs) <= {pair.id for pair, each in zip(table.pairs, strong, strict=True) if each}
        assert len(loud.pairs) == min(MOST, int(strong.sum()))
        assert (len(loud.pairs) == 0) == chance
