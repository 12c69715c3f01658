"""The bare loop against TRL and torch, and what is asked of a run against finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from recipes.evidence.formulae import after_step, pair_gradients
from recipes.evidence.methods import rescore
from recipes.evidence.queries import run_slopes, split_in_torch, state
from recipes.evidence.retrain import Batch, Run, flat_weights, put, rate, recorded_batches, train, warmup_steps
from recipes.evidence.setups import Hyper, Setup, small
from recipes.evidence.truth import Truth, drops
from smda_callbacks.maths.functionals import functional_set, measured
from smda_callbacks.maths.pathways import State, split_shift


@pytest.fixture(scope="module")
def setup() -> Setup:
    return small()


@pytest.fixture(scope="module")
def truth(setup: Setup, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(setup, 0, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def run(truth: Truth) -> Run:
    return truth.run()


# The loop -------------------------------------------------------------------------------------------------------------


def test_with_all_pairs_it_is_trls_training(setup: Setup) -> None:
    """Within rounding: AdamW divides the smallest gradients by themselves, which makes much of their last digits."""
    setup = replace(setup, hyper=replace(setup.hyper, learning_rate=1e-3))
    batches, trl = recorded_batches(setup, order=1)
    model, _ = setup.adapted()
    start = flat_weights(model)
    steps = list(train(model, batches, setup.hyper, np.ones(len(setup.rows))))
    assert len(steps) == setup.hyper.steps(len(setup.rows))
    assert sorted(pair for batch in batches[:3] for pair in batch.pairs) == list(range(24))
    assert (trl - start).norm() > 1e-3 * trl.norm()
    assert (flat_weights(model) - trl).norm() < 1e-5 * trl.norm()


def test_a_weight_of_zero_is_a_pair_that_teaches_nothing(setup: Setup, truth: Truth) -> None:
    """Its labels taken away, with the old denominators, end at the same weights."""
    weights = np.ones(24)
    weights[3] = 0.0
    without = truth.trained(weights)[-1].weights
    taken = [_without(batch, 3) for batch in truth.batches]
    put(truth.model, truth.start_weights)
    again = list(train(truth.model, taken, setup.hyper, np.ones(24)))[-1].weights
    full = truth.trained(np.ones(24))[-1].weights
    assert (without - again).norm() < 1e-6 * without.norm()
    assert (without - full).norm() > 1e-4 * without.norm()


class _Fixed(Batch):
    """A batch with a denominator of its own."""

    whole: int

    @property
    def tokens(self) -> int:
        return self.whole


def _without(batch: Batch, pair: int) -> Batch:
    labels = batch.labels.clone()
    labels[[row for row, each in enumerate(batch.pairs) if each == pair]] = -100
    fixed = _Fixed(batch.pairs, batch.input_ids, batch.attention_mask, labels)
    object.__setattr__(fixed, "whole", batch.tokens)
    return fixed


def test_rates_are_those_of_transformers() -> None:
    hyper = Hyper(learning_rate=3e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=hyper.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps(37, hyper), 37)
    for number in range(1, 38):
        assert rate(number, 37, hyper) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_the_optimizer_is_torchs(setup: Setup, truth: Truth) -> None:
    """Decay and clipping included, on the gradients that the loop met."""
    hyper = replace(setup.hyper, weight_decay=0.1, max_grad_norm=0.2)
    put(truth.model, truth.start_weights)
    steps = list(train(truth.model, truth.batches, hyper, np.ones(24)))
    weight = torch.nn.Parameter(truth.start_weights.clone())
    optimizer = torch.optim.AdamW([weight], betas=hyper.betas, eps=hyper.eps, weight_decay=hyper.weight_decay)
    assert min(step.clip for step in steps) < 1.0
    for step in steps:
        assert (step.weights - weight.detach()).norm() < 1e-6 * weight.detach().norm()
        optimizer.param_groups[0]["lr"] = step.lr
        weight.grad = step.gradient.clone()
        torch.nn.utils.clip_grad_norm_([weight], hyper.max_grad_norm)
        optimizer.step()


# The run --------------------------------------------------------------------------------------------------------------


def test_a_run_holds_its_trajectory(run: Run) -> None:
    assert [step.number for step in run.steps] == list(range(1, 7))
    for step, following in zip(run.steps, run.steps[1:], strict=False):
        wanted = (following.weights, following.first, following.second)
        assert all(map(torch.equal, after_step(run, step), wanted))
    assert torch.equal(after_step(run, run.steps[-1])[0], run.final)
    assert sum(int(np.prod(shape)) for shape in run.shapes) == len(run.final)
    assert torch.equal(flat_weights(run.model()), run.final)


def test_gradients_of_pairs_sum_to_the_steps(run: Run) -> None:
    """A step's gradient is that of its pairs, when every pair is weighed as in this step."""
    step = run.steps[2]
    everywhere = [replace(step, batch=replace(step.batch, pairs=tuple(range(k, k + 8)))) for k in (0, 8, 16)]
    own = pair_gradients(replace(run, steps=tuple(everywhere)), step.weights)
    wanted = own[list(step.batch.pairs)].sum(dim=0)
    assert (wanted - step.gradient).norm() < 1e-5 * step.gradient.norm()


def test_gradients_of_targets_against_finite_differences(run: Run, truth: Truth) -> None:
    torch.manual_seed(0)
    for target in ("refusal:harmful", "refusal:harmless"):
        row = run.queries[run.targets.index(target)]
        values = []
        for sign in (1, -1):
            put(truth.model, run.final + sign * 2e-3 * row / row.norm())
            values.append(truth.measured(state(truth.instrument, truth.model))[truth.names.index(target)])
        assert (values[0] - values[1]) / 4e-3 == pytest.approx(float(row.norm()), rel=1e-2)


def test_rescore_against_retraining(run: Run, truth: Truth) -> None:
    few = replace(run, targets=run.targets[:3], queries=run.queries[:3])
    scores = rescore(few)["rescore"]
    places = [truth.names.index(name) for name in few.targets]
    found = []
    for pair in range(4):
        weights = np.ones((2, 24))
        weights[:, pair] = 1.1, 0.9
        up, down = truth.outcomes(weights)
        found.append((up - down)[places] / 0.2)
    assert np.corrcoef(np.ravel(found), scores[:4].ravel())[0, 1] > 0.99


def test_outcomes_are_kept(truth: Truth, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = drops(24, 2, 0.5, seed=9)
    made = truth.outcomes(weights)
    assert truth._path is not None
    again = Truth(setup, 0, truth._path.parent)
    monkeypatch.setattr(again, "trained", lambda weights: pytest.fail("it was trained again"))
    np.testing.assert_array_equal(again.outcomes(weights), made)
    assert [batch.pairs for batch in again.batches] == [batch.pairs for batch in truth.batches]
    other = Truth(replace(setup, hyper=replace(setup.hyper, learning_rate=1e-3)), 0, truth._path.parent)
    assert other._known == {}


def test_gates_held_change_nothing_where_none_flips(truth: Truth) -> None:
    """With all pairs the gates are those of the training with all pairs."""
    shifts = [name for name in truth.names if name.startswith("feature:") and not name.endswith(":held")]
    plain = truth.full[[truth.names.index(name) for name in shifts]]
    np.testing.assert_allclose(truth.full[[truth.names.index(f"{name}:held") for name in shifts]], plain, atol=1e-12)


# What is asked --------------------------------------------------------------------------------------------------------


def states() -> tuple[State, State]:
    rng = np.random.default_rng(0)
    made = [State(rng.standard_normal((30, 4)), (rng.random((30, 4)) < 0.6) * 1.0, rng.random((30, 1))) for _ in "12"]
    return made[0], made[1]


def test_the_split_in_torch_is_the_split() -> None:
    start, end = states()
    scale = np.array([1.0, 0.5, 2.0, 1.5])
    tensors = tuple(torch.from_numpy(each) for each in (end.pre, end.gate, end.y))
    found = split_in_torch(start, tensors, torch.from_numpy(scale), 3.0)
    wanted = split_shift(start, end, scale=scale, lam=3.0)
    for name, part in (("x", wanted.shift_x_magnitude), ("gating", wanted.shift_x_gating), ("y", wanted.shift_y)):
        np.testing.assert_allclose(found[name].numpy(), part, atol=1e-12)


def test_slopes_of_a_run_against_finite_differences() -> None:
    start, end = states()
    scale = np.ones(4)
    functionals = functional_set(
        behaviours=["refusal"], categories=["a", "b"], refuse=[True, False], groups=np.arange(30) % 2,
        features=[5, 6, 7, 8], gating=True,
    )  # fmt: skip
    found = run_slopes(functionals, start, end, scale=scale, lam=2.0)
    rng = np.random.default_rng(1)
    by_pre, by_y = rng.standard_normal((30, 4)), rng.standard_normal((30, 1))
    ends = [State(end.pre + s * 1e-5 * by_pre, end.gate, end.y + s * 1e-5 * by_y) for s in (1, -1)]
    up, down = (measured(functionals, start, each, scale=scale, lam=2.0) for each in ends)
    predicted = (found.pre * by_pre).sum(axis=(1, 2)) + (found.y * by_y).sum(axis=(1, 2))
    plain = [k for k, name in enumerate(functionals.names) if not name.endswith(":logit")]
    np.testing.assert_allclose(predicted[plain], ((up - down) / 2e-5)[plain], atol=1e-7)
    assert np.abs(predicted[plain]).min() > 1e-4
