"""Live effects against steps that are really made again without a pair, and ghost against exact, on the quickstart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from scipy.stats import spearmanr
from transformers.integrations.integration_utils import WandbCallback

from recipes.evidence import one_step
from smda_callbacks.cli.quickstart_run import build, environment
from smda_callbacks.records import Array, PairBook
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.engine import AttributionOptions


def test_correlations_by_hand() -> None:
    names = ["refusal:harmful", "refusal:harmful:logit", "feature:3:x", "feature:3:y"]
    exact = np.array([[1.0, 9.0, 0.1, 0.2], [2.0, 9.0, 0.3, 0.0], [4.0, 9.0, 0.2, 0.3]])
    predicted = exact * [2.0, 0.0, 1.0, 1.0]
    found = one_step.correlations(names, predicted, exact, np.array([[0.3], [0.3], [0.5]]))
    assert found["n_cases"] == 3
    assert found["refusal_r"] == pytest.approx(1.0)
    assert found["policy_r"] == pytest.approx(1.0)
    assert found["policy_gating_r"] == pytest.approx(np.corrcoef([0.3, 0.3, 0.5], [0.3, 0.3, 0.5])[0, 1])
    turned = one_step.correlations(names, -predicted, exact, np.array([[0.3], [0.3], [0.5]]))
    assert turned["refusal_r"] == pytest.approx(-1.0)


def test_one_step_of_the_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight cases: the callback knew what each step without a pair would have come to."""
    assert one_step.main(["--seeds", "1", "--steps", "1", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["seeds"][0]
    assert found["n_cases"] == 8
    assert found["refusal_r"] > 0.98
    assert found["policy_r"] > 0.94
    assert json.loads(capsys.readouterr().out) == found
    assert wandb.run is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ghost_against_exact_on_the_quickstart(tmp_path: Path) -> None:
    """At the default learning rate ranks agree on every group of probes: over the run, and from step to step.

    Shares of the very first step are left out of the latter: AdamW divides gradients by themselves there, so that every
    pair's own part is far larger than the step and no linear split of it says what the part alone would do.
    """
    ghost, exact = (quickstart_books(tmp_path / engine, engine) for engine in ("ghost", "exact"))
    for quantity, first in (("effect", 0), ("share", 1)):
        a, b = ([getattr(book, quantity)[:, :GROUPS] for book in books] for books in (ghost, exact))
        assert lowest_rank_correlation(np.concatenate(a), np.concatenate(b)) >= 0.95, quantity
        for step in range(first, len(a)):
            assert lowest_rank_correlation(a[step], b[step]) >= 0.95, (quantity, step)


def lowest_rank_correlation(a: Array, b: Array) -> float:
    return min(spearmanr(a[:, k], b[:, k]).statistic for k in range(a.shape[1]))


#: Functionals that are means over groups of probes; they come first.
GROUPS = 44


def quickstart_books(folder: Path, engine: Any) -> list[PairBook]:
    """Books of the quickstart's twenty steps."""
    sink = MemorySink()
    folder.mkdir()
    with environment(folder):
        work = build(folder)
        options = AttributionOptions(engine=engine, momentum="line")
        work.callback.plan = replace(
            work.callback.plan, attribution=options, make_sinks=lambda _: [sink], on_error="raise", noise_draws=0
        )
        work.trainer.remove_callback(WandbCallback)
        work.trainer.train()
    assert sink.start is not None
    assert all(name.startswith("refusal:") for name in sink.start.manifest["attribution"]["functionals"][:GROUPS])
    return [window.pairs for window in sink.windows if window.pairs is not None]
