"""The overhead benchmark: trainings in turns are the training alone, figures and slopes of cases with known answers."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from recipes.benchmark_training import settings
from recipes.evidence import overhead, overhead_scaling, overhead_turns
from recipes.evidence.cost_machine import CPU_THREAD, Machine
from recipes.evidence.cost_parts import parts
from recipes.evidence.overhead_modes import ByHand, Mode, make_trainer
from recipes.evidence.overhead_parts import Parts, peak_of
from recipes.evidence.overhead_scaling import growth, slope
from recipes.evidence.overhead_setups import MODEL, Case, Setup, random_setup, words_of
from recipes.evidence.overhead_turns import Racer, blocks, race, ratios, unlike
from smda_callbacks.config.build import builtin_path
from smda_callbacks.observe.batches import chat_prompt

TINY = Case(width=32, layers=3, adapted=3, probes=16, prompt=12, answer=12, features=64, support=4, pairs=4)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return random_setup("model", TINY, tmp_path_factory.mktemp("setup"))


@pytest.fixture(scope="module")
def tiny(setup: Setup) -> Parts:
    return Parts(setup)


def test_texts_are_as_long_as_asked_for_and_no_two_alike() -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin_path(MODEL))
    source = words_of(tokenizer, random.Random(0), 12)
    texts = [next(source) for _ in range(40)]
    lengths = {len(tokenizer(chat_prompt(tokenizer, text), add_special_tokens=False)["input_ids"]) for text in texts}
    assert lengths == {12}
    assert len(set(texts)) == 40


def test_a_set_up_has_the_sizes_that_it_says(tiny: Parts) -> None:
    """Sixteen probes of 12 tokens and 12 of openings; four pairs of two texts each 12 tokens long, one start shared."""
    work = tiny.work()
    assert [(each.rows, each.columns) for each in work.probes] == [(16, 24)]
    assert work.nodes == 13
    assert [(each.rows, each.columns) for each in work.train] == [(4, 25)]
    assert (work.support, work.features, work.hook, work.pairs) == (4, 64, 1, 4)


def _trainer(setup: Setup, name: str, folder: Path, steps: int) -> Any:
    return make_trainer(setup, Mode(name), folder, steps)


def test_trainings_in_turns_are_the_training_alone(setup: Setup, tmp_path: Path) -> None:
    """The measured one draws random numbers, the plain ones do not notice, and one that was changed is told apart."""

    @contextlib.contextmanager
    def disturbed(trainer: Any) -> Iterator[None]:
        trainer.args.learning_rate *= 1.001
        yield

    alone = _trainer(setup, "plain", tmp_path / "alone", 3)
    alone.train()
    racers = [
        Racer("plain", _trainer(setup, "plain", tmp_path, 3)),
        Racer("step", _trainer(setup, "step", tmp_path, 3)),
        Racer("short", _trainer(setup, "plain", tmp_path, 2)),
        Racer("disturbed", _trainer(setup, "plain", tmp_path, 3), disturbed),
    ]
    order: list[str] = []
    for racer in racers:
        racer.turn = _noted(racer.turn, racer.name, order)  # type: ignore[method-assign]
    race(racers)
    assert all(racer.error is None and racer.done for racer in racers)
    assert [len(racer.seconds) for racer in racers] == [3, 3, 2, 3]
    assert racers[0].losses == [row["loss"] for row in alone.state.log_history if "loss" in row]
    assert racers[0].weights[-1] == overhead_turns._digest(alone.model)
    assert unlike(racers, racers[0]) == ["disturbed"]
    assert order[:8] == ["plain", "step", "short", "disturbed", "disturbed", "short", "step", "plain"]
    assert racers[1].start > 0
    assert min(racers[1].seconds) > 0


def _noted(turn: Callable[[], None], name: str, order: list[str]) -> Callable[[], None]:
    def noted() -> None:
        order.append(name)
        turn()

    return noted


def test_a_training_that_fails_ends_alone(setup: Setup, tmp_path: Path) -> None:
    @contextlib.contextmanager
    def absent(trainer: Any) -> Iterator[None]:
        raise ImportError("no such peer")
        yield

    racers = [
        Racer("plain", _trainer(setup, "plain", tmp_path, 2)),
        Racer("a peer", _trainer(setup, "plain", tmp_path, 2), absent),
    ]
    race(racers)
    missing: dict[str, str] = {}
    assert [racer.name for racer in overhead._that_ran(racers, missing)] == ["plain"]
    assert missing == {"a peer": "ImportError: no such peer"}
    racers[0].error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="training 'plain' failed: broken"):
        overhead._that_ran(racers, {})


def test_ratios_are_taken_over_whole_blocks_after_the_warm_up() -> None:
    plain: Any = SimpleNamespace(seconds=[9.0] * 10 + [1.0] * 25)
    watched: Any = SimpleNamespace(seconds=[99.0] * 10 + ([1.0] * 9 + [6.0]) * 2 + [50.0] * 5)
    assert [list(block)[:2] for block in blocks(35, 10, 10)] == [[10, 11], [20, 21]]
    assert ratios(watched, plain, 10, 10) == [1.5, 1.5]
    short: Any = SimpleNamespace(seconds=[99.0, 4.0, 2.0])
    even: Any = SimpleNamespace(seconds=[9.0, 1.0, 2.0, 7.0])
    assert ratios(short, even, 1, 1) == [4.0, 1.0]
    assert ratios(short, even, 1, 2) == [2.0]
    assert ratios(short, even, 10, 10) == [2.0]  # too short for a block: all but the first step


def test_what_one_writes_by_hand_reads_what_the_library_reads(setup: Setup, tiny: Parts) -> None:
    """Probabilities of refusing, and features of the whole dictionary at the last prompt token."""
    config = settings(setup.options, setup.chosen)
    by_hand = ByHand.of(config, AutoTokenizer.from_pretrained(setup.options.model))
    by_hand.read(tiny.model)
    reading = tiny.off.instrument.read(tiny.model)
    probability = np.exp(reading.log_probs).sum(axis=1)
    np.testing.assert_allclose(by_hand.y, probability, rtol=1e-3)
    features = tiny.off.policy.features
    np.testing.assert_allclose(by_hand.x[:, features], (reading.pre * reading.gate).numpy(), atol=2e-5)
    assert by_hand.coef.shape == (64,)
    assert by_hand.ids["input_ids"].numel() > 10 * 16 * 24


def test_slopes_of_powers_are_the_powers() -> None:
    sizes = [50.0, 100.0, 200.0, 800.0]
    assert slope(sizes, [3e-5 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    assert slope(sizes, [2.0, None, 2.0, -1.0]) == pytest.approx(0)
    assert slope(sizes, [1.0, None, None, 0.0]) is None


def test_growth_of_rows_that_the_model_made_is_the_models(tiny: Parts) -> None:
    machine, rows = Machine(1e9, CPU_THREAD), {}
    for times in (1, 2, 4):
        work = replace(tiny.work(), probes=tiny.work().probes * times)
        seconds = {name: {"value": machine.seconds(cost)} for name, cost in parts(work).items()}
        rows[str(16 * times)] = {
            "case": {}, "seconds": seconds, "work": work.as_json(), "left_out": {},
            "mib": {"train": 5.0, "measure": 3.0 * times, "ghost": 2.0 * times**2},
        }  # fmt: skip
    found = growth(rows)
    for name in ("train", "forward", "measure", "ghost", "exact"):
        assert found[name]["measured"] == pytest.approx(found[name]["model"], abs=1e-9), name
    assert found["train"]["model"] == pytest.approx(0, abs=1e-9)
    assert found["forward"]["model"] == pytest.approx(1, abs=0.01)
    assert [found[f"{name} MiB"]["measured"] for name in ("train", "measure", "ghost")] == pytest.approx([0, 1, 2])
    text = overhead_scaling.table({"probes": {"rows": rows, "growth": found}})
    assert len(text) == 2 + 3 + 2
    assert text[-2].split()[-7:][1] == "1.00"


def test_peaks_do_not_hide_behind_what_was_freed_before() -> None:
    def hold() -> None:
        assert torch.ones(40 * 2**18).sum() == 40 * 2**18

    assert peak_of(hold) == pytest.approx(40, abs=6)
    assert peak_of(hold) == pytest.approx(40, abs=6)
    assert peak_of(lambda: None) < 6


@pytest.mark.timeout(600)
def test_quick_measures_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert overhead.main(["--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert list(found) == list(overhead.QUICK)
    rows = found["llama-512"]["rows"]
    ours = set(overhead.OURS) - set(overhead.NOT_QUICK)
    assert set(rows) | set(found["llama-512"]["missing"]) > ours  # peers ran, or say why not
    assert all(rows[name]["same_losses_and_weights"] for name in ours)
    assert rows["plain"]["value"] == 1
    assert rows["exact"]["value"] > rows["ghost"]["value"] > rows["step"]["value"] > 1
    assert rows["by_hand"]["value"] > rows["step"]["value"]
    assert len(found["llama-512"]["losses"]) == 2
    assert found["llama-512"]["default"] == {"every": 1, "engine": "ghost"}
    memory = found["memory"]["mib"]["llama-512"]
    assert memory["ghost"] > memory["plain"] > 100
    for axis in overhead_scaling.axes(quick=True):
        rows = found["scaling"]["axes"][axis.name]["rows"]
        assert list(rows) == [str(value) for value in axis.cases]
        assert all(set(overhead_scaling.NAMES) <= set(row["seconds"]) for row in rows.values())
    assert found["model"]["summary"]["all"]["rows"] > 20
    assert len(found["model"]["predicted"]["runs"]) == 20
    assert all({"date", "versions", "machine", "cores", "seeds"} <= set(part["environment"]) for part in found.values())
    # a part that is measured again leaves the others as they are
    before = found["llama-512"]
    assert overhead.main(["--quick", "--only", "model", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["llama-512"] == before
    assert "Llama-3.1-70B" in capsys.readouterr().out
