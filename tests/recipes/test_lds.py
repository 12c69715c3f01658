"""The evidence on retraining from one end to the other, small: the order it must come out in, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recipes.evidence import lds, live, removal
from recipes.evidence.methods import rescore
from recipes.evidence.setups import small
from recipes.evidence.stats import spearman
from recipes.evidence.tables import fidelity as fidelity_table
from recipes.evidence.tables import removal as removal_table
from recipes.evidence.truth import Truth


def test_quick_runs_of_fidelity_and_removal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["--quick", "--work", str(tmp_path / "work")]
    assert lds.main([*shared, "--json", str(tmp_path / "lds.json")]) == 0
    result = json.loads((tmp_path / "lds.json").read_text())
    methods = result["setups"]["small"]["methods"]
    for drop in lds.DROPS:
        figure = {method: groups["refusal"][drop]["lds"] for method, groups in methods.items()}
        assert figure["rescore"] > 0.8
        assert figure["rescore"] > figure["kind of pair"] > figure["random"]
        assert abs(figure["random"]) < 0.4
    assert set(methods["rescore"]) == set(result["groups"])
    assert set(methods["kind of pair"]) == {"refusal", "refusal, both sides"}
    assert result["setups"]["small"]["full"][0]["refusal:harmful"] < -0.02
    assert "rescore" in capsys.readouterr().out
    assert "rescore" in fidelity_table("small")(result)

    assert removal.main([*shared, "--json", str(tmp_path / "removal.json")]) == 0
    result = json.loads((tmp_path / "removal.json").read_text())
    found = result["setups"]["small"]["remove"]["0.2"]
    assert found["rescore"]["avoided"] > found["random"]["high"]
    assert found["rescore"]["kinds"]["harmful_complied"] > 0.7
    assert "rescore" in removal_table("small")(result)


@pytest.mark.slow
def test_what_the_callback_says_live_lands_on_the_right_pairs_and_targets(tmp_path: Path) -> None:
    run = Truth(small(), 1, tmp_path).run()
    ghost, exact = live.ghost(run), rescore(run)["rescore"]
    refusal = [k for k, name in enumerate(run.targets) if name.startswith("refusal:")]
    # The two are not the same thing, and six steps from the start are the worst for the live one.
    agreement = spearman(ghost["live ghost"][:, refusal], exact[:, refusal])
    assert agreement[0] > 0.85
    assert agreement.mean() > 0.75
    assert np.isnan(ghost["live ghost"][:, [name.endswith(":gating") for name in run.targets]]).all()
    assert not np.isnan(ghost["in-run SGD form"][:, refusal]).any()


def test_the_reference_of_matched_draws_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        removal.main(["--quick", "--methods", "random"])
    assert "must hold rescore" in capsys.readouterr().err


def test_a_setup_that_is_not_there_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lds.json"
    assert lds.main(["--setups", "midi", "--midi", str(tmp_path / "none"), "--json", str(out)]) == 0
    assert "setup midi left out" in capsys.readouterr().out
