"""The test of groups is scipy's; it finds a planted difference and none where there is none."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import permutation_test

from smda_callbacks.records import Array, Pair
from smda_callbacks.report import group_test
from smda_callbacks.report.group_shifts import LEVEL, by_difference, group_shifts
from smda_callbacks.report.group_test import compare_groups, groups_of, holm
from smda_callbacks.report.pairs_data import PairData
from smda_callbacks.sinks.attribution import functionals_of
from smda_callbacks.sinks.pair_table import pair_table
from tests.helpers.pair_runs import make_audit


def three(n: int) -> list[np.ndarray]:
    return [np.arange(n)[start::3] for start in range(3)]


def test_agrees_with_scipy_one_number_at_a_time() -> None:
    rng = np.random.default_rng(3)
    values, members = rng.normal(size=(30, 4)), three(30)
    values[members[1], 2] += 0.9
    found = compare_groups(values, members, seed=5)

    def spread(*samples: Array) -> float:
        mean = np.concatenate(samples).mean()
        return sum(len(each) * (each.mean() - mean) ** 2 for each in samples)

    for test in range(4):
        alone = permutation_test(
            [values[each, test] for each in members], spread, permutation_type="independent", alternative="greater",
            n_resamples=2000, vectorized=False, random_state=np.random.default_rng(8),
        )  # fmt: skip
        assert found.statistic[test] == pytest.approx(alone.statistic, rel=1e-12)
        assert found.p[test] == pytest.approx(alone.pvalue, abs=0.03)  # two draws of relabellings


def test_few_pairs_are_tested_exactly() -> None:
    values = np.array([0.0, 1.0, 2.0, 6.0, 7.0, 9.0])[:, None]
    found = compare_groups(values, [np.array([0, 1, 3]), np.array([2, 4, 5])])
    x, hits = values[:, 0], 0
    splits = list(combinations(range(6), 3))
    for one in splits:
        a, b = x[list(one)], x[[k for k in range(6) if k not in one]]
        hits += 1.5 * (a.mean() - b.mean()) ** 2 >= found.statistic[0] * (1 - 1e-12)
    assert found.p[0] == pytest.approx(hits / len(splits), abs=1e-12)


def test_finds_what_was_planted_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    values, members = rng.normal(size=(90, 40)), three(90)
    values[members[0], 7] += 1.5
    found = compare_groups(values, members)
    assert np.flatnonzero(found.p_holm < LEVEL).tolist() == [7]
    assert found.pairs == 90


def test_nulls_are_rarely_called_different() -> None:
    rng = np.random.default_rng(1)
    alarms = [
        bool((compare_groups(rng.normal(size=(24, 10)), three(24), resamples=499, seed=seed).p_holm < LEVEL).any())
        for seed in range(60)
    ]
    assert sum(alarms) <= 8  # 3 wanted; more than 8 of 60 at a rate of 0.05: one in 300


def test_equal_values_do_not_differ() -> None:
    assert compare_groups(np.ones((9, 2)), three(9)).p.tolist() == [1.0, 1.0]


def test_many_pairs_are_sampled_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_test, "MOST_PAIRS", 50)
    values = np.zeros((500, 1))
    values[:100] = 1
    found = compare_groups(values, [np.arange(100), np.arange(100, 500)], resamples=999)
    assert found.pairs == 50
    assert found.statistic[0] == pytest.approx(10 * 0.8**2 + 40 * 0.2**2)
    assert found.p[0] == pytest.approx(0.001)


def test_holm() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1.0, 1.0])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(
    ("values", "members"),
    [
        (np.zeros((4, 1)), [[0, 1, 2, 3]]),
        (np.zeros((4, 1)), [[0, 1, 2], [3]]),
        (np.full((4, 1), np.nan), [[0, 1], [2, 3]]),
    ],
)
def test_refuses_what_cannot_be_tested(values: Array, members: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least two groups of two pairs and finite values"):
        compare_groups(values, [np.array(each) for each in members])


def pairs_with(columns: dict[str, list[str | None]]) -> list[Pair]:
    size = len(next(iter(columns.values())))
    return [
        Pair(k, (k,), "row", {name: v for name, some in columns.items() if (v := some[k]) is not None}, None, 5)
        for k in range(size)
    ]


def test_kind_makes_the_groups_else_category_else_another_column() -> None:
    kinds, categories = ["a", "b", "a", "b", "c", None], list("xyxyxy")
    found = groups_of(pairs_with({"category": categories, "kind": kinds}), range(6))
    assert found is not None
    assert (found.column, found.names, found.left_out) == ("kind", ("a", "b"), 2)
    assert [each.tolist() for each in found.members] == [[0, 2], [1, 3]]
    for kind in (["a"] * 6, list("abcdef")):  # one value; each its own
        other = groups_of(pairs_with({"kind": kind, "category": categories}), range(6))
        assert other is not None
        assert other.column == "category"
    third = groups_of(pairs_with({"kind": ["a"] * 6, "source": categories}), range(6))
    assert third is not None
    assert third.column == "source"
    assert groups_of(pairs_with({"kind": ["a"] * 6}), range(6)) is None


def audited(pairs: int = 18) -> PairData:
    run = make_audit(pairs=pairs, features=4)
    table, functionals = pair_table(run.start, run.windows), functionals_of(run.start)
    assert table is not None
    assert functionals is not None
    return PairData(table, functionals.whole.means, functionals.whole.shifts)


def test_group_means_are_of_the_table_and_behaviour_pathway_differs() -> None:
    pairs = audited()
    found = group_shifts(pairs, 0)
    assert found is not None
    assert found.groups.names == ("harmful_refused", "harmful_complied", "benign")
    assert list(found.mean) == ["shift_x_magnitude", "shift_x_gating", "shift_y"]
    feature = int(found.features[2])
    effect = pairs.table.effect[:, pairs.place(f"feature:{feature}:y")]
    floor = pairs.table.floor
    assert floor is not None
    assert found.floor is not None
    for g in range(3):
        mine = effect[g::3]
        assert found.mean["shift_y"][g, 2] == pytest.approx(mine.mean(), abs=1e-15)
        assert found.error["shift_y"][g, 2] == pytest.approx(mine.std(ddof=1) / np.sqrt(6), abs=1e-15)
        wanted = np.sqrt((floor[g::3, pairs.place(f"feature:{feature}:y")] ** 2).sum()) / 6
        assert found.floor["shift_y"][g, 2] == pytest.approx(wanted, abs=1e-15)
    # Refusals are pushed up, compliances down: that is in the behaviour, at given features.
    assert (found.p_holm("shift_y") < LEVEL).all()
    assert len(found.tests.p) == 12
    first = by_difference(found)[0]
    assert min(found.p_holm(part)[first] for part in found.mean) == found.tests.p_holm.min()


def test_shuffled_kinds_do_not_differ() -> None:
    pairs = audited(30)
    kinds = np.random.default_rng(4).permutation([pair.columns["kind"] for pair in pairs.table.pairs]).tolist()
    shuffled = tuple(replace(pair, columns={"kind": kind}) for pair, kind in zip(pairs.table.pairs, kinds, strict=True))
    found = group_shifts(replace(pairs, table=replace(pairs.table, pairs=shuffled)), 0)
    assert found is not None
    assert (found.tests.p_holm >= LEVEL).all()
