"""The readable formula: what it says must follow from the coefficients."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from smda_callbacks.maths.formula import format_policy

FIGURES: dict[str, Any] = {
    "behaviour": "refusal",
    "target": "probability",
    "lam": 1000.0,
    "r2": 0.83,
    "r2_loo": 0.714,
    "edf": 23.44,
    "n": 313,
}


def text(coef: list[float], **changes: Any) -> str:
    features = [1034, 77, 5, 900][: len(coef)]
    scale = changes.pop("scale", [0.5, 2.0, 1.0, 4.0][: len(coef)])
    return format_policy(features, coef, changes.pop("intercept", 0.41), scale, **(FIGURES | changes))


def test_the_whole_text() -> None:
    got = text([0.12, -0.3, 0.01, 0.004], labels={1034: "fraud, scam"}, top=2)
    assert got.splitlines() == [
        "P(refusal) = 0.41 − 0.30·z[77] + 0.12·z[1034 'fraud, scam']",
        "    (+ 2 smaller terms, |sum| <= 0.014 for |z| <= 1)",
        "with z[j] = activation / scale[j], scales 77: 2, 1034: 0.5",
        "λ = 1000, R² = 0.83, leave-one-out R² = 0.71, edf = 23.4, n = 313",
    ]


def test_logit_target_negative_intercept_and_no_variance() -> None:
    lines = text([0.12], target="logit", intercept=-1.5, r2=np.nan, r2_loo=-0.25).splitlines()
    assert lines[0] == "logit P(refusal) = −1.50 + 0.12·z[1034]"
    assert "R² = undefined (no variance), leave-one-out R² = −0.25" in lines[-1]


def test_terms_come_by_size_and_zeros_are_left_out() -> None:
    got = text([0.1, 0.0, -0.4, 0.2])
    assert re.findall(r"z\[(\d+)\]", got) == ["5", "900", "1034"]
    assert "smaller" not in got


def test_all_zero_is_the_intercept_alone() -> None:
    assert text([0.0, 0.0]).splitlines()[0] == "P(refusal) = 0.41"
    assert len(text([0.0, 0.0]).splitlines()) == 2


def test_small_coefficients_keep_two_digits() -> None:
    assert "+ 0.0012·z[1034] − 3.4e-05·z[77]" in text([0.00123, -0.0000341])


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_on_the_probes_after_rounding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, coef, scale = rng.exponential(1.0, (30, 40)), rng.normal(size=40), rng.uniform(0.2, 3.0, 40)
    rest = np.argsort(-np.abs(coef))[5:]
    got = format_policy(np.arange(40), coef, 0.0, scale, x_max=x.max(axis=0), top=5, **FIGURES)
    found = re.search(r"\+ 35 smaller terms, \|sum\| <= (\S+) on the probes", got)
    assert found is not None
    exact = np.abs(coef[rest]) @ (x.max(axis=0) / scale)[rest]
    assert exact <= float(found[1]) <= 1.11 * exact
    assert np.abs((x / scale)[:, rest] @ coef[rest]).max() <= float(found[1])


def test_one_smaller_term_is_one_term() -> None:
    assert "(+ 1 smaller term, |sum| <= 0.1 for |z| <= 1)" in text([0.2, 0.1], top=1)


def test_labels_are_one_printable_line_of_bounded_length() -> None:
    got = text([0.2, 0.1], labels={1034: "two\nlines\x1b[31m \t red", 77: "w" * 100})
    assert "z[1034 'two lines [31m red']" in got
    assert f"z[77 '{'w' * 39}…']" in got


def test_lines_keep_to_the_width_and_break_between_terms() -> None:
    coef = np.linspace(1.0, 0.1, 30)
    got = format_policy(np.arange(30), coef, 0.0, np.ones(30), top=30, width=60, **FIGURES)
    assert max(map(len, got.splitlines()[:-1])) <= 60
    assert len(re.findall(r"[+−] \d\.\d\d·z\[\d+\]", got)) == 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": [1.0]}, r"1-D and of one length, got \{'features': \(2,\), 'coef': \(2,\), 'scale': \(1,\)"),
        ({"x_max": [1.0, 2.0, 3.0]}, r"one length, got .*'x_max': \(3,\)"),
        ({"target": "odds"}, "target must be one of probability, logit, got 'odds'"),
        ({"top": 0}, "top must be at least 1.*got 0"),
    ],
)
def test_refuses_what_it_cannot_print(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text([0.2, 0.1], **changes)
    with pytest.raises(ValueError, match="Pass one behaviour"):
        format_policy([1, 2], np.ones((2, 1)), 0.0, [1.0, 1.0], **FIGURES)
