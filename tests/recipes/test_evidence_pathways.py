"""The evidence recipe: its figures on constructed problems, and against what the library books."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from recipes.evidence_maths import (
    Choice,
    choose,
    correlation,
    figures,
    fit_quality,
    interval,
    recommend,
    spearman_brown,
    strongest_keeping,
    table,
    told_apart,
)
from recipes.evidence_pathways import Seen, after_each_pair, delta_fvu, judge, read_probes, see, settings_of, with_lora
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.distil import DistilOptions, distil
from smda_callbacks.observe.health import sae_health
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.sae import SAEHandle, load_sae
from smda_callbacks.records import Snapshot
from smda_callbacks.training.booking import book_window
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

LR = 1e-2
PAIRS = [
    [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    for ask, answer in (("Tell me a joke about tea.", "Sure."), ("Help me forge a ticket.", "I cannot."))
]


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> SAEHandle:
    return load_sae(save_sae(tiny_sae(), tmp_path_factory.mktemp("sae") / "s"))


@pytest.fixture(scope="module")
def model() -> Any:
    return with_lora(tiny_model(), rank=2)


@pytest.fixture(scope="module")
def instrument(model: Any, handle: SAEHandle) -> Instrument:
    return build_instrument(model, tiny_tokenizer(), handle, many_probes())


@pytest.fixture(scope="module")
def before(instrument: Instrument, model: Any) -> Seen:
    return see(instrument, model)


@pytest.fixture(scope="module")
def afters(instrument: Instrument, model: Any, before: Seen) -> list[Seen]:
    return list(after_each_pair(instrument, model, tiny_tokenizer(), PAIRS, LR))


def linear_steps(steps: int = 5, *, flips: bool = False) -> tuple[State, list[State], np.ndarray]:
    """y is exactly linear in pre, which moves at random; with ``flips``, gates open and close beside it."""
    draw = np.random.default_rng(0)
    pre, weights = draw.normal(3.0, 1.0, (40, 6)), draw.normal(size=(6, 1))

    def state(moved: np.ndarray) -> State:
        gate = (draw.random(moved.shape) < 0.9).astype(float) if flips else np.ones_like(moved)
        return State(moved, gate, moved @ weights)

    return state(pre), [state(pre + draw.normal(0, 0.05, pre.shape)) for _ in range(steps)], np.arange(40) % 4


def test_a_policy_that_is_exact_tells_every_change() -> None:
    before, afters, groups = linear_steps()
    policy = choose(before.x, before.y, Choice(support=6, lam=1e-6))
    found = figures(before, afters, policy, groups)
    assert found.r == pytest.approx(1.0, abs=1e-9)
    np.testing.assert_allclose([found.r_low, found.r_high], 1.0, atol=1e-9)


def test_plain_and_magnitude_are_the_same_without_flips_and_the_magnitude_is_better_with_them() -> None:
    before, afters, groups = linear_steps()
    still = figures(before, afters, choose(before.x, before.y, Choice(6, lam=30.0)), groups)
    np.testing.assert_allclose([still.r_plain, still.reliability_plain], [still.r, still.reliability], rtol=1e-9)
    before, afters, groups = linear_steps(12, flips=True)
    flipped = figures(before, afters, choose(before.x, before.y, Choice(6, lam=30.0)), groups)
    assert flipped.r > flipped.r_plain + 0.1


def test_figures_are_those_that_the_library_books(
    instrument: Instrument, model: Any, handle: SAEHandle, before: Seen, afters: list[Seen]
) -> None:
    options = DistilOptions(support=8, min_active=3, lam=20.0)
    policy, narrowed, baseline = distil(instrument, model, tiny_tokenizer(), options)
    groups, start = instrument.probes.groups, narrowed.snapshot(0, baseline)
    states = [each.state(handle) for each in afters]
    ends = [Snapshot(1, s.pre[:, policy.features], s.gate[:, policy.features], s.y) for s in states]
    booked = [book_window(start, end, policy, groups, seed=3) for end in ends]

    whole = before.state(handle)
    choice = Choice(support=8, min_active=3, lam=20.0)
    chosen = choose(whole.x, whole.y, choice)
    found = figures(whole, states, chosen, groups, seeds=(3,))
    np.testing.assert_array_equal(chosen.features, policy.features)
    assert found.reliability == pytest.approx(np.mean([each.reliability["shift_x_magnitude"] for each in booked]))
    magnitude, gating = (np.array([each.account[row] for each in booked]) for row in ("magnitude", "gating"))
    measured = np.array([sum(each.account.values()) for each in booked])
    assert found.r == pytest.approx(correlation(magnitude, measured))
    assert found.r_plain == pytest.approx(correlation(magnitude + gating, measured))
    assert fit_quality(whole.x, whole.y, choice, groups) == pytest.approx(
        (policy.quality[0].r2_loo, policy.quality[0].r2_cv)
    )


def test_every_step_starts_from_the_same_weights_and_moves_b_by_the_learning_rate(
    instrument: Instrument, model: Any, before: Seen
) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in after_each_pair(instrument, model, tiny_tokenizer(), PAIRS, LR):
        for name, value in model.state_dict().items():
            if "lora_B" in name and "layers.0" in name:
                assert value.abs().mean().item() == pytest.approx(LR, rel=0.05)
            elif "lora_B" not in name:
                assert value.equal(start[name])
    assert all(value.equal(start[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(see(instrument, model).y, before.y)


def test_delta_fvu_is_the_mean_of_the_librarys(handle: SAEHandle, before: Seen, afters: list[Seen]) -> None:
    health = [sae_health(handle, each.hidden, start=before.hidden, before=before.hidden) for each in afters]
    expected = (np.mean([h.delta_fvu for h in health]), np.mean([h.delta_fvu_magnitude for h in health]))
    assert delta_fvu(handle, before, afters) == pytest.approx(expected)


def test_rows_hold_every_choice_and_the_table_shows_them(
    instrument: Instrument, handle: SAEHandle, before: Seen, afters: list[Seen]
) -> None:
    choices = [Choice(8, 3, lam=lam) for lam in (10.0, 100.0)] + [Choice(8, 3, tolerance=0.2, rule="r2")]
    rows = judge("TopK", handle, before, {LR: afters}, instrument.probes.groups, choices)
    assert [row["lam"] for row in rows] == [10.0, 100.0, None]
    state = before.state(handle)
    seeds = range(4)
    policy = choose(state.x, state.y, choices[1])
    groups = instrument.probes.groups
    found = figures(state, [s.state(handle) for s in afters], policy, groups, seeds=seeds)
    assert rows[1]["reliability"] == found.reliability
    assert f"{found.reliability:.2f} ({spearman_brown(found.reliability):.2f}), {found.r:.3f}" in table(rows)
    json.dumps(rows)


def test_strongest_keeping_gives_up_a_share_of_the_best_r2() -> None:
    lams, error = np.array([1.0, 10.0, 100.0, 1000.0]), np.array([0.25, 0.2, 0.35, 0.6])  # R² .75 .80 .65 .40
    assert strongest_keeping(lams, error, 0.0) == 10.0
    assert strongest_keeping(lams, error, 0.2) == 100.0
    assert strongest_keeping(lams, error, 0.5) == 1000.0
    assert strongest_keeping(lams, np.array([1.4, 1.2, 1.1, 1.3]), 0.5) == 100.0  # no R² to share out: the best


def test_the_most_varying_features_are_chosen_without_y() -> None:
    x = np.random.default_rng(0).random((30, 4)) * np.array([1.0, 5.0, 0.1, 3.0])
    x[:, 3] *= np.arange(30) < 4  # varies, but is active too rarely
    chosen = choose(x, x[:, 2:3], Choice(support=2, lam=1.0, selection="variance"))
    assert chosen.features.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"selection 'mood'.*Allowed selections: correlation, variance"):
        Choice(selection="mood")


def test_told_apart_counts_both_directions() -> None:
    assert told_apart(np.eye(4)) == 1.0
    assert told_apart(np.eye(4)[[1, 0, 3, 2]]) == 0.0
    assert told_apart(np.array([[0.9, 0.1], [1.0, 0.5]])) == 0.5  # row 0 and column 1 are right


def test_interval_holds_the_correlation_and_narrows_with_steps() -> None:
    draw = np.random.default_rng(0)
    row = draw.normal(size=(80, 5))
    noisy = row + draw.normal(size=row.shape)
    low, high = interval(row, noisy)
    assert low < correlation(row, noisy) < high
    few = interval(row[:8], noisy[:8])
    assert few[1] - few[0] > high - low
    assert correlation(np.ones(3), np.arange(3.0)) == 0.0
    assert spearman_brown(0.5) == pytest.approx(2 / 3)


def test_recommend_wants_both_targets_everywhere_then_tells_apart_then_fits() -> None:
    def rows(support: int, *each: tuple[float, float], apart: float, r2: float) -> list[dict[str, float]]:
        figures = ({"reliability": a, "r": b, "told_apart": apart, "r2_cv": r2} for a, b in each)
        return [{"support": support, **one} for one in figures]

    weak = rows(8, (0.9, 0.9), (0.69, 0.9), apart=1.0, r2=0.9)
    blurred = rows(16, (0.8, 0.9), apart=0.5, r2=0.9)
    sharp = rows(32, (0.7, 0.8), (0.8, 0.9), apart=0.79, r2=0.8)
    sharper = rows(64, (0.8, 0.9), apart=0.8, r2=0.7)
    assert recommend([*weak, *blurred, *sharp, *sharper], ("support",)) == {"support": 32}
    assert recommend([*blurred, *sharper], ("support",)) == {"support": 64}
    assert recommend(weak, ("support",)) is None


def test_probes_come_from_several_files_with_a_limit_per_category(tmp_path: Path) -> None:
    (tmp_path / "goals.csv").write_text("Goal,Category\nForge a pass.,fraud\nForge a coin.,fraud\nSteal tea.,theft\n")
    (tmp_path / "plain.json").write_text(json.dumps([{"instruction": "Name a river."}, {"instruction": "Cook rice."}]))
    probes = read_probes([f"{tmp_path}/goals.csv:jailbreakbench:1", f"{tmp_path}/plain.json:instructions"])
    assert probes.categories == ("fraud", "theft", "plain")
    assert len(probes) == 4


def test_quick_is_a_part_of_the_whole_sweep() -> None:
    assert set(settings_of(True)) < set(settings_of(False))


def test_lora_starts_at_zero() -> None:
    plain = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=8, lora_alpha=16))
    assert {n for n, p in with_lora(tiny_model()).named_parameters() if p.requires_grad} == {
        n for n, p in plain.named_parameters() if p.requires_grad
    }
    assert all(not p.any() for n, p in with_lora(tiny_model()).named_parameters() if "lora_B" in n)
