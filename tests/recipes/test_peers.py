"""Other people's attribution gets our question and answers it: where it should be a plain product, it is."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.evidence import peers_bergson, peers_dattri, peers_kronfluence, peers_overhead
from recipes.evidence.peers import PEERS, peer_versions
from recipes.evidence.peers_given import Given, PeerError, checked, collate, given, pair_gradients
from recipes.evidence.retrain import (
    Run,
    adamw,
    flat_weights,
    layout,
    losses,
    put,
    recorded_batches,
    train,
    trl_trainer,
)
from recipes.evidence.setups import Hyper, quickstart

PAIRS, TARGETS = 24, 5


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order; transformers reads its own deprecated names."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def run() -> Run:
    """Three real steps on the quickstart model, one epoch: every pair is trained on once. Targets are random."""
    setup = quickstart(Hyper(learning_rate=1e-3, epochs=1), take=PAIRS)
    batches, _ = recorded_batches(setup, 0)
    model, tokenizer = setup.adapted()
    steps = tuple(train(model, batches, setup.hyper, np.ones(PAIRS)))
    final = flat_weights(model)
    queries = torch.randn(TARGETS, len(final), generator=torch.Generator().manual_seed(1))
    names = tuple(f"target {k}" for k in range(TARGETS))
    unused = cast(Any, None)
    return Run(setup, 0, setup.pairs(tokenizer), *layout(model), steps, final, names, queries, unused, 1.0)


@pytest.fixture(scope="module")
def question(run: Run) -> Given:
    return given(run)


@pytest.fixture(scope="module")
def gradients(question: Given) -> Tensor:
    return pair_gradients(question)


@pytest.fixture(scope="module")
def products(run: Run, gradients: Tensor) -> Any:
    """What a pair does to a target if its gradient is followed once: less of the target where the two agree."""
    return -(gradients.double() @ run.queries.double().T).numpy()


def same(found: Any, wanted: Any, tolerance: float = 1e-4) -> bool:
    """Within ``tolerance`` of the largest."""
    return bool(np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max())


# What peers are given, without any of them ----------------------------------------------------------------------------


def test_the_twin_of_a_target_has_its_gradient(run: Run, question: Given) -> None:
    asked = question.copy()
    weights = [asked.model.get_parameter(f"{name}.weight") for name in question.sites]
    twins = asked(torch.arange(TARGETS))
    for k, twin in enumerate(twins):
        found = torch.cat([each.flatten() for each in torch.autograd.grad(twin, weights, retain_graph=True)])
        assert torch.allclose(found, run.queries[k], rtol=1e-6, atol=1e-7)


def test_a_pair_weighs_what_it_weighed_in_its_step(run: Run, question: Given, gradients: Tensor) -> None:
    # At the weights of the last step the pairs of that step add up to the gradient that was followed.
    step = run.steps[-1]
    asked = replace(question, model=run.model(step.weights))
    own = pair_gradients(asked)[list(step.batch.pairs)]
    followed = step.gradient * step.clip
    assert (own.sum(dim=0) - followed).norm() < 1e-3 * followed.norm()
    assert (gradients[list(step.batch.pairs)] - own).norm() > 0.01 * own.norm()  # training went on


def test_a_model_that_is_handed_out_is_a_copy(question: Given) -> None:
    before = {name: each.clone() for name, each in question.model.named_parameters()}
    with torch.no_grad():
        for each in question.copy().parameters():
            each.zero_()
    assert all(torch.equal(each, before[name]) for name, each in question.model.named_parameters())


@pytest.mark.parametrize("bad", [np.zeros((PAIRS, 1)), np.full((PAIRS, TARGETS), np.nan)])
def test_scores_that_cannot_be_used_are_refused(question: Given, bad: Any) -> None:
    with pytest.raises(PeerError, match="someone gave"):
        checked(bad, question, "someone")


def test_versions_are_those_of_what_is_there() -> None:
    assert all(metadata.version(name) == found for name, found in peer_versions().items())
    there = {"kronfluence", "dattri_llm", "bergson"} & {each.name for each in pkgutil.iter_modules()}
    assert {name.replace("-", "_") for name in peer_versions()} == there


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("kronfluence EK-FAC", "kronfluence"),
        ("dattri-LLM EK-FAC", "dattri_llm"),
        ("dattri-LLM AdamW-influence", "dattri_llm"),
        ("Bergson callback", "bergson"),
    ],
)
def test_a_peer_that_is_absent_says_so(name: str, package: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [each for each in sys.modules if each.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])
    with pytest.raises(PeerError, match=rf"{package}.*recipes/evidence/README.md"):
        PEERS[name](run)


class _Without:
    """An installation without one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


# kronfluence ----------------------------------------------------------------------------------------------------------


def test_kronfluence_without_curvature_is_the_product(question: Given, products: Any) -> None:
    pytest.importorskip("kronfluence")
    assert same(peers_kronfluence.ekfac(question, strategy="identity"), products)


@pytest.mark.slow
def test_kronfluence_with_curvature_is_the_slow_formula(question: Given) -> None:
    pytest.importorskip("kronfluence")
    assert same(peers_kronfluence.ekfac(question, empirical=True), slow_ekfac(question, damping=0.1), 1e-2)


@pytest.mark.slow
def test_kronfluence_draws_the_same_labels_every_time(question: Given) -> None:
    pytest.importorskip("kronfluence")
    torch.manual_seed(5)
    found = peers_kronfluence.ekfac(question)
    assert torch.initial_seed() == 5
    torch.manual_seed(6)
    assert same(peers_kronfluence.ekfac(question), found, 1e-3)
    assert not same(peers_kronfluence.ekfac(question, empirical=True), found, 1e-1)


# dattri-LLM -----------------------------------------------------------------------------------------------------------


def test_dattri_tracin_is_the_product(question: Given, products: Any) -> None:
    pytest.importorskip("dattri_llm")
    assert same(peers_dattri.tracin(question), products)


def test_dattri_curvature_agrees_with_the_slow_formula(question: Given) -> None:
    pytest.importorskip("dattri_llm")
    found = peers_dattri.ekfac(question, relative=0.1)
    assert same(found, slow_ekfac(question, damping=0.1, moved=True), 3e-2)  # eigenvectors in float32


def test_dattri_curvature_as_it_comes_is_all_but_the_product(question: Given, products: Any) -> None:
    """Its damping is an absolute 1e-3, far above the spectrum of these gradients: why a relative one is shown too."""
    pytest.importorskip("dattri_llm")
    assert same(peers_dattri.ekfac(question) * 1e-3, products, 0.1)


def test_adamw_influence_of_the_last_step_is_what_leaving_out_does_to_it(run: Run) -> None:
    pytest.importorskip("dattri_llm")
    found, step = peers_dattri.adamw_influence(run), run.steps[-1]
    gradients = pair_gradients(replace(given(run), model=run.model(step.weights)))
    # The method is of first order, and Adam's first steps are far from that: a thousandth of a pair were too much.
    with_it, share = after(run, 0.0, gradients[0]), 1e-6
    for pair in step.batch.pairs:
        moved = (with_it - after(run, share, gradients[pair])) / share
        assert np.allclose(found[pair], run.queries.double() @ moved, rtol=1e-3, atol=1e-3 * np.abs(found).max())


def after(run: Run, share: float, gradient: Tensor) -> Tensor:
    """Where the last step ends if this share of a gradient is left out of it, in float64."""
    step = run.steps[-1]
    flat, first, second = (each.double() for each in (step.weights, step.first, step.second))
    flat = flat.clone()
    adamw(flat, first, second, step.gradient.double() * step.clip - share * gradient.double(), step, run.setup.hyper)
    return flat


def slow_ekfac(question: Given, damping: float, *, moved: bool = False) -> Any:
    """EK-FAC with the empirical Fisher, by the book: eigenbases of both covariances, spectrum from the gradients.

    ``moved``: covariances of those tokens only that have a gradient.
    """
    asked = question.copy()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in question.sites}
    for name in question.sites:

        def keep(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            output.register_hook(lambda gradient: seen[name].append((args[0][0].detach(), gradient[0])))

        asked.model.get_submodule(name).register_forward_hook(keep)
    for row in question.train_rows():
        asked(**collate([cut(row)])).sum().backward()
    total = torch.zeros(PAIRS, TARGETS, dtype=torch.float64)
    for name, queries in zip(question.sites, question.queries, strict=True):
        inputs, outputs = (torch.cat(each).double() for each in zip(*seen[name], strict=True))
        used = (outputs != 0).any(dim=1) | (not moved)
        inputs, outputs = inputs[used], outputs[used]
        into, out = (torch.linalg.eigh(each.T @ each).eigenvectors for each in (inputs, outputs))
        own = torch.stack([out.T @ (g.double().T @ a.double()) @ into for a, g in seen[name]])
        spectrum = own.square().mean(dim=0)
        wanted = out.T @ queries.double() @ into / (spectrum + damping * spectrum.mean())
        total -= torch.einsum("poi,toi->pt", own, wanted)
    return total.numpy()


def cut(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row without its padding."""
    end = int(row["attention_mask"].sum())
    return {name: each[:end] if each.dim() else each for name, each in row.items()}


# Bergson --------------------------------------------------------------------------------------------------------------


def test_bergson_keeps_the_gradient_of_a_pair_at_its_step(run: Run, question: Given, tmp_path: Path) -> None:
    pytest.importorskip("bergson")
    raw = {"projection_dim": 0, "use_optimizer_state": False, "dtype": np.dtype(np.float32)}
    (rows,) = peers_bergson.stored_rows(run, tmp_path, **raw)
    step = run.steps[-1]
    own = pair_gradients(replace(question, model=run.model(step.weights)))[list(step.batch.pairs)] / step.clip
    kept = torch.from_numpy(rows[list(step.batch.pairs)]) @ torch.from_numpy(peers_bergson.query_rows(question, 0)).T
    assert same(kept.numpy(), (own.double() @ run.queries.double().T).numpy(), 1e-3)
    assert np.allclose(np.linalg.norm(rows[list(step.batch.pairs)], axis=1), own.norm(dim=1), rtol=1e-3)


def test_bergson_raw_scores_are_the_sum_over_steps(run: Run, question: Given) -> None:
    pytest.importorskip("bergson")
    wanted = np.zeros((PAIRS, TARGETS))
    for step in run.steps:
        own = pair_gradients(replace(question, model=run.model(step.weights)))[list(step.batch.pairs)] / step.clip
        wanted[list(step.batch.pairs)] -= (own.double() @ run.queries.double().T).numpy()
    assert same(peers_bergson.raw(run), wanted, 1e-3)


def test_bergson_as_it_comes_blows_up_where_v_is_zero(run: Run) -> None:
    """Why raw gradients are shown beside it: it divides by the root of the v of the step before.

    The matrices A get no gradient until B has moved, which takes two steps of this run. In the third their rows are
    divided by zero, but for the 1e-8 beside it.
    """
    pytest.importorskip("bergson")
    found = np.abs(peers_bergson.defaults(run)).max(axis=1)
    second, third = ([found[pair] for pair in run.steps[k].batch.pairs] for k in (1, 2))
    assert np.median(third) > 100 * np.median(second)


def test_bergson_says_where_its_run_was_another(run: Run) -> None:
    pytest.importorskip("bergson")
    with pytest.raises(PeerError, match="from ours"):
        peers_bergson.raw(replace(run, order=1))


# During training ------------------------------------------------------------------------------------------------------

NEEDS = {"Bergson callback": "bergson", "dattri-LLM capture": "dattri_llm", "dattri-LLM live scores": "dattri_llm"}


@pytest.fixture(scope="module")
def plain(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Tensor]:
    """Loss and weights of the training that nobody watches."""
    trainer = trl_trainer(run.setup, run.order, tmp_path_factory.mktemp("plain"))
    trainer.train()
    return trainer.state.log_history[-1]["train_loss"], flat_weights(trainer.model)


@pytest.mark.parametrize("name", list(peers_overhead.OVERHEAD_PEERS))
def test_nobody_changes_the_training(name: str, run: Run, plain: tuple[float, Tensor], tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    trainer = trl_trainer(run.setup, run.order, tmp_path)
    with peers_overhead.OVERHEAD_PEERS[name](trainer):
        trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == plain[0]
    assert torch.equal(flat_weights(trainer.model), plain[1])


@pytest.mark.parametrize("name", ["dattri-LLM live scores", "plain hooks, live scores"])
def test_live_scores_are_products_with_the_held_rows(name: str, run: Run, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    trainer = trl_trainer(run.setup, run.order, tmp_path)
    rows = peers_overhead.held_rows(trainer)
    with peers_overhead.OVERHEAD_PEERS[name](trainer) as watch:
        trainer.train()
    step = run.steps[-1]
    model = trainer.model
    put(model, step.weights)
    weights = [model.get_submodule(site).weight for site in run.names]
    held = torch.autograd.grad(model(**rows).loss, weights)
    own = losses(model, step.batch) / step.batch.tokens
    wanted = [
        sum(
            float((a * b).sum())
            for a, b in zip(torch.autograd.grad(each, weights, retain_graph=True), held, strict=True)
        )
        for each in own
    ]
    assert same(np.array(list(watch.last_scores), dtype=np.float64), np.array(wanted), 1e-2)
