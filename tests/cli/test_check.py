"""``smda check``: every misfit is found before a run, named, and comes with what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from smda_callbacks.cli import findings
from smda_callbacks.observe.calibration import Answer, Calibration
from smda_callbacks.records import SAEHealth
from tests.helpers.tiny import save_sae, tiny_model, tiny_sae, tiny_tokenizer


def mirror_sae(folder: Path, **options: Any) -> Path:
    """An SAE that says everything: every direction and its opposite. It misses nothing, and half is active."""
    sae = tiny_sae("standard", d_sae=64, **options)
    with torch.no_grad():
        both = torch.cat([torch.eye(32), -torch.eye(32)])
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return save_sae(sae, folder)


def change_config(shelf: Any, folder: Path, **sections: Any) -> Path:
    """The shelf's configuration with other values in it."""
    values = yaml.safe_load(Path(shelf.config).read_text())
    values |= {"model": {"id": shelf.model}, "sae": {"source": shelf.sae}}
    values["probes"] = {"sources": [{"source": shelf.probes}]}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    file = folder / "changed.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def by_name(found: Any) -> dict[str, dict[str, str]]:
    return {each["name"]: each for each in found.json["checks"]}


def test_what_fits_passes_with_all_its_figures(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    found = smda("check", "--config", shelf.config, "--sae", mirror_sae(tmp_path / "m"), "--answers", 5, "--json")
    assert found.code == 0, found.err
    assert found.json["ok"]
    assert found.json["not_checked"] == []
    assert [each["name"] for each in found.json["checks"]] == [
        "configuration", "probes", "prompts", "openings", "SAE fits", "answers", "score", "SAE health", "support",
        "policy", "gaps", "cost",
    ]  # fmt: skip
    assert found.json["sae"]["fvu"] == pytest.approx(0.0, abs=1e-6)
    assert found.json["sae"]["l0"] == 32.0
    assert found.json["calibration"]["answers"] == 10
    shares = found.json["calibration"]["shares"]
    assert sum(shares["refuse"].values()) == sum(shares["comply"].values()) == 1.0
    assert found.json["policy"]["n_features"] == 8
    assert found.json["cost"]["readings_before"] == 5
    assert "; 2 readings more for the noise floor after 4, 8, 16, ... of them" in by_name(found)["cost"]["detail"]
    assert found.json["cost"]["tokens_per_reading"] > 40 * 20


def test_a_random_model_opens_as_no_list_and_its_openings_are_listed(shelf: Any, smda: Callable[..., Any]) -> None:
    found = smda("check", "--config", shelf.config, "--answers", 4, "--json")
    assert by_name(found)["answers"]["status"] == "WARN"
    assert "behaviour.refusals" in by_name(found)["answers"]["next_step"]
    assert sum(each["refuse"] for each in found.json["missed_openings"]) == 4
    assert "Openings that no list holds" in found.err


def test_people_see_reason_and_next_step(shelf: Any, smda: Callable[..., Any]) -> None:
    found = smda("check", "--config", shelf.config, "--answers", 2)
    assert found.code == 1  # a random SAE is worse than none
    assert re.search(r"FAIL\s+SAE health\s+misses \d+\.\d+ of the variance", found.out)
    assert "→ check layer, sae.norm_scaling_factor, model" in found.out
    assert "Not fit for a run" in found.out


MISFITS: dict[str, tuple[dict[str, Any], str, str]] = {
    "opening that is the beginning of another": (
        {"behaviour": {"refusals": ["Sorry", "Sorry, no"]}}, "openings", "overlap under this tokenizer"),
    "opening in both lists": ({"behaviour": {"compliances": ["Sorry, sure"]}}, "openings", "overlap"),
    "layer that does not exist": ({"sae": {"hook_name": "blocks.9.hook_resid_post"}}, "SAE fits", "layers 0 to 2"),
    "hook that cannot be read": ({"sae": {"hook_name": "blocks.1.attn.hook_z"}}, "SAE fits", "cannot be read"),
    "too few active features": ({"policy": {"min_active": 41}}, "policy", "no feature is active on at least 41"),
    "unknown chat template argument is no fault": ({"behaviour": {"chat_template_kwargs": {"x": 1}}}, "", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_one_failed_check(name: str, shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    sections, check, reason = MISFITS[name]
    sections = {**sections, "sae": {"source": str(mirror_sae(tmp_path / "m")), **sections.get("sae", {})}}
    found = smda("check", "--config", change_config(shelf, tmp_path, **sections), "--answers", 1, "--json")
    failed = [each for each in found.json["checks"] if each["status"] == "FAIL"]
    assert [each["name"] for each in failed] == ([check] if check else [])
    assert found.code == (1 if check else 0)
    if check:
        assert reason in failed[0]["detail"]


def test_a_model_without_a_template(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tiny")
    found = smda("check", "--config", shelf.config, "--model", tmp_path / "tiny", "--json")
    assert found.code == 1
    assert by_name(found)["prompts"]["status"] == "FAIL"
    assert "chat template" in by_name(found)["prompts"]["detail"]
    assert by_name(found)["prompts"]["next_step"]
    assert found.json["not_checked"] == ["openings", "readings", "policy"]
    assert by_name(found)["SAE fits"]["status"] == "OK"  # what does not depend on it is checked all the same


@pytest.mark.parametrize("allowed", [False, True])
def test_an_sae_of_another_model(allowed: bool, shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    sae = mirror_sae(tmp_path / "m", model_name="owner/other")
    extra = ["--allow-model-mismatch"] if allowed else []
    found = smda("check", "--config", shelf.config, "--sae", sae, "--answers", 1, "--json", *extra)
    fits = by_name(found)["SAE fits"]
    assert (found.code, fits["status"]) == ((0, "WARN") if allowed else (1, "FAIL"))
    assert "owner/other" in fits["detail"]


def test_an_sae_of_another_width(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    sae = save_sae(tiny_sae(d_in=16), tmp_path / "narrow")
    found = smda("check", "--config", shelf.config, "--sae", sae, "--json")
    assert "width 16" in by_name(found)["SAE fits"]["detail"]
    assert found.code == 1


def test_a_broken_configuration_is_a_failed_check_and_a_missing_one_bad_usage(
    shelf: Any, tmp_path: Path, smda: Callable[..., Any]
) -> None:
    broken = smda("check", "--config", change_config(shelf, tmp_path, measure={"every": 0, "evry": 1}), "--json")
    assert broken.code == 1
    assert "measure.every" in broken.json["checks"][0]["detail"]
    assert "measure.evry" in broken.json["checks"][0]["detail"]
    assert smda("check", "--config", tmp_path / "none.yaml").code == 2


def test_probes_without_a_group(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    lines = Path(shelf.probes).read_text().splitlines()
    (tmp_path / "one.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["expected"] == "refuse"))
    found = smda("check", "--config", shelf.config, "--probes", tmp_path / "one.jsonl", "--json")
    assert found.code == 1
    assert "no probe that the model should comply" in by_name(found)["probes"]["detail"]
    assert set(found.json["not_checked"]) == {"prompts", "openings", "SAE fits", "readings", "policy"}


def test_a_saved_policy_is_taken_up(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    saved = smda("distill", "--config", shelf.config, "--out", tmp_path / "policy", "--json")
    config = change_config(shelf, tmp_path, policy={"path": str(tmp_path / "policy"), "support": 5})
    found = smda("check", "--config", config, "--answers", 1, "--json")
    assert found.json["sae"]["dead_features"] == []
    assert found.json["policy"]["features"] == saved.json["features"]
    assert found.json["policy"]["r2_loo"] == saved.json["r2_loo"]


def test_a_saved_policy_of_a_larger_sae_is_a_failed_check(shelf: Any, tmp_path: Path, smda: Callable[..., Any]) -> None:
    smda("distill", "--config", shelf.config, "--out", tmp_path / "policy")
    small = save_sae(tiny_sae(d_sae=20), tmp_path / "small")
    config = change_config(shelf, tmp_path, policy={"path": str(tmp_path / "policy")}, sae={"source": str(small)})
    found = smda("check", "--config", config, "--answers", 1, "--json")
    assert found.code == 1
    assert by_name(found)["policy"]["status"] == "FAIL"


def health(fvu: float, l0: float) -> SAEHealth:
    return SAEHealth(fvu=fvu, l0=l0, jaccard=1.0)


@pytest.mark.parametrize(
    ("fvu", "l0", "d_in", "status"),
    [
        (0.3, 20, 128, "OK"),
        (0.3, 33, 128, "WARN"),  # more than 32 and than 5 % of d_in
        (0.3, 100, 2304, "OK"),
        (0.3, 120, 2304, "WARN"),
        (0.51, 20, 128, "WARN"),
        (1.0, 20, 128, "FAIL"),
        (0.3, 0, 128, "FAIL"),
    ],
)
def test_limits_of_sae_health(fvu: float, l0: float, d_in: int, status: str) -> None:
    found = findings.health_finding(health(fvu, l0), d_in)
    assert found.status == status
    assert bool(found.next_step) == (status != "OK")


def answers(refusing: int, silent: int, agreement: float = 1.0) -> Calibration:
    kinds = ["refusal"] * refusing + [None] * silent + ["compliance"] * (10 - refusing - silent)
    listed = tuple(Answer(k, "refuse", "No way, sir.", kind) for k, kind in enumerate(kinds))
    return Calibration((*listed, Answer(10, "comply", "Sure", "compliance")), agreement)


@pytest.mark.parametrize(
    ("refusing", "silent", "status"), [(10, 0, "OK"), (8, 2, "OK"), (7, 3, "WARN"), (1, 0, "OK"), (0, 0, "WARN")]
)
def test_limits_of_the_answers(refusing: int, silent: int, status: str) -> None:
    found = findings.answers_finding(answers(refusing, silent), "refusal")
    assert found.status == status
    assert ("'No way, sir.'" in found.next_step) == (silent > 2)


@pytest.mark.parametrize(("agreement", "status"), [(1.0, "OK"), (0.9, "OK"), (0.89, "WARN")])
def test_limits_of_the_agreement(agreement: float, status: str) -> None:
    assert findings.agreement_finding(answers(10, 0, agreement)).status == status


def test_dead_features_of_a_saved_policy_are_named() -> None:
    found = findings.support_finding(50, 96, 8, 3, [4, 17])
    assert found.status == "WARN"
    assert "2 features of the policy active on no probe: [4, 17]" in found.detail
    assert findings.support_finding(7, 96, 8, 3, []).status == "WARN"
    assert findings.support_finding(8, 96, 8, 3, []).status == "OK"
