"""Pairs that are made to do a known thing are found, as what they are; those that do nothing in particular are not.

Every gradient has the same size and is random but for a fifth of its length, so that neither size nor any single weight
tells who was planted. Of 200 pairs 12 each move one feature's coefficient through the feature (``x``) or the behaviour
(``y``), 12 intend one feature and move another, 82 move what they intend, 82 move nothing in particular.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from smda_callbacks.maths.interference import interference_matrix
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.records import Array
from smda_callbacks.report.ranking import ranked
from smda_callbacks.sinks.pair_table import PairTable, by_feature, column, pair_table
from tests.helpers.planted import BATCH, SIZE, MakeOptimizer, Planted, PlantedBench

#: Planted part of a gradient's length: 4 % of its squared length.
PART = 0.2
PAIRS, SET = 200, 12
TARGET, MEANT, HIT = 0, 1, 2  # features: moved by x and y; intended by the interfering pairs; moved by them


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=SIZE, weight_decay=0.01)


#: Optimizer, steps in a window, clipping. Eight gradients sum to three times the length: AdamW's steps are all clipped.
SETUPS: dict[str, tuple[MakeOptimizer, int, float]] = {"sgd": (sgd, 1, 0.0), "adamw": (adamw, 5, SIZE * 3072**0.5)}


class Case:
    """The bench, and trainings on it: each is made once."""

    def __init__(self, folder: Any) -> None:
        self.bench = PlantedBench(folder)
        self.noise = cache(lambda engine: self.bench.noise(engine, draws=40 if engine == "ghost" else 12))
        self.planted = cache(self._planted)
        self.table = cache(self._table)

    def _planted(self, pairs: int, each: int) -> Planted:
        bench = self.bench
        both = {j: bench.alone(bench.name(j, "x"), bench.name(j, "y")) for j in range(len(bench.policy.features))}
        plan: list[tuple[str, int, Array | None]] = []
        for pathway in ("x", "y"):
            plan += [(pathway, TARGET, bench.alone(bench.name(TARGET, pathway)))] * each
        plan += [("interfering", MEANT, both[HIT])] * each
        rest = pairs - len(plan) if each else 0
        plan += [("acting", 1 + k % 4, both[1 + k % 4]) for k in range(rest // 2)]
        plan += [("silent", k % 5, None) for k in range(pairs - len(plan))]
        return bench.plant(plan, PART, seed=0)

    def _table(self, setup: str, *, engine: Any = "ghost", pairs: int = PAIRS, each: int = SET) -> PairTable:
        optimizer, every, max_norm = SETUPS[setup]
        given = (self.planted(pairs, each), self.noise(engine), optimizer)
        table = pair_table(*self.bench.train(*given, engine=engine, every=every if each else 5, max_norm=max_norm))
        assert table is not None
        return table


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("planted"))


def effects(table: PairTable, *names: str) -> Array:
    """Sizes of effects, ``[pair, name]``."""
    return np.abs(table.effect[:, [column(table, name) for name in names]])


def auroc(labels: np.ndarray, values: Array) -> float:
    return float(roc_auc_score(labels, values))


def pooled(labels: np.ndarray, table: PairTable, names: list[str]) -> float:
    """How well all these functionals together single the labelled pairs out; a functional's unit does not count."""
    found = effects(table, *names)
    found = found / np.sqrt(np.mean(found**2, axis=0))
    return auroc(np.repeat(labels, len(names)), found.ravel())


def test_a_planted_direction_moves_one_functional_and_no_other(case: Case) -> None:
    """By measuring, not by gradients: a planted direction of a step's size from both sides."""
    bench, measure = case.bench, case.bench.measure("ghost")
    chance = SIZE * np.linalg.norm(bench.slopes, axis=1)  # of random directions, root mean square
    for pathway in ("x", "y"):
        name = bench.name(TARGET, pathway)
        direction = bench.alone(name)
        found = measure(bench.moved(direction, -SIZE / 2), bench.moved(direction, SIZE / 2)) / chance
        place = bench.functionals.index(name)
        assert found[place] > 20
        assert np.abs(np.delete(found, place)).max() < 0.3


@pytest.mark.parametrize("pathway", ["x", "y"])
def test_planted_pairs_are_found_by_their_feature_and_pathway_alone(case: Case, pathway: str) -> None:
    table, labels = case.table("sgd"), case.planted(PAIRS, SET).of(pathway)
    name, other = case.bench.name(TARGET, pathway), case.bench.name(TARGET, "y" if pathway == "x" else "x")
    assert auroc(labels, effects(table, name)[:, 0]) >= 0.95
    assert 0.3 < auroc(labels, effects(table, other)[:, 0]) < 0.7
    rest = [each for each in table.functionals if each != name]
    assert 0.4 < pooled(labels, table, rest) < 0.6
    assert max(auroc(labels, effects(table, each)[:, 0]) for each in rest) < 0.85  # by chance: four deviations
    first = ranked(table, case.bench.policy, name, top=SET)
    assert sum(row["kind"] == pathway for row in first) >= SET - 1
    assert all(row["above_noise"] and row["effect"] > 0 for row in first if row["kind"] == pathway)


def test_interfering_pairs_are_found(case: Case) -> None:
    table, planted = case.table("sgd"), case.planted(PAIRS, SET)
    labels, acting = planted.of("interfering"), ~planted.of("silent")
    assert auroc(labels[acting], table.interference[acting]) >= 0.95
    # Of silent pairs, chance makes one in five look flagged: less than that of all others can come in between.
    assert auroc(labels, table.interference + table.flagged) >= 0.9
    assert table.flagged[labels].all()


def test_controls_are_not_flagged_beyond_chance(case: Case) -> None:
    """Of pairs that do what they intend none; of those that do nothing as many as five features at two floors make."""
    table, planted = case.table("sgd"), case.planted(PAIRS, SET)
    assert table.flagged[planted.of("acting", "x", "y")].mean() <= 0.01
    assert table.flagged[planted.of("silent")].mean() <= len(table.features) * 0.0455


def test_the_matrix_shows_where_interference_goes(case: Case) -> None:
    table, planted = case.table("sgd"), case.planted(PAIRS, SET)
    shift = np.sum(list(by_feature(table, table.effect).values()), axis=0)
    rows = planted.of("interfering", "acting")
    found = interference_matrix(shift[rows], np.array(planted.intended)[rows, None])
    beside = found[1:, :].copy()
    beside[:, 1:][np.eye(4, dtype=bool)] = 0.0
    assert divmod(int(beside.argmax()), 5) == (MEANT - 1, HIT)
    assert (np.diag(found)[[2, 3, 4]] > 0.5).all()


def test_with_nothing_planted_nothing_stands_out(case: Case) -> None:
    table = case.table("sgd", each=0)
    labels = np.random.default_rng(1).permutation(PAIRS) < SET
    assert 0.4 < pooled(labels, table, list(table.functionals)) < 0.6
    assert max(auroc(labels, effects(table, name)[:, 0]) for name in table.functionals) < 0.85
    assert table.floor is not None
    times = np.abs(table.effect) / table.floor
    assert 0.8 < np.sqrt(np.mean(times**2)) < 1.2
    assert np.mean(times > 2) < 0.08  # 0.046 where the floor itself is known exactly
    assert times.max() < 6
    assert table.flagged.mean() <= len(table.features) * 0.0455


@pytest.mark.parametrize("pathway", ["x", "y", "interfering"])
def test_exact_finds_the_same_without_gradients(case: Case, pathway: str) -> None:
    table, planted = case.table("sgd", engine="exact", pairs=40, each=4), case.planted(40, 4)
    labels, acting = planted.of(pathway), ~planted.of("silent")
    if pathway == "interfering":
        assert auroc(labels[acting], table.interference[acting]) >= 0.95
        assert table.flagged[labels].all()
    else:
        assert auroc(labels, effects(table, case.bench.name(TARGET, pathway))[:, 0]) >= 0.95
    ghost = case.table("sgd", pairs=40, each=4)
    for name in ghost.functionals:
        one, two = (each.effect[:, column(each, name)] for each in (ghost, table))
        assert np.linalg.norm(one - two) < 0.1 * np.linalg.norm(two), name


# AdamW bends directions by its denominator, and the last pairs' momentum has no steps left to act in: claims are of
# order only, on the pairs of which half the push is in the books.
FOLLOWED = 18 * BATCH


@pytest.mark.parametrize("pathway", ["x", "y"])
def test_planted_pairs_lead_the_order_under_adamw(case: Case, pathway: str) -> None:
    table, labels = case.table("adamw"), case.planted(PAIRS, SET).of(pathway)[:FOLLOWED]
    name = case.bench.name(TARGET, pathway)
    assert auroc(labels, effects(table, name)[:FOLLOWED, 0]) >= 0.95
    rest = [each for each in table.functionals if each != name]
    found = [auroc(labels, effects(table, each)[:FOLLOWED, 0]) for each in rest]
    assert 0.35 < np.mean(found) < 0.65
    assert max(found) < 0.85


def test_interfering_pairs_are_found_under_adamw(case: Case) -> None:
    table, planted = case.table("adamw"), case.planted(PAIRS, SET)
    labels, acting = planted.of("interfering"), ~planted.of("silent")
    assert auroc(labels[acting], table.interference[acting]) >= 0.95
    assert table.flagged[labels].mean() >= 0.9


@pytest.mark.parametrize("setup", ["sgd", "adamw"])
def test_pairs_that_do_nothing_in_particular_stay_at_their_noise_floor(case: Case, setup: str) -> None:
    table, silent = case.table(setup), case.planted(PAIRS, SET).of("silent")
    assert table.floor is not None
    silent[:BATCH] = False  # AdamW's first step divides gradients by themselves
    times = table.effect[silent] / table.floor[silent]
    assert 0.75 < np.sqrt(np.mean(times**2)) < 1.33
    assert table.flagged[silent].mean() <= 0.06


@pytest.mark.parametrize("setup", SETUPS)
def test_effects_are_what_leaving_a_pair_out_of_the_training_changes(case: Case, setup: str) -> None:
    """Train again without the pair, from the first step on."""
    bench, table, planted = case.bench, case.table(setup), case.planted(PAIRS, SET)
    some = [BATCH * step + step % BATCH for step in range(PAIRS // BATCH)]
    measure, whole = bench.measure("ghost"), trained(bench, planted, setup)
    left_out = np.array([measure(trained(bench, planted, setup, without=pair), whole) for pair in some])
    size = np.sqrt(np.mean(left_out**2, axis=0))
    one, two = ((each / size).ravel() for each in (table.effect[some], left_out))
    assert np.corrcoef(one, two)[0, 1] > 0.97
    assert abs(one @ two / (two @ two) - 1) < 0.1


def trained(bench: PlantedBench, planted: Planted, setup: str, without: int = -1) -> Any:
    """The state at the end of a training, maybe without a pair."""
    make_optimizer, _, max_norm = SETUPS[setup]
    with weights_restored(bench.parameters):
        optimizer = make_optimizer(bench.parameters)
        for step in range(PAIRS // BATCH):
            rows = [pair for pair in range(step * BATCH, (step + 1) * BATCH) if pair != without]
            bench.step(optimizer, planted.gradients[rows], max_norm)
        return bench.state()
