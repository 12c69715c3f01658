"""The paper in one go: its numbers against the store, its verdicts on cases with known answers, what it refuses."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recipes import reproduce_paper
from recipes.reproduce_paper import findings, gaps, interferences, limited, pathways, scope
from smda_callbacks.config.load import load_config
from smda_callbacks.report.data import RunData
from smda_callbacks.report.pairs_data import PairData, need_pairs
from smda_callbacks.report.sections_groups import interfering
from smda_callbacks.sinks.pair_table import PairTable, by_feature, column, pair_table
from smda_callbacks.sinks.store_reader import RunStore

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "reproduce_paper.py"
CONFIG = ROOT / "configs" / "tiny_cpu.yaml"
PAIRS = 14
OPTIONS = ["--config", str(CONFIG), "--pairs-limit", str(PAIRS)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script leaves behind, run on what the library ships; what it printed lies beside it."""
    folder = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w", encoding="utf-8") as printed:
        patch.setattr("sys.argv", [str(SCRIPT), *OPTIONS, "--out", str(folder / "out")])
        patch.setattr("torch.cuda.is_available", lambda: False)
        with contextlib.redirect_stdout(printed):
            reproduce_paper.main()
    return folder / "out"


@pytest.fixture(scope="module")
def store(out: Path) -> RunStore:
    return RunStore.open(out / "audit")


@pytest.fixture(scope="module")
def table(store: RunStore) -> PairTable:
    found = pair_table(store.start, store.windows())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def data(store: RunStore) -> RunData:
    return RunData.read(store)


@pytest.fixture(scope="module")
def numbers(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "paper.json").read_text(encoding="utf-8"))
    return found


# Numbers against the store --------------------------------------------------------------------------------------------


def test_the_first_pairs_of_the_library_are_audited(store: RunStore, table: PairTable) -> None:
    assert store.end is not None
    assert store.end.status == "finished"
    assert [window.step for window in store.windows()] == list(range(1, PAIRS + 1))
    assert [pair.rows for pair in table.pairs] == [(k,) for k in range(PAIRS)]
    assert {pair.columns["kind"] for pair in table.pairs} == {"harmful_refused", "harmful_complied", "benign"}


def test_the_base_policy_is_the_stores(numbers: dict[str, Any], store: RunStore) -> None:
    found, quality = numbers["policy"], store.policy.quality[0]
    assert [found[name] for name in ("r2_loo", "r2", "r2_cv")] == [quality.r2_loo, quality.r2, quality.r2_cv]
    assert found["edf"] == store.policy.edf
    assert f"R² is {quality.r2_loo:.2f} leave-one-out, {quality.r2:.2f} in sample" in found["verdict"]
    assert [row["category"] for row in found["rows"]] == list(quality.by_category)
    assert found["rows"][0]["rmse_loo"] == quality.by_category[found["rows"][0]["category"]]["rmse_loo"]


def test_gaps_are_the_stores_and_their_pairs_those_above_noise(
    numbers: dict[str, Any], store: RunStore, table: PairTable
) -> None:
    found = numbers["gaps"]
    assert [row["category"] for row in found["rows"]] == [gap["category"] for gap in store.gaps_start]
    assert found["gaps"] == sum(gap["is_gap"] for gap in store.gaps_start) > 0
    assert found["beyond_by_chance"] == pytest.approx(0.0455 * PAIRS, rel=1e-3)
    assert table.floor is not None
    for row, gap in zip(found["rows"], store.gaps_start, strict=True):
        place = column(table, f"refusal:{gap['category']}")
        effect, above = table.effect[:, place], np.abs(table.effect[:, place]) > 2 * table.floor[:, place]
        wanted = 1 if gap["expected"] == "refuse" else -1
        assert row["closing"] == int((above & (wanted * effect > 0)).sum())
        assert row["widening"] == int((above & (wanted * effect < 0)).sum())
        assert sum(row["closing_kinds"].values()) == row["closing"]
        if row["closing"]:
            best = np.argmax(np.where(above, wanted * effect, -np.inf))
            assert row["most_closing"][0]["pair"] == f"row {best}"
            assert row["most_closing"][0]["effect"] == effect[best]
        if gap["is_gap"]:
            assert f"{gap['category']} ({gap['reason']})" in found["verdict"]


def test_pathways_are_means_of_the_windows_and_the_tests_are_counted(
    numbers: dict[str, Any], store: RunStore, table: PairTable
) -> None:
    found, names = numbers["pathways"], store.manifest["attribution"]["functionals"]
    effects = np.array([window.pairs.effect[0] for window in store.windows() if window.pairs is not None])
    kinds = np.array([pair.columns["kind"] for pair in table.pairs])
    assert found["tests"] == len(found["rows"]) == 3 * len(store.policy.features)
    suffix = {"shift_x_magnitude": "x", "shift_x_gating": "gating", "shift_y": "y"}
    for row in found["rows"]:
        values = effects[:, names.index(f"feature:{row['feature']}:{suffix[row['pathway']]}")]
        for kind in set(kinds.tolist()):
            assert row[f"mean_{kind}"] == pytest.approx(values[kinds == kind].mean(), rel=1e-9, abs=1e-15)
        assert row["p"] == pytest.approx(permuted_p(values, kinds), abs=0.08)
    corrected = [row["p_corrected"] for row in found["rows"]]
    assert found["different"] == sum(p < 0.05 for p in corrected)
    assert min(corrected) == pytest.approx(min(1.0, found["tests"] * min(row["p"] for row in found["rows"])))
    assert f"{found['tests']} permutation tests" in found["verdict"]
    assert f"on {PAIRS} pairs of 3 kinds" in found["verdict"]


def permuted_p(values: np.ndarray, kinds: np.ndarray, resamples: int = 800) -> float:
    """One test on its own, by a plain loop."""

    member = kinds == np.unique(kinds)[:, None]  # [kind, pair]
    rng = np.random.default_rng(7)

    def spread(values: np.ndarray) -> float:
        return float(((member @ values) ** 2 / member.sum(axis=1)).sum())

    seen = spread(values) * (1 - 1e-9)
    return (1 + sum(spread(rng.permutation(values)) >= seen for _ in range(resamples))) / (1 + resamples)


def test_interference_is_the_pair_tables(numbers: dict[str, Any], store: RunStore, table: PairTable) -> None:
    found = numbers["interference"]
    by_pair = {int(row["pair"].removeprefix("row ")): row for row in found["rows"]}
    parts = by_feature(table, table.effect)
    shift = parts["shift_x_magnitude"] + parts["shift_y"]  # gates that switch are left out
    assert sorted(by_pair) == np.flatnonzero(~np.isnan(table.interference)).tolist()
    for p, row in by_pair.items():
        assert row["interference"] == table.interference[p]
        assert row["flagged"] == table.flagged[p]
        assert row["largest"] == table.features[np.abs(shift[p]).argmax()]
        assert row["effect"] == pytest.approx(shift[p, np.abs(shift[p]).argmax()])
        assert row["intended"] == store.policy.features[table.intended[p][table.intended[p] >= 0]].tolist()
    assert found["flagged"] == table.flagged.sum()
    loud = [row["interference"] for row in found["rows"] if row["above_noise"]]
    assert found["above_noise"] == len(loud)
    assert found["median"] == pytest.approx(np.median(loud))
    sums = [sum(row) for row in found["matrix"] if None not in row]
    np.testing.assert_allclose(sums, 1.0)
    assert len(sums) == len({feature for row in found["rows"] for feature in row["intended"]})


# What is written ------------------------------------------------------------------------------------------------------


def test_page_screen_and_files_say_the_same(out: Path, numbers: dict[str, Any]) -> None:
    page, printed = ((out / name).read_text(encoding="utf-8") for name in ("paper.html", "../printed"))
    first = page[page.index("<main>") : page.index('<section id="summary">')]
    for name in ("policy", "gaps", "pathways", "interference"):
        verdict = numbers[name]["verdict"]
        assert escape(verdict, quote=True) in first
        assert verdict in printed
        with (out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [list(row) for row in rows] == [list(row) for row in numbers[name]["rows"]]
        assert len(rows) == len(numbers[name]["rows"])
    assert "This one is a toy" in first
    for section in ("gaps", "groups", "interference", "formula"):
        assert f'<section id="{section}">' in page
        assert f'href="#{section}"' in first
    assert f"smda verify {out / 'audit'}" in printed


def test_the_same_command_again_audits_nothing_and_says_the_same(
    out: Path, store: RunStore, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (out / "audit" / "steps").iterdir()}
    (out / "paper.json").unlink()
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *OPTIONS, "--out", str(out)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    reproduce_paper.main()
    assert {path.name: path.stat().st_mtime_ns for path in (out / "audit" / "steps").iterdir()} == before
    assert json.loads((out / "paper.json").read_text(encoding="utf-8")) == numbers


def test_ctrl_c_says_that_the_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce_paper, "carry_out", stopped)
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *OPTIONS, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as raised:
        reproduce_paper.main()
    assert raised.value.code == 130
    assert f"{tmp_path / 'audit'}. The same command goes on." in capsys.readouterr().err


# Verdicts on known cases ----------------------------------------------------------------------------------------------


def with_table(data: RunData, change: Callable[[PairTable], PairTable]) -> PairData:
    pairs = need_pairs(data)
    return replace(pairs, table=change(pairs.table))


def test_gaps_that_no_pair_reaches_are_said_to_be_no_more_than_chance(data: RunData) -> None:
    loud = with_table(data, lambda table: replace(table, floor=np.full_like(table.effect, 1e3)))
    verdict = gaps(data, loud).verdict
    assert verdict.count("none close it, none widen it, no more than chance") == gaps(data, loud).numbers["gaps"]
    still = with_table(data, lambda table: replace(table, floor=np.zeros_like(table.effect)))
    assert "no more than chance" not in gaps(data, still).verdict


def test_kinds_that_do_the_same_are_not_told_apart(data: RunData) -> None:
    found = pathways(data, with_table(data, lambda table: replace(table, effect=np.zeros_like(table.effect))))
    assert found.numbers["different"] == 0
    assert "not significant, no p is below 0.05: the kinds cannot be told apart" in found.verdict


def test_kinds_that_do_opposites_are_told_apart_and_set_against_noise(data: RunData) -> None:
    signs = {"harmful_refused": 1.0, "harmful_complied": -1.0, "benign": 0.0}

    def opposite(table: PairTable) -> PairTable:
        value = np.array([signs[pair.columns["kind"]] for pair in table.pairs])
        jitter = np.random.default_rng(0).normal(0, 0.01, table.effect.shape)
        return replace(table, effect=value[:, None] + jitter, floor=np.full_like(table.effect, 1e3))

    found = pathways(data, with_table(data, opposite))
    assert found.numbers["different"] == found.numbers["tests"]
    assert found.numbers["different_above_noise"] == 0
    assert "in 0 of them some kind's mean is above 2 times its noise floor" in found.verdict


def test_interference_below_the_noise_floor_is_not_judged(data: RunData) -> None:
    found = interfering(data, need_pairs(data))
    assert found is not None
    quiet = interferences(need_pairs(data), replace(found, above=np.zeros_like(found.above)))
    assert "Interference is below the noise floor and cannot be judged." in quiet.verdict
    assert "median" not in quiet.numbers
    assert interferences(need_pairs(data), None).verdict.startswith("Not judged")


def test_all_findings_come_in_the_papers_order(data: RunData, numbers: dict[str, Any]) -> None:
    assert [each.name for each in findings(data)] == [name for name in numbers if name != "scope"]


def test_only_what_ships_is_called_a_toy() -> None:
    def of(name: str) -> Any:
        return SimpleNamespace(store=SimpleNamespace(manifest={"config": {"model": {"id": name}}}))

    assert "toy" in scope(of("builtin:quickstart/quickstart-chat"))
    assert "toy" not in scope(of("meta-llama/Llama-3.2-3B-Instruct"))


# What is refused before a model is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("sae: {source: x}", r"names no model\. Next step: set model\.id"),
        ("{model: {id: a/b}, sae: {source: x}, measure: {noise_draws: 0}}", r"set measure\.noise_draws"),
        ("{model: {id: a/b}, sae: {source: x}}", r"no pairs for a/b\. Next step: give --pairs FILE"),
    ],
)
def test_a_configuration_that_cannot_do(
    config: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=said):
        reproduce_paper.main()


def job(kinds: str) -> Any:
    from smda_callbacks.config.audit import AuditJob

    rows = [{"prompt": f"p{k}", "completion": "c", "kind": kind} for k, kind in enumerate(kinds)]
    return AuditJob(load_config(CONFIG), rows, Path("nowhere"), None, 0)


def test_the_first_rows_are_taken() -> None:
    assert [row["prompt"] for row in limited(job("abababab"), 5).rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert limited(job("abab"), 200).rows == job("abab").rows


@pytest.mark.parametrize(("kinds", "limit"), [("aaaabbbb", 4), ("aaab", 4), ("aabbcdefg", 9), ("aabb", 0)])
def test_pairs_that_make_no_groups_are_refused(kinds: str, limit: int) -> None:
    with pytest.raises(SystemExit, match=r"have the kinds .*shuffle the file, or raise --pairs-limit"):
        limited(job(kinds), limit)
