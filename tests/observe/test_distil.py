"""Distillation, noise floor, health and labels on tiny models: what they return is what they say."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import Ridge

from smda_callbacks.maths.support import strongest_keeping
from smda_callbacks.observe.distil import DistilOptions, distil
from smda_callbacks.observe.health import sae_health
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.noise import UpdateMeter, _grown, measure_noise, random_readings, trained_parameters
from smda_callbacks.observe.prefixes import PrefixError
from smda_callbacks.observe.sae import SAEHandle, load_sae
from smda_callbacks.records import PATHWAYS, NoiseFloor
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

OPTIONS = DistilOptions(support=6, min_active=3, cv_folds=4)


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> SAEHandle:
    return load_sae(save_sae(tiny_sae(), tmp_path_factory.mktemp("sae") / "s"))


@pytest.fixture
def model() -> Any:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    return adapted.train()


def instrument(model: Any, handle: SAEHandle, **options: Any) -> Instrument:
    return build_instrument(model, tiny_tokenizer(), handle, many_probes(), **options)


def test_the_policy_is_the_ridge_that_scikit_learn_fits_to_what_sae_lens_encodes(model: Any, handle: SAEHandle) -> None:
    full = instrument(model, handle)
    policy, narrowed, baseline = distil(full, model, tiny_tokenizer(), OPTIONS)
    reading = full.read(model)
    with torch.no_grad():
        x = handle.sae.encode(reading.hidden)[:, policy.features].double().numpy()
    y = np.exp(reading.log_probs).sum(axis=1)
    reference = Ridge(alpha=policy.lam).fit(x / x.std(axis=0), y)
    np.testing.assert_allclose(policy.coef[:, 0], reference.coef_, atol=1e-9)
    np.testing.assert_allclose(policy.intercept[0], reference.intercept_, atol=1e-9)
    np.testing.assert_allclose(policy.quality[0].r2, reference.score(x / x.std(axis=0), y), atol=1e-9)
    again = narrowed.read(model)
    np.testing.assert_array_equal(again.pre, baseline.pre)  # the narrowed instrument reads what the full one read
    np.testing.assert_array_equal(again.gate, baseline.gate)
    assert (policy.sae_id, policy.probe_hash, policy.model_id) == ("s", many_probes().hash, "tiny")


def test_support_is_active_often_enough_and_lambda_is_as_strong_as_tolerated(model: Any, handle: SAEHandle) -> None:
    full = instrument(model, handle)
    policy, _, baseline = distil(full, model, tiny_tokenizer(), OPTIONS)
    assert ((baseline.gate > 0).sum(0) >= OPTIONS.min_active).all()
    assert len(policy.features) == OPTIONS.support
    lams, errors = np.array(policy.lam_grid).T
    assert policy.lam == strongest_keeping(lams, errors, OPTIONS.lam_tolerance)
    fixed, _, _ = distil(full, model, tiny_tokenizer(), DistilOptions(support=6, min_active=3, lam=7.0, cv_folds=0))
    assert (fixed.lam, fixed.quality[0].r2_cv) == (7.0, None)


def test_honest_folds_expose_a_policy_of_noise(model: Any, handle: SAEHandle) -> None:
    """On a random model the best of 96 features look good in sample; folds that choose themselves are not fooled."""
    policy, _, _ = distil(instrument(model, handle), model, tiny_tokenizer(), OPTIONS)
    quality = policy.quality[0]
    assert quality.r2_cv is not None
    assert quality.r2_cv < quality.r2


def test_labels_name_the_probes_that_activate_a_feature_most(model: Any, handle: SAEHandle) -> None:
    policy, _, baseline = distil(instrument(model, handle), model, tiny_tokenizer(), OPTIONS)
    x = (baseline.pre * baseline.gate).double().numpy()
    for column, label in enumerate(policy.labels):
        best = int(np.argmax(x[:, column]))
        assert label.feature == policy.features[column]
        assert label.top_probes[0] == (many_probes().probes[best].id, pytest.approx(x[best, column]))
        effects = handle.sae.W_dec[label.feature] @ model.get_base_model().lm_head.weight.T
        assert label.promoted[0] == tiny_tokenizer().decode([int(effects.argmax())])
        assert label.suppressed[0] == tiny_tokenizer().decode([int(effects.argmin())])


def test_neuronpedia_links_where_the_sae_has_them(model: Any, handle: SAEHandle) -> None:
    linked = SAEHandle(**{**vars(handle), "neuronpedia_id": "some-model/1-res"})
    policy, _, _ = distil(instrument(model, linked), model, tiny_tokenizer(), OPTIONS)
    assert policy.labels[0].url == f"https://neuronpedia.org/some-model/1-res/{policy.features[0]}"


def test_what_cannot_be_distilled_is_refused(model: Any, handle: SAEHandle) -> None:
    with pytest.raises(ValueError, match=r"no feature is active on at least 41 of 40 probes.*lower policy.min_active"):
        distil(instrument(model, handle), model, tiny_tokenizer(), DistilOptions(min_active=41))
    with torch.no_grad():
        model.get_base_model().lm_head.weight.zero_()  # every opening is equally likely everywhere
    with pytest.raises(ValueError, match=r"behaviour 'refusal' is the same .* on all 40 probes: nothing to distil"):
        distil(instrument(model, handle), model, tiny_tokenizer(), OPTIONS)


def test_options_of_the_instrument_are_checked(model: Any, handle: SAEHandle) -> None:
    with pytest.raises(ValueError, match=r"target 'odds' .* Allowed targets: probability, logit"):
        instrument(model, handle, target="odds")
    with pytest.raises(PrefixError, match="must have different names and there must be one at least"):
        instrument(model, handle, scorers=())
    with pytest.raises(PrefixError, match=r"'Sorry' \(refusal\) and 'Sorry' \(compliance\) overlap"):
        instrument(model, handle, contrast={"compliance": ("Sorry",)})


def test_a_system_prompt_reaches_the_model(model: Any, handle: SAEHandle) -> None:
    plain, with_system = instrument(model, handle), instrument(model, handle, system="Be kind.")
    assert with_system.batches.n_tokens > plain.batches.n_tokens
    assert not torch.allclose(plain.read(model).hidden, with_system.read(model).hidden)


def test_random_updates_have_the_size_they_say_and_leave_no_trace(model: Any, handle: SAEHandle) -> None:
    reader = instrument(model, handle)
    before = [parameter.detach().clone() for parameter in trained_parameters(model)]
    state = torch.get_rng_state()
    seen = []

    def take() -> Any:
        seen.append(meter.rms())
        return reader.read(model)

    meter = UpdateMeter(model)
    first = [reading.log_probs for reading in random_readings(model, take, size=1e-2, draws=2, seed=5)]
    again = [reading.log_probs for reading in random_readings(model, take, size=1e-2, draws=2, seed=5)]
    np.testing.assert_allclose(seen, 1e-2, rtol=1e-4)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], first[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, trained_parameters(model), strict=True))
    with pytest.raises(ValueError, match="size and draws must be positive"):
        next(random_readings(model, take, size=0.0, draws=2))


def test_the_noise_floor_grows_with_the_update_and_rounding_is_below_it(model: Any, handle: SAEHandle) -> None:
    full = instrument(model, handle)
    policy, narrowed, baseline = distil(full, model, tiny_tokenizer(), OPTIONS)
    snapshot = narrowed.snapshot(0, baseline)
    measure = partial(measure_noise, narrowed, model, policy, snapshot, draws=3)
    small, large = measure(size=1e-4), measure(size=1e-2)
    for part in ("shift_x_magnitude", "shift_y"):
        assert np.linalg.norm(large.random[part]) > 10 * np.linalg.norm(small.random[part])
        assert np.linalg.norm(large.rounding[part]) < 0.1 * np.linalg.norm(large.random[part])
    assert large.behaviour_random.shape == (4, 1)
    assert (large.behaviour_random > 0).all()


def test_a_later_floor_takes_its_rounding_from_the_start_grown_as_the_random_part_has(
    model: Any, handle: SAEHandle
) -> None:
    """Half of the readings, and near what measuring it there gives."""
    full = instrument(model, handle)
    policy, narrowed, baseline = distil(full, model, tiny_tokenizer(), OPTIONS)
    ticks: list[int] = []
    measure = partial(measure_noise, narrowed, model, policy, size=1e-2, draws=6, tick=lambda: ticks.append(1))
    start = measure(narrowed.snapshot(0, baseline))
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
    there = narrowed.snapshot(1, narrowed.read(model))
    measured, made, taken = measure(there, seed=9), len(ticks), measure(there, seed=9, start=start)
    assert (made, len(ticks) - made) == (24, 6)
    np.testing.assert_array_equal(taken.behaviour_random, measured.behaviour_random)
    grown = start.behaviour_rounding * measured.behaviour_random / start.behaviour_random
    np.testing.assert_allclose(taken.behaviour_rounding, grown)
    for found, known in (
        (taken.behaviour_rounding, measured.behaviour_rounding),
        (taken.rounding["shift_y"], measured.rounding["shift_y"]),
    ):
        assert 1 / 3 < np.linalg.norm(found) / np.linalg.norm(known) < 3


def test_rounding_that_was_all_of_the_start_does_not_grow() -> None:
    """A category that is always refused moves by rounding only; later it moves a million times as much."""
    some = {part: np.zeros((1, 1)) for part in PATHWAYS}
    start = NoiseFloor(8, 1e-3, some, some, np.array([[2e-8], [1e-3]]), np.array([[4e-8], [1e-6]]))
    _, behaviour, functional = _grown(start, some, np.array([[1e-2], [3e-3]]), np.zeros(2))
    np.testing.assert_allclose(behaviour, [[4e-8], [3e-6]])
    assert functional is None


def test_health_of_a_known_sae(handle: SAEHandle) -> None:
    """Identity-like checks: nothing moved, everything moved along the decoder, everything moved across it."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, 32, generator=generator)
    still = sae_health(handle, start, start=start, before=start)
    assert (still.jaccard, still.delta_fvu, still.delta_fvu_magnitude) == (1.0, None, None)
    with torch.no_grad():
        acts = handle.sae.encode(start)
        error = start - handle.sae(start)
    assert still.l0 == pytest.approx((acts > 0).sum(1).double().mean().item())
    expected = error.double().square().sum() / (start - start.mean(0)).double().square().sum()
    assert still.fvu == pytest.approx(expected.item(), rel=1e-6)
    moved = start + 0.05 * torch.randn(30, 32, generator=generator)
    health = sae_health(handle, moved, start=start, before=start)
    with torch.no_grad():
        change = (moved - start) - (handle.sae(moved) - handle.sae(start))
    plain = change.double().square().sum() / (moved - start).double().square().sum()
    assert health.delta_fvu == pytest.approx(plain.item(), rel=1e-5)
    assert health.delta_fvu_magnitude is not None
    assert health.jaccard < 1.0


def test_a_change_that_the_sae_expresses_wholly_has_a_delta_fvu_of_zero(tmp_path: Path) -> None:
    """An orthonormal dictionary of ReLU features with all gates open reconstructs every change exactly."""
    sae = tiny_sae("standard", d_sae=32)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(32))
        sae.W_dec.copy_(torch.eye(32))
        sae.b_dec.zero_()
        sae.b_enc.zero_()
    handle = load_sae(save_sae(sae, tmp_path / "s"))
    start = torch.rand(20, 32) + 1.0
    health = sae_health(handle, start + 0.1 * torch.rand(20, 32), start=start, before=start)
    assert health.fvu == pytest.approx(0.0, abs=1e-10)
    assert health.delta_fvu == pytest.approx(0.0, abs=1e-10)
    assert health.delta_fvu_magnitude == pytest.approx(0.0, abs=1e-10)
