"""What a policy explains, what interventions come to and what a floor calls noise, where the answer is known."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.evidence import explained, faithfulness, ladder, noise, null, reruns
from recipes.evidence.interventions import Case, controls, judged, table
from recipes.evidence.tables import TABLES
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe.activations import parse_hook
from smda_callbacks.observe.instrument import build_instrument
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.records import PATHWAYS
from smda_callbacks.report.data import RunData
from smda_callbacks.sinks.store_reader import RunStore
from tests.helpers.runs import make_run, write_run
from tests.helpers.tiny import many_probes, tiny_model, tiny_sae, tiny_tokenizer

GROUPS = np.arange(60) % 4


def readings(*, bent: bool = False, pairs: int = 8) -> explained.Readings:
    """Steps that move features; behaviour follows the first three in a line, or in a line of its logit."""
    rng = np.random.default_rng(0)
    pre, coef = rng.gamma(2.0, size=(60, 20)), np.array([1.5, -1.0, 1.0, *np.zeros(17)])
    states, scores = [], []
    for number in range(pairs + 1):
        now = pre + (0.05 * rng.normal(size=20) * np.ones((60, 1)) if number else 0.0)
        line = (now - pre.mean(axis=0)) @ coef
        scores.append(1 / (1 + np.exp(-line)) if bent else 0.5 + line / 100)
        states.append(State(now, np.ones_like(now), scores[-1][:, None]))
    p = np.array(scores)[..., None]
    y = {"probability": p, "logit": np.log(p / (1 - p))}
    return explained.Readings({"last": states}, {"last": np.arange(20)}, [torch.zeros(60, 2)] * len(states), y, GROUPS)


def test_a_behaviour_that_is_a_line_of_features_is_explained_wholly() -> None:
    found = readings()
    setting = explained.Setting(support=3, tolerance=0.02)
    expected, r2 = explained.predicted(found, setting)
    assert r2 > 0.97  # the tolerance gives up to 0.02 of it away
    agreement = explained.agreement(expected, found.change("probability"))
    assert agreement["r"] > 0.999
    assert agreement["r_pairs"] > 0.99
    assert 1.0 < agreement["slope"] < 1.2  # a penalty makes predictions too small, never too large


def test_a_bent_behaviour_is_explained_in_logits_and_through_the_slope() -> None:
    found = readings(bent=True)
    r = {}
    for target in explained.UNITS:
        setting = explained.Setting(support=3, tolerance=0.02, target=target)
        r[target] = explained.agreement(explained.predicted(found, setting)[0], found.change(target))
    assert r["logit"]["r"] > 0.999
    assert r["slope"]["r"] > 0.99
    assert r["slope"]["r"] > r["probability"]["r"]
    assert 1.0 < r["slope"]["slope"] < 1.2  # a penalty makes predictions too small, never too large


def test_search_judges_the_best_of_one_half_on_the_other() -> None:
    tried = [explained.Setting(support=1), explained.Setting(support=3, tolerance=0.02)]
    found = explained.search(readings(), tried)
    assert [row["support"] for row in found["settings"]] == [1, 3]
    for row in found["held_out"]:
        assert row["support"] == 3
        assert row["r_held_out"] > 0.999
        assert row["r_default"] < row["r_held_out"]  # the first setting is the default


def test_settings_hold_every_combination_once_and_the_default_first() -> None:
    found = explained.settings(("last", "max"), (16, 32))
    assert found[0] == explained.Setting()
    assert len(found) == len(set(found)) == 2 * 3 * 2 * 2 * len(explained.TOLERANCES)


def test_what_the_sae_expresses_of_a_change() -> None:
    sae = tiny_sae("standard")
    of = SAEHandle("tiny", sae, "standard", parse_hook("blocks.1.hook_resid_post"), 32, 96, None, None)
    model = tiny_model()
    instrument = build_instrument(model, tiny_tokenizer(), of, many_probes(8))
    before = instrument.read(model).hidden
    after = before + 0.01 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    pre, gate = (each.detach() for each in instrument.encode(before))
    expected = (gate * (instrument.encode(after)[0] - pre)) @ sae.W_dec
    whole = ladder.expressed(instrument, before, after, None)
    torch.testing.assert_close(whole, expected.detach(), atol=1e-5, rtol=1e-4)
    sides = [ladder.expressed(instrument, before, after, np.arange(*ends)) for ends in ((0, 40), (40, 96))]
    torch.testing.assert_close(sum(sides), whole, atol=1e-5, rtol=1e-4)
    assert not ladder.expressed(instrument, before, before, None).any()


# Interventions --------------------------------------------------------------------------------------------------------


def case(predicted: list[float], measured: list[float], *, factor: float = 0.0, named: bool = True) -> Case:
    a, b = np.array(predicted), np.array(measured)
    return Case(0, "last", factor, (7,), named, a, a / 2, a, b)


def test_judged_by_hand() -> None:
    predicted = np.array([[0.1, -0.2], [0.001, 0.4]])
    found = judged(predicted, 0.5 * predicted)
    assert found["slope"] == pytest.approx(0.5)
    assert found["r"] == pytest.approx(1.0)
    assert found["rank_r"] == pytest.approx(1.0)
    assert (found["right_sign"], found["said"], found["cases"]) == (1.0, 3, 4)  # 0.001 says nothing
    assert judged(predicted, -predicted)["right_sign"] == 0.0
    mixed = judged(predicted, np.array([[0.1, 0.1], [-9.0, 0.1]]))
    assert mixed["right_sign"] == pytest.approx(2 / 3)
    still = judged(np.zeros((2, 2)), predicted)
    assert still["slope"] is still["right_sign"] is still["rank_r"] is None


def test_table_keeps_factors_controls_and_coefficients_apart() -> None:
    cases = [
        case([0.1, 0.2], [0.05, 0.1]),
        case([-0.1, -0.2], [-0.2, -0.4], factor=2.0),
        case([0.0, 0.0], [0.01, -0.01], named=False),
    ]
    rows = {row["kind"]: row for row in table(cases)}
    assert set(rows) == {"factor 0", "factor 2", "single features"}
    assert rows["factor 0"]["predicted"]["slope"] == pytest.approx(0.5)
    assert rows["factor 0"]["predicted_now"]["slope"] == pytest.approx(1.0)
    assert rows["factor 2"]["predicted"]["slope"] == pytest.approx(2.0)
    assert rows["single features"]["predicted"]["slope"] == pytest.approx((0.025 + 0.1) / 0.1)
    assert rows["factor 0"]["ablated_moves"] == pytest.approx(0.075)
    assert rows["factor 0"]["control_moves"] == pytest.approx(0.01)


def test_controls_write_as_much_as_the_features_they_stand_for() -> None:
    run = make_run(features=6)
    sae = tiny_sae("standard")
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=-1, keepdim=True))
    of = SAEHandle("tiny", sae, "standard", parse_hook("blocks.1.hook_resid_post"), 32, 96, None, None)
    instrument = build_instrument(tiny_model(), tiny_tokenizer(), of, many_probes(8))
    x = np.tile(np.arange(96.0), (8, 1))
    policy = run.start.policy
    moved = {**vars(policy), "features": np.array([10, 11, 12, 50, 70, 90])}
    found = controls(instrument, x, type(policy)(**moved), [1, 3])
    assert found[0] in (9, 13)  # nearest to 11 outside the policy
    assert found[1] in (49, 51)


# Noise ----------------------------------------------------------------------------------------------------------------


def test_hits_by_hand() -> None:
    floor = {**{part: np.full(4, 1.0) for part in PATHWAYS}, null.CATEGORIES: np.full(2, 0.5)}
    changes = {
        "shift_x_magnitude": np.array([2.1, 0.0, 0.0, -3.0]),
        "shift_x_gating": np.array([2.1, 1.9, 0.0, 0.0]),
        "shift_y": np.array([0.0, 0.0, -2.5, 0.0]),
        null.CATEGORIES: np.array([0.9, 1.1]),
    }
    found = null.hits(changes, floor)
    assert found == {
        "shift_x_magnitude": 0.5,
        "shift_x_gating": 0.25,
        "shift_y": 0.25,
        null.ANY: 0.75,
        null.CATEGORIES: 0.5,
    }


def test_bins_of_reliability() -> None:
    windows = [(-0.5, 0.4), (0.1, 0.5), (0.15, 0.7), (0.9, 1.0), (1.0, 0.8)]
    rows = reruns.by_reliability(windows)
    assert [row["windows"] for row in rows] == [1, 2, 0, 0, 0, 2]
    assert [row["same_sign"] for row in rows] == [0.4, pytest.approx(0.6), None, None, None, pytest.approx(0.9)]


def test_signs_between_halves_agree_with_the_stored_reliability(tmp_path: Path) -> None:
    """The run's own reliability is of the halves of seed 0."""
    data = RunData.read(RunStore.open(write_run(tmp_path / "run", make_run(windows=5, features=8))))
    found = reruns.signs_between_halves(data)
    for part in PATHWAYS:
        stored = [window.reliability[part] for window in data.ok if window.reliability[part] is not None]
        assert [r for r, _ in found[part]] == pytest.approx(stored), part
        assert all(0 <= share <= 1 for _, share in found[part])


def test_findings_are_what_the_report_shows(tmp_path: Path) -> None:
    run = make_run(windows=4, features=6, pairs=6)
    data = RunData.read(RunStore.open(write_run(tmp_path / "run", run)))
    found = reruns.findings_of(data)
    assert set(found.changes) == set(data.categories)
    for c, name in enumerate(data.categories):
        assert found.changes[name].value == pytest.approx(data.means[-1, c, 0] - data.means[0, c, 0])
    assert set(found.features) == {str(each) for each in data.policy.features}
    for feature, whole in found.features.items():
        place = data.policy.features.tolist().index(int(feature))
        parts = [sum(window.shift[part][place, 0] for window in data.ok) for part in PATHWAYS]
        assert whole.value == pytest.approx(sum(parts))
        assert found.by_strength[feature].value == pytest.approx(parts[0])
        assert found.by_outputs[feature].value == pytest.approx(parts[2])
    assert len(found.pairs) == 6
    assert found.gaps == {str(gap["category"]) for gap in run.end.gaps if gap["is_gap"]}


def test_halves_of_probes_share_none_and_miss_none() -> None:
    probes = many_probes(40)
    sides = [reruns.half_of(probes, 3, side) for side in (0, 1)]
    ids = [{probe.id for probe in side.probes} for side in sides]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {probe.id for probe in probes.probes}
    assert set(sides[0].categories) == set(probes.categories)


def test_features_of_a_shuffled_sae_are_found_again(tmp_path: Path) -> None:
    """The same SAE with its features in another order: every feature has its namesake, and a new one has none."""
    own, other = tiny_sae("standard"), tiny_sae("standard")
    order = torch.from_numpy(np.random.default_rng(0).permutation(96))
    with torch.no_grad():
        other.W_dec.copy_(own.W_dec[order])
        other.W_dec[0] = torch.randn(32, generator=torch.Generator().manual_seed(5))
    handles = [
        SAEHandle("tiny", sae, "standard", parse_hook("model.layers.1"), 32, 96, None, None) for sae in (own, other)
    ]
    data = RunData.read(RunStore.open(write_run(tmp_path / "run", make_run(features=6))))
    said = reruns.findings_of(data)
    numbers = [0, 5, 17, 33, 60, 95]
    renamed = {old: str(new) for old, new in zip(said.features, numbers, strict=True)}
    here = reruns.of_features(said, renamed)
    found, share = reruns.in_terms_of(here, *handles)
    assert share == pytest.approx(5 / 6)
    assert {str(int(order[k])) for k in numbers[1:]} <= set(found.features)
    assert found.features[str(int(order[17]))] == here.features["17"]


def test_random_moves_are_above_their_own_floor_about_as_often_as_they_should() -> None:
    """A tiny LoRA model: a floor of many draws is passed rarely, but not never, in single steps."""
    from peft import LoraConfig, get_peft_model

    from smda_callbacks.observe.distil import DistilOptions, distil

    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    of = SAEHandle("tiny", tiny_sae("standard"), "standard", parse_hook("blocks.1.hook_resid_post"), 32, 96, None, None)
    full = build_instrument(model, tiny_tokenizer(), of, many_probes(24))
    policy, instrument, _ = distil(full, model, tiny_tokenizer(), DistilOptions(support=6, min_active=2, cv_folds=0))
    watch = null.Watch(model, instrument, policy, 1e-3, 16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    later = copy.deepcopy(model)
    with torch.no_grad():  # its adapter answers twenty times as loudly
        for name, parameter in later.named_parameters():
            parameter.mul_(20.0 if "lora_A" in name else 1.0)
    found = null.false_positives(watch, model, later, draws=16, floors=1, steps=3, walks=2)
    assert tuple(found) == null.KINDS
    assert found[null.HALFWAY] == found[null.TRAINED]  # half of the run is the start here
    for name in ("shift_x_magnitude", "shift_y", null.CATEGORIES):
        assert found[null.TRAINED][name] > 0.5, name
    for kind in ("one step", null.RENEWED):
        for name in ("shift_x_magnitude", "shift_y", null.CATEGORIES):
            assert found[kind][name] < 0.15, (kind, name)
    assert max(found["one step"][name] for name in ("shift_x_magnitude", "shift_y", null.CATEGORIES)) > 0
    assert found["a run"]["of"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Whole ----------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_quick_run_of_faithfulness(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert faithfulness.main(["--quick", "--work", str(tmp_path), "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())["setups"].values()
    assert found["steps"]["ladder"]["stream, all prompt tokens"]["r"] > 0.99
    assert found["steps"]["ladder"]["stream, last prompt token"]["r"] > found["steps"]["ladder"]["policy"]["r"]
    single = [row for row in found["interventions"] if row["kind"] == "single features"]
    assert len(single) == 2  # before and after the training
    assert all(row["predicted"]["right_sign"] > 0.7 for row in single)


@pytest.mark.timeout(900)
def test_a_quick_run_of_noise(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert noise.main(["--quick", "--work", str(tmp_path), "--json", str(out)]) == 0
    (found,) = json.loads(out.read_text())["setups"].values()
    assert set(found["survival"]) == {"order", "adapter"}
    assert found["survival"]["order"]["category rose or fell, above noise"]["share"] > 0.6
    assert set(found["null"]) == set(null.KINDS)
    assert {row["of"] for kind, row in found["null"].items() if kind != "a run"} == {2}
    assert sum(row["windows"] for row in found["reliability"]["all"]) > 0


def test_tables_say_what_the_results_hold() -> None:
    row = {"r": 0.5, "r_low": 0.4, "r_high": 0.6, "slope": 2.0, "r_pairs": 0.9, "r_categories": 0.3}
    best = {"support": 32, "tolerance": 0.1, "readout": "last", "target": "slope", "standardised": True}
    best |= {"r_chosen_on": 0.98, "r_held_out": 0.95, "r_default": 0.8}
    said = {"slope": 0.4, "r": 0.7, "rank_r": None, "right_sign": 0.9, "said": 31}
    act = {"step": 10, "where": "last", "kind": "factor 0", "predicted": said}
    kept = {"order": {"alert": {"share": 0.9, "chance": 0.1, "statements": 8}}, "sae": {}}
    moves = {"one step": {**dict.fromkeys([*PATHWAYS, null.ANY, null.CATEGORIES], 0.05), "of": 12.0}}
    bins = {"all": [{"from": 0.8, "to": 1.0, "windows": 3, "same_sign": 0.95}]}
    steps = {"settings": [row], "held_out": [best, best], "ladder": {"policy": row}}
    found = {
        "steps": steps,
        "interventions": [act, {**act, "kind": "single features"}],
        "survival": kept,
        "null": moves,
    }
    result = {
        "setups": {"midi": {**found, "reliability": bins}},
        "date": "2026-01-02",
        "quick": False,
        "versions": {"a": "1"},
    }
    texts = {name: TABLES[f"{name}-midi"][1](result) for name in ("survival", "null", "signs", "interventions")}
    texts |= {name: TABLES[f"faithfulness-{name}-midi"][1](result) for name in ("settings", "ladder")}
    assert "| alert | 0.90 (0.10) | – |" in texts["survival"]
    assert "| one step | 0.050 | 0.050 | 0.050 | 0.050 | 0.050 | 12 |" in texts["null"]
    assert "| 0.8 to 1 | 0.95 | 3 |" in texts["signs"]
    assert "| 10, last, factor 0 | 0.40 | 0.70 | – | 0.90 | 31 |" in texts["interventions"]
    assert "single features" not in texts["interventions"]
    assert "| policy | 0.500 [0.40, 0.60] | 2.00 | 0.90 | 0.30 |" in texts["ladder"]
    assert "32 features, tolerance 0.1, last, slope, standardised | odd | 0.980 | 0.950 | 0.800 |" in texts["settings"]
    assert all(text.endswith("2026-01-02; a 1.") for text in texts.values())
