"""``smda distill``: the policy that a run would start from, printed, and saved so that a configuration takes it up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smda_callbacks.config.build import build_plan, load_policy
from smda_callbacks.config.load import load_config
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe.distil import distil
from smda_callbacks.observe.instrument import build_instrument
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.records import policy_hash
from tests.helpers.equal import assert_same
from tests.helpers.tiny import many_probes, tiny_model, tiny_tokenizer


def test_it_is_the_policy_of_a_run(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    """Saved, read back, and distilled again by hand: the same to the last bit."""
    found = smda("distill", "--config", shelf.config, "--out", tmp_path / "policy", "--json")
    assert found.code == 0, found.err
    saved = load_policy(tmp_path / "policy")
    model, tokenizer = tiny_model(name=shelf.model), tiny_tokenizer()
    config = load_config(shelf.config)
    instrument = build_instrument(model, tokenizer, load_sae(shelf.sae), many_probes(40))
    policy, narrowed, reading = distil(instrument, model, tokenizer, build_plan(config).distil)
    assert policy_hash(saved) == policy_hash(policy)
    assert_same(saved, policy)
    snapshot = narrowed.snapshot(0, reading)
    fit = fit_ridge(snapshot.x, snapshot.y, found.json["lam"], scale=saved.scale)
    assert fit.coef == pytest.approx(saved.coef, rel=1e-9)
    assert found.json["features"] == saved.features.tolist()
    assert (found.json["n_probes"], found.json["n_features"]) == (40, 8)
    assert found.json["r2_loo"] == saved.quality[0].r2_loo
    assert found.json["out"] == str(tmp_path / "policy")


def test_a_configuration_takes_the_saved_policy_up(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    smda("distill", "--config", shelf.config, "--out", tmp_path / "policy")
    text = Path(shelf.config).read_text().replace("policy:\n", f"policy:\n  path: {tmp_path / 'policy'}\n")
    file = Path(shelf.config).parent / "with_policy.yaml"
    file.write_text(text)
    plan = build_plan(load_config(file))
    assert plan.policy is not None
    assert policy_hash(plan.policy) == policy_hash(load_policy(tmp_path / "policy"))


def test_people_see_formula_quality_gaps_and_lambda(shelf: Any, smda: Callable[..., Any]) -> None:
    found = smda("distill", *shelf.options, "--config", shelf.config, "--top", 2)
    assert found.code == 0, found.err
    assert re.search(r"P\(refusal\) = .*\(\+ 6 smaller terms", found.out, re.S)
    for category in ("theft", "benign", "forgery", "borderline"):
        assert category in found.out
    assert "Gaps: 2 categories" in found.out  # a random model refuses nothing
    assert "over-refusal: more" in found.out
    assert re.search(r"λ = [\d.e+]+, 8 features, [\d.]+ degrees of freedom", found.out)


def test_nothing_is_overwritten(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    (tmp_path / "policy.json").write_text("{}")
    found = smda("distill", "--config", shelf.config, "--out", tmp_path)
    assert found.code == 2
    assert re.search(r"holds policy.json already, and nothing is overwritten. Next step: choose another", found.err)
    assert (tmp_path / "policy.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probes", "none.jsonl"], r"'none.jsonl' does not exist. Next step"),
        (["--sae", "none"], r"'none' is no folder here, and no sae_id is given. Next step"),
        (["--model", "none-such"], r"model 'none-such' cannot be loaded"),
        (["--top", "0"], r"top must be at least 1"),
    ],
)
def test_bad_input_is_2(options: list[str], message: str, shelf: Any, smda: Callable[..., Any]) -> None:
    found = smda("distill", "--config", shelf.config, *options)
    assert found.code == 2
    assert re.search(message, found.err)
    assert "Traceback" not in found.err
