"""The benchmark's arithmetic on cases with known answers; the script itself on a tiny model (slow)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from recipes import benchmark_maths, benchmark_readings
from recipes.benchmark_maths import Figure, Times, in_turns, refit, refit_at, sparse_problem
from recipes.benchmark_memory import extra_peaks
from recipes.benchmark_training import Options
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe.batches import tokenize_probes
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.sae import load_sae
from tests.helpers.lower import first_trained
from tests.helpers.tiny import save_sae, tiny_model, tiny_probes, tiny_sae, tiny_tokenizer

ROOT = Path(__file__).parents[2]
KEYS = {"value", "min", "max", "repetitions", "unit", "target", "ok"}


def test_a_figure_is_its_median_with_its_range() -> None:
    row = Figure("x", [1.3, 1.0, 1.1, 1.2, 9.0], "<= 1.15").as_json()
    assert row == {
        "value": 1.2, "min": 1.0, "max": 9.0, "repetitions": 5, "unit": "ratio", "target": "<= 1.15", "ok": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "target", "ok", "said"),
    [
        (1.15, "<= 1.15", True, "ok"),
        (1.16, "<= 1.15", False, "MISSED"),
        (20.0, ">= 20", True, "ok"),
        (19.9, ">= 20", False, "MISSED"),
        (5.0, None, None, "1"),
    ],
)
def test_the_verdict_is_on_the_median(value: float, target: str | None, ok: bool | None, said: str) -> None:
    figure = Figure("x", [value], target)
    assert figure.ok is ok
    assert str(figure).split()[-1] == said


def test_turns_alternate_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the timed functions move: the k-th call of each takes k, of which the processor a part."""
    clock = SimpleNamespace(wall=0.0, cpu=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.wall, process_time=lambda: clock.cpu)
    monkeypatch.setattr(benchmark_maths, "time", fake)
    calls: list[str] = []

    def advance(name: str, wall: float, cpu: float) -> None:
        calls.append(name)
        clock.wall += wall * calls.count(name)
        clock.cpu += cpu * calls.count(name)

    turns = in_turns(lambda: advance("a", 10.0, 4.0), lambda: advance("b", 1.0, 0.5), 3)
    assert calls == ["a", "b"] * 4
    assert turns == [(Times(10.0 * k, 4.0 * k), Times(1.0 * k, 0.5 * k)) for k in (2, 3, 4)]


def test_features_follow_zipfs_law_without_repetition() -> None:
    x, y = sparse_problem(60, 500, active=20)
    assert x.shape == (60, 500)
    assert y.shape == (60, 1)
    assert (np.diff(x.indptr) == 20).all()
    assert all(len(set(row)) == 20 for row in x.indices.reshape(60, 20).tolist())
    single, _ = sparse_problem(20_000, 6, active=1)  # one draw each: the law itself
    shares = np.sort(np.bincount(single.indices, minlength=6))[::-1] / 20_000
    law = 1 / np.arange(1, 7)
    np.testing.assert_allclose(shares, law / law.sum(), atol=0.015)


def test_both_refits_agree_and_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    speedups, difference = refit_at(90, 3000, 2)
    assert len(speedups) == 2
    assert min(speedups) > 0
    assert difference < 1e-8
    monkeypatch.setattr(benchmark_maths, "fit_ridge", lambda x, y, lam: fit_ridge(x, y, 1.01 * lam))
    assert refit_at(90, 3000, 1)[1] > 1e-5


def test_the_refits_figures_and_their_names() -> None:
    found = list(refit(1, (90, 80), {"tiny": 400, "small": 900}))
    assert [figure.name for figure in found] == [
        "refit_speedup_tiny", "refit_speedup_small", "refit_speedup_tiny_n80", "refit_speedup_small_n80",
        "refit_max_abs_diff",
    ]  # fmt: skip
    assert len(found[-1].values) == 4
    assert found[-1].value == max(found[-1].values)
    assert found[-1].ok


def test_the_file_holds_every_figure_and_the_environment() -> None:
    from recipes.benchmark_overhead import as_json

    options = Options("a-model", "an-sae", "pairs.jsonl", "cpu", repeats=2, train_steps=4)
    found = json.loads(json.dumps(as_json([Figure("x", [1.0, 2.0]), Figure("y", [3.0])], options)))
    assert list(found) == ["x", "y", "environment"]
    assert set(found["x"]) == KEYS
    assert found["environment"].items() >= {"model": "a-model", "repeats": 2, "threads": 1, "device": "cpu"}.items()
    assert {"python", "torch", "trl", "scikit-learn", "smda-callbacks", "cpu_count"} <= set(found["environment"])


def test_options_become_the_callbacks_configuration() -> None:
    from recipes.benchmark_training import settings

    options = Options("a-model", "an-sae", "pairs.jsonl", "cpu", 2, 4)
    config: Any = settings(options, {"measure": {"every": 10}})
    assert (config.measure.every, config.sae.source, config.wandb.enabled) == (10, "an-sae", False)
    assert settings(options) == settings(options, {"measure": {"every": 1}})


def test_adapters_of_the_top_half() -> None:
    from recipes.benchmark_savings import CASES, _lora

    for layers, expected in ((3, [2]), (4, [2, 3]), (5, [3, 4])):
        model = get_peft_model(tiny_model(num_hidden_layers=layers), _lora(tiny_model(num_hidden_layers=layers), True))
        assert first_trained(model) == expected[0]
        trained = {name.split("layers.")[1][0] for name, each in model.named_parameters() if each.requires_grad}
        assert trained == set(map(str, expected))
    assert first_trained(get_peft_model(tiny_model(), _lora(tiny_model(), False))) == 0
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Instrument, Any]:
    """Seven probes of different lengths in batches of three, five features of 96, adapters that do something."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    handle = load_sae(save_sae(tiny_sae("jumprelu"), tmp_path_factory.mktemp("sae")))
    built = build_instrument(model, tiny_tokenizer(), handle, tiny_probes(), batch_size=3)
    return built.of_features(np.array([3, 11, 40, 41, 95])), model


TWINS = ("reading_no_tree", "reading_no_buckets", "reading_all_features", "reading_all_logits")


@pytest.mark.parametrize("name", TWINS)
def test_a_reading_without_a_saving_reads_the_same(name: str, watched: tuple[Instrument, Any]) -> None:
    instrument, model = watched
    fast, slow = instrument.read(model), benchmark_readings.twins(instrument)[name](model)
    np.testing.assert_allclose(slow.log_probs, fast.log_probs, rtol=1e-4)
    torch.testing.assert_close(slow.pre * slow.gate, fast.pre * fast.gate, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slow.hidden, fast.hidden, rtol=1e-4, atol=1e-5)


def test_twins_really_do_without_the_savings(watched: tuple[Instrument, Any]) -> None:
    """What goes into the model and comes out of it, and what goes into the SAE."""
    instrument, model = watched
    batches, made = instrument.batches, benchmark_readings.twins(instrument)
    openings, nodes = len(batches.tree.openings), len(batches.tree.tokens)
    seen: list[tuple[int, int, int]] = []

    def after(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        seen.append((*given["input_ids"].shape, output.logits.shape[1]))

    handle = model.register_forward_hook(after, with_kwargs=True)
    shapes = {}
    instrument.read(model)  # savings are tried at the first reading
    for name, read in {"reading": instrument.read, **made}.items():
        read(model)
        seen.clear()
        read(model)
        shapes[name] = list(seen)
    handle.remove()
    assert {each[2] for each in shapes["reading"]} == {nodes}
    assert sum(each[0] for each in shapes["reading_no_tree"]) == 7 * openings
    assert max(each[2] for each in shapes["reading_no_tree"]) == max(map(len, batches.tree.token_paths))
    assert all(logits == columns for _, columns, logits in shapes["reading_all_logits"])
    assert shapes["reading_all_features"] == shapes["reading"]
    columns = {name: sum(rows * wide for rows, wide, _ in each) for name, each in shapes.items()}
    assert columns["reading_no_buckets"] > columns["reading"] == columns["reading_all_logits"]


def test_prompts_and_their_order_are_those_of_the_probes(watched: tuple[Instrument, Any]) -> None:
    instrument, _ = watched
    ids = tokenize_probes(tiny_tokenizer(), tiny_probes(), context=None)
    assert benchmark_readings.prompt_ids(instrument.batches) == ids
    plain = benchmark_readings.in_file_order(instrument.batches)
    assert [sorted(batch.index.tolist()) for batch in plain.batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert plain.padding > instrument.batches.padding


def test_a_twin_that_reads_something_else_gives_no_figure(watched: tuple[Instrument, Any]) -> None:
    instrument, model = watched
    found = instrument.read(model)
    benchmark_readings.check_alike("same", found, found)
    for wrong in (replace(found, log_probs=found.log_probs + 0.01), replace(found, pre=found.pre[:, [1, 0, 2, 3, 4]])):
        with pytest.raises(RuntimeError, match=r"^other does not give the reading's (probabilities|features)"):
            benchmark_readings.check_alike("other", found, wrong)


def test_every_twin_has_a_figure(watched: tuple[Instrument, Any]) -> None:
    instrument, model = watched
    figures = list(benchmark_readings.readings(instrument, model, Options("m", "s", "p", "cpu", 2, 4)))
    assert [figure.name for figure in figures] == list(TWINS)
    assert all(len(figure.values) == 2 and min(figure.values) > 0 for figure in figures)


@pytest.mark.slow
def test_the_whole_script(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    save_sae(tiny_sae(), tmp_path / "sae")
    rows = [{"prompt": f"Tell me about tea {k}.", "completion": f"Sure, tea {k}."} for k in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = ("--quick", "--json", "found.json", "--model", "./tiny", "--sae", "sae", "--pairs", "pairs.jsonl")
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "benchmark_overhead.py"), *options],
        cwd=tmp_path, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=290,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    environment = found.pop("environment")
    assert environment["train_steps"] == 4
    assert {
        "callback_over_probe_forward", "callback_over_probe_forward_cpu", "callback_over_probe_forward_cpu_no_trim",
        "callback_over_probe_forward_cpu_top_half", "callback_over_probe_forward_cpu_top_half_no_keep",
        "callback_over_probe_forward_cpu_system_prompt_no_share_prefix", "kept_of_lower_layers",
        "upper_layers_over_probe_forward", "books_over_probe_forward_cpu", "handed_to_the_host",
        "train_with_over_without",
        "train_with_over_without_every_10", "refit_speedup_16k", "refit_speedup_131k", "refit_max_abs_diff", *TWINS,
    } <= set(found)  # fmt: skip
    for name, row in found.items():
        assert set(row) == KEYS
        assert row["min"] <= row["value"] <= row["max"]
        assert name in done.stdout
    assert found["train_with_over_without"]["value"] > found["train_with_over_without_every_10"]["value"] > 1
    assert found["refit_max_abs_diff"]["ok"]


def _hold(mib: int | None) -> None:
    held = np.ones(2**17 * (mib or 1))  # eight bytes each
    assert held.sum() == held.size


@pytest.mark.slow
def test_extra_memory_is_that_of_the_call_whatever_this_process_holds() -> None:
    before = np.ones(2**17 * 300)
    (figure,) = extra_peaks(_hold, {"extra": 150}, 1)  # type: ignore[dict-item]
    assert before[0] == 1
    assert figure.value == pytest.approx(149, abs=15)
