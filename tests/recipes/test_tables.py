"""Tables between markers: made from results, found out of date, and faults of markers named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.evidence import tables

STAMP = {"date": "2026-01-02", "orders": [0, 1, 2], "versions": {"torch": "2.0"}}


def figure(lds: float) -> dict[str, float]:
    return {"lds": lds, "low": lds - 0.1, "high": lds + 0.05}


LDS: dict[str, Any] = {
    **STAMP,
    "setups": {
        "quickstart": {
            "methods": {
                "random": {"refusal": {"half": figure(0.0), "tenth": figure(0.01)}},
                "rescore": {
                    "refusal": {"half": figure(0.93), "tenth": figure(0.98)},
                    "coefficient": {"half": figure(0.64)},
                },
            },
            "cpu_seconds": {"random": 0.01, "rescore": 61.7},
            "missing": {"peer": "not installed"},
        }
    },
}
REMOVAL: dict[str, Any] = {
    **STAMP,
    "setups": {
        "quickstart": {
            action: {
                share: {
                    "random": {"avoided": 0.05, "low": -0.1, "high": 0.2},
                    "rescore": {"avoided": 0.6},
                }
                for share in shares
            }
            for action, shares in (("remove", ("0.05", "0.1")), ("add", ("0.1",)))
        }
    },
}


def test_a_table_of_fidelity_by_hand() -> None:
    assert tables.fidelity("quickstart")(LDS).splitlines() == [
        "| method | refusal, half left out | a tenth | ΔX, half | ΔY, half | coefficient, half | CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| rescore | 0.93 [0.83, 0.98] | 0.98 [0.88, 1.03] | – | – | 0.64 | 62 |",
        "| random | 0.00 [-0.10, 0.05] | 0.01 [-0.09, 0.06] | – | – | – | 0 |",
        "",
        "2026-01-02; orders of the pairs: 3; torch 2.0.",
        "peer: left out (not installed).",
    ]


def test_a_table_of_removal_by_hand() -> None:
    assert tables.removal("quickstart")(REMOVAL).splitlines()[:4] == [
        "| chosen by | without the top 5% | without the top 10% | twice the top 10% |",
        "| --- | ---: | ---: | ---: |",
        "| rescore | 0.60 | 0.60 | 0.60 |",
        "| random | 0.05 [-0.10, 0.20] | 0.05 [-0.10, 0.20] | 0.05 [-0.10, 0.20] |",
    ]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "lds.json").write_text(json.dumps(LDS))
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- evidence:lds-quickstart -->\nold\n<!-- /evidence:lds-quickstart -->\nbehind\n")
    return file


def test_markers_are_filled_and_checked(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(page), "--results", str(page.parent)]
    old = page.read_text()
    assert tables.main([*arguments, "--check"]) == 1
    assert page.read_text() == old
    assert "is not what the results say" in capsys.readouterr().out
    assert tables.main(arguments) == 0
    made = page.read_text()
    assert "| rescore | 0.93 [0.83, 0.98]" in made
    assert "old" not in made
    assert made.startswith("before\n")
    assert made.endswith("\nbehind\n")
    assert tables.main([*arguments, "--check"]) == 0
    assert tables.main(arguments) == 0
    assert page.read_text() == made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- evidence:nothing -->", "no table 'nothing'. Allowed: lds-quickstart"),
        ("<!-- evidence:lds-quickstart -->", "needs one"),
        ("<!-- /evidence:lds-quickstart --> <!-- evidence:lds-quickstart -->", "needs one"),
        ("<!-- evidence:removal-midi --> <!-- /evidence:removal-midi -->", "removal.json, which is not there"),
    ],
)
def test_faults_are_named(page: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text(text)
    assert tables.main([str(page), "--results", str(page.parent)]) == 2
    assert said in capsys.readouterr().err
    assert page.read_text() == text


@pytest.mark.parametrize("name", ["README.md", "recipes/evidence/README.md"])
def test_what_is_written_is_what_the_results_say(name: str) -> None:
    file = Path(tables.__file__).parents[2] / name
    assert "<!-- evidence:lds-quickstart -->" in file.read_text(encoding="utf-8")
    assert tables.main([str(file), "--check"]) == 0
