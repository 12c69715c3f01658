"""Formulae of other methods against their definitions, and the choices of the removal test."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recipes.evidence import methods
from recipes.evidence.formulae import datainf, kind_of_pair, random
from recipes.evidence.removal import matched, top


def run_of(targets: tuple[str, ...], rows: list[dict[str, str]], order: int = 0) -> Any:
    setup = SimpleNamespace(kinds=tuple(row["kind"] for row in rows), rows=rows, name="toy")
    return SimpleNamespace(targets=targets, pairs=rows, setup=setup, order=order)


def test_datainf_is_the_mean_of_inverses_of_single_pairs() -> None:
    """Per matrix: H⁻¹ ≈ 1/n Σ_i (g_i g_iᵀ + λI)⁻¹, each by the formula of Sherman and Morrison."""
    own, queries = torch.randn(7, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    wanted = np.zeros((7, 3))
    for part in (slice(0, 4), slice(4, 9)):
        g, q = own[:, part], queries[:, part]
        lam = 0.1 * float(g.square().mean())
        inverse = sum(
            torch.linalg.inv(torch.outer(each, each) + lam * torch.eye(g.shape[1]).double()) for each in g
        ) / len(g)
        wanted += (g @ inverse @ q.T).numpy()
    np.testing.assert_allclose(datainf(own, queries, [4, 5]), wanted, rtol=1e-9)


def test_the_kind_of_a_pair_by_hand() -> None:
    rows = [
        {"kind": "harmful_refused", "category": "fraud"},
        {"kind": "harmful_complied", "category": "theft"},
        {"kind": "benign", "category": "fraud"},
    ]
    found = kind_of_pair(run_of(("refusal:harmful", "refusal:fraud", "feature:3:x"), rows))["kind of pair"]
    np.testing.assert_array_equal(found, [[1, 2, np.nan], [-1, -1, np.nan], [0, 0, np.nan]])


def test_random_scores_differ_between_orders_and_nothing_else() -> None:
    rows = [{"kind": "benign"}] * 5
    first, again, other = (random(run_of(("a", "b"), rows, order))["random"] for order in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_top_pairs_are_the_lowest_or_the_highest() -> None:
    influence = np.array([0.3, -0.5, 0.0, -0.1, 0.9, -0.2, 0.1, 0.2, 0.4, 0.5])
    assert top(influence, "remove", 0.2).tolist() == [1, 5]
    assert top(influence, "add", 0.2).tolist() == [4, 9]


def test_matched_draws_have_the_same_kinds_and_no_pair_twice() -> None:
    kinds = ["a"] * 6 + ["b"] * 3 + ["c"]
    for chosen in matched(kinds, ["a", "b", "b", "a", "c"], draws=5, seed=0):
        assert Counter(kinds[k] for k in chosen) == {"a": 2, "b": 2, "c": 1}
        assert len(set(chosen.tolist())) == 5
    first, second = (matched(kinds, ["a", "b"], draws=5, seed=seed) for seed in (0, 1))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))


# Families -------------------------------------------------------------------------------------------------------------


def test_scores_are_made_once_and_a_peer_that_fails_is_a_row_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def two_rows(run: Any) -> dict[str, Any]:
        calls.append("two")
        return {"a": np.ones((2, 1)), "b": np.full((2, 1), 3.0)}

    def broken(run: Any) -> dict[str, Any]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(methods, "FAMILIES", {"two": two_rows, "peer: x": broken, "own": broken})
    monkeypatch.setattr(methods, "_identity", lambda run: "toy")
    run = run_of(("t",), [{"kind": "benign"}] * 2)
    for _ in range(2):
        missing: dict[str, str] = {}
        found = list(methods.scored(run, ["two", "peer: x"], tmp_path, missing=missing))
        assert [(each.name, each.family) for each in found] == [("a", "two"), ("b", "two")]
        assert found[1].scores.tolist() == [[3.0], [3.0]]
        assert missing == {"x": "RuntimeError: no such thing"}
    assert calls == ["two"]
    with pytest.raises(RuntimeError, match="no such thing"):
        list(methods.scored(run, ["own"], tmp_path))


def test_scores_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "FAMILIES", {"own": lambda run: {"a": np.ones((3, 1))}})
    with pytest.raises(ValueError, match="a gave scores"):
        list(methods.scored(run_of(("t",), [{"kind": "benign"}] * 2), ["own"]))
