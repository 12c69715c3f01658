"""The cost model's formulae against FLOPs that torch counts, and its arithmetic on cases with known answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.evidence import cost_check, cost_runs
from recipes.evidence.cost_machine import CPU_THREAD, Cost, Machine, Stated, calibrated, fresh, total
from recipes.evidence.cost_model import Lora, Shape, Tokens, Work, backward, forward
from recipes.evidence.cost_parts import (
    HEALTH_PASSES,
    book,
    capture,
    exact,
    functional_gradients,
    ghost,
    measure,
    parts,
    reading,
    train,
)
from smda_callbacks.observe.lora import lora_sites, per_row, tapped

TOKENS = Tokens(rows=2, columns=7, predicted=2 * 3)


def llama(adapted: int = 3) -> tuple[Any, Shape, Lora]:
    """Three layers, two heads of keys and values for four of queries, adapters on the top ``adapted`` layers."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attn_implementation="eager",
    )  # fmt: skip
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    layers = list(range(3 - adapted, 3))
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=names, layers_to_transform=layers))
    return model, Shape.of(config), Lora(4, adapted)


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def run(model: Any, tokens: Tokens) -> torch.Tensor:
    ids = torch.arange(tokens.count).view(tokens.rows, tokens.columns) % 50
    logits = model(input_ids=ids, logits_to_keep=tokens.predicted // tokens.rows, use_cache=False).logits
    found: torch.Tensor = logits.sum()
    return found


@pytest.mark.parametrize("adapted", [1, 2, 3])
def test_forward_is_what_torch_counts(adapted: int) -> None:
    model, shape, lora = llama(adapted)
    with torch.no_grad():
        found = counted(lambda: run(model, TOKENS))
    assert found == forward(shape, lora, TOKENS).flops


@pytest.mark.parametrize("adapted", [1, 2, 3])
def test_backward_is_what_torch_counts(adapted: int) -> None:
    """Nothing below the lowest adapter is computed, and nothing of what that layer's query, key and value get in."""
    model, shape, lora = llama(adapted)
    value = run(model, TOKENS)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert counted(lambda: torch.autograd.grad(value, weights)) == backward(shape, lora, TOKENS).flops


def test_backward_to_the_outputs_of_adapters_is_what_torch_counts() -> None:
    """As engine ghost goes back: to the lowest matrices alone, with the others' gradients row by row."""
    model, shape, lora = llama(2)
    sites = lora_sites(model)
    with tapped(sites, lambda number, seen, gradient: per_row(seen, gradient)) as tap:
        value = run(model, TOKENS)
        lowest = [sites[number].weight for number in tap.lowest]
        found = counted(lambda: torch.autograd.grad(value, lowest))
    by_rows = 2 * TOKENS.count * lora.weights(shape)
    assert found == backward(shape, lora, TOKENS, weights=False).flops + by_rows


def test_some_layers_alone_are_the_difference_of_two_models() -> None:
    _, shape, lora = llama(2)
    quiet = replace(TOKENS, predicted=0)
    ranges = [(0, 1), (1, 2), (2, 3)]
    whole = forward(shape, lora, quiet)
    assert total([forward(shape, lora, quiet, each) for each in ranges]).flops == whole.flops
    assert forward(shape, lora, quiet, (0, 1)).flops < forward(shape, lora, quiet, (1, 2)).flops  # no adapters there
    assert backward(shape, lora, quiet, (0, 1)) == Cost()


def test_a_trimmed_layer_computes_its_mlp_where_words_are_predicted() -> None:
    model, shape, lora = llama()
    mlp = model.base_model.model.model.layers[2].mlp
    here, there = torch.zeros(1, TOKENS.predicted, 24), torch.zeros(1, TOKENS.count, 24)
    with torch.no_grad():
        spared = counted(lambda: mlp(there)) - counted(lambda: mlp(here))
    full, trimmed = (forward(shape, lora, TOKENS, trim=trim).flops for trim in (False, True))
    assert full - trimmed == spared


def test_parameters_of_the_published_models() -> None:
    """Their names tell: 3.2, 8.0 and 70.6 billion; the two larger have a second table for the output."""
    billions = [round(shape.parameters / 1e9, 1) for shape in cost_runs.SHAPES.values()]
    assert billions == [3.2, 7.5, 69.5]


def work(**changed: Any) -> Work:
    _, shape, lora = llama()
    given = {
        "shape": shape, "lora": lora, "train": (Tokens(4, 20, 80),), "pairs": 4,
        "probes": (Tokens(8, 12, 24), Tokens(5, 10, 15)), "nodes": 3, "hook": 1, "features": 64, "support": 5,
        "basis": 12, "functionals": 20, "renewed": 1, "carried": 0,
    }  # fmt: skip
    return Work(**{**given, **changed})


def test_work_goes_through_a_file_unchanged() -> None:
    assert Work.from_json(json.loads(json.dumps(work().as_json()))) == work()


def test_parts_grow_as_what_they_do() -> None:
    one = work()
    twice = work(probes=one.probes * 2)
    assert reading(twice).flops == 2 * reading(one).flops
    assert capture(work(pairs=8, train=one.train * 2)).flops == 2 * capture(one).flops
    readings = exact(work(support=0)) * (1 / (3 * 4 + 2))
    assert readings.flops == pytest.approx(reading(work(support=0)).flops)
    assert measure(work(features=128)).flops - measure(one).flops == 8 * 13 * 24 * 64
    assert train(work(head=3)).flops - train(one).flops == 2 * 80 * 24 * 50
    assert ghost(work(renewed=0)).flops < ghost(one).flops < ghost(work(carried=5)).flops


def test_savings_save() -> None:
    top = work(lora=Lora(4, 1))
    assert reading(replace(top, kept=2)).flops < 0.5 * reading(top).flops
    shared = reading(replace(top, prefix=4))
    assert shared.flops < reading(top).flops
    # engine ghost's own reading shares no start: what it takes altogether does not depend on that
    assert (shared + ghost(replace(top, prefix=4))).flops == pytest.approx((reading(top) + ghost(top)).flops)


def test_a_calibrated_machine_takes_what_it_was_calibrated_by() -> None:
    step = train(work())
    stated = CPU_THREAD._replace(launch=1e-6, python=1e-7)
    machine = calibrated(step, 0.02, stated)
    assert machine == Machine(machine.flops, stated)
    assert machine.seconds(step) == pytest.approx(0.02)
    assert machine.seconds(step * 3) == pytest.approx(0.06)
    with pytest.raises(ValueError, match=r"took 0 s"):
        calibrated(step, 0.0, stated)


def test_calls_take_half_of_the_step_that_calibrates_at_most() -> None:
    """A step that is shorter than its calls are stated to take: both of their times are lowered alike."""
    step, stated = train(work()), CPU_THREAD._replace(launch=1e-3, python=1e-4)
    machine = calibrated(step, 0.02, stated)
    assert machine.seconds(step) == pytest.approx(0.02)
    assert machine.calling(step) == pytest.approx(0.01)
    assert machine.stated.launch / machine.stated.python == pytest.approx(10)
    assert machine.computing(step) / machine.flops == pytest.approx(0.01)


def test_costs_of_a_machine_add_up() -> None:
    machine = Machine(100.0, Stated(balance=4.0, cached=2.0, fresh=8.0, single=1.0, thin=3.0, launch=0.5, python=0.25))
    given = {"flops": 100, "bytes": 50, "cached": 50, "fresh": 25, "single": 100, "thin": 100, "calls": 6, "python": 4}
    found = [machine.seconds(Cost(**{name: number})) for name, number in given.items()]
    assert found == [1.0, 2.0, 1.0, 2.0, 1.0, 3.0, 3.0, 1.0]
    assert machine.seconds(Cost(**given) * 2 + Cost(100)) == 2 * sum(found) + 1


def test_only_large_arrays_are_new_every_time() -> None:
    assert fresh(32 * 2**20, 4) == Cost()
    assert fresh(33 * 2**20, 4) == Cost(fresh=132 * 2**20)
    wide = work(features=2**20)  # 13 probes: 52 MiB
    assert measure(wide).fresh == HEALTH_PASSES * 4 * 13 * 2**20
    assert measure(work(features=2**19)).fresh == 0


def _row(machine: Machine, given: Work, wrong: float = 1.0) -> dict[str, Any]:
    seconds = {name: {"value": machine.seconds(cost)} for name, cost in parts(given).items()}
    seconds["ghost"]["value"] *= wrong
    return {"case": {"pairs": given.pairs}, "seconds": seconds, "work": given.as_json()}


def test_errors_are_zero_on_rows_that_the_model_made_and_a_wrong_one_is_found() -> None:
    machine = Machine(1e8, cost_check.CPU_THREAD)  # so slow that calls are the smaller part of a step
    rows = {"2": _row(machine, work(pairs=2)), "4": _row(machine, work(), wrong=2.0)}
    found = {"scaling": {"axes": {"pairs": {"rows": rows}}, "environment": {"machine": "a processor"}}}
    checked = cost_check.check_model(found)
    assert checked["summary"]["exact"]["own"]["median"] == pytest.approx(0, abs=1e-9)
    assert checked["summary"]["all"]["one"]["median"] == pytest.approx(0, abs=1e-9)
    assert checked["summary"]["ghost"]["own"]["worst"] == pytest.approx(-0.5)
    assert checked["summary"]["ghost"]["own"]["where"] == "pairs: 4"
    with pytest.raises(ValueError, match="measure quickstart"):
        cost_check.check_model({})


def test_ratios_of_trainings_are_what_watching_adds_over_the_step_without() -> None:
    """Momentum of one earlier step is followed at the second of three steps, of two at the third."""
    machine, given = Machine(1e8, cost_check.CPU_THREAD), work(carried=21)
    row, at = _row(machine, given), machine.seconds
    step, window = 1.5 * at(train(given)), at(measure(given))  # TRL's step takes longer than the bare one
    books = at(capture(given)) + at(functional_gradients(given)) + at(book(work(carried=2)))
    rows = {
        "plain": {"milliseconds": 1e3 * step},
        "step": {"value": 1 + window / step, "steps": 30},
        "step_every_10": {"value": 1 + window / step / 10, "steps": 30},
        "capture": {"value": 2 * (1 + at(capture(given)) / step), "steps": 30},
        "ghost": {"value": 1 + (window + books) / step, "steps": 3},
    }
    part = {"parts": row, "rows": rows, "environment": {"machine": "a processor"}}
    errors = {each["row"]: each["own"] for each in cost_check.check_model({"x": part})["errors"] if "predicted" in each}
    assert errors == pytest.approx({"x: step": 0, "x: step_every_10": 0, "x: capture": -0.5, "x: ghost": 0}, abs=1e-9)


def test_momentum_is_followed_over_as_many_steps_as_there_were() -> None:
    assert cost_check.carried_at(3, "ghost", 21) == 2  # of the steps after the first: 1 and 2
    assert cost_check.carried_at(30, "ghost", 21) == 18  # 10 to 20, then 21
    assert cost_check.carried_at(10, "exact_every_10", 2) == 2


def test_a_window_of_engine_exact_has_every_pair_once() -> None:
    """Four pairs a step, of data of 64: forty in ten steps. Eight a step: the data, not eighty."""
    for pairs, expected in ((4, 40), (8, 64)):
        given = work(pairs=pairs)
        window = exact(given, pairs=expected, steps=10)
        assert cost_check.ratio_costs(given)["exact_every_10"][-1] == window * 0.1
    assert exact(work(), pairs=4, steps=1) == exact(work())
    one, ten = exact(work(), steps=1), exact(work(), steps=10)
    assert (ten.flops, ten.calls > one.calls) == (one.flops, True)  # readings are by pair, their parts by step too


def test_more_gpus_share_probes_until_each_has_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    stated = cost_runs.DATACENTRE_GPU._replace(
        launch=0.0, python=0.0
    )  # calls of books, and walks over the modules, are not shared
    monkeypatch.setattr(cost_runs, "DATACENTRE_GPU", stated)
    shape, given = cost_runs.SHAPES["Llama-3.1-8B"], cost_runs.Assumptions()
    one, two, eight, many = (cost_runs.ddp(shape, count, given) for count in (1, 2, 8, 64))
    assert one["measure"] / eight["measure"] == pytest.approx(426 / 64, rel=0.05)
    assert one["measure"] / two["measure"] == pytest.approx(426 / 256, rel=0.05)
    assert many["measure"] == eight["measure"]
    assert one["train"] == many["train"]
    assert many["pairs_gib"] == 64 * one["pairs_gib"]
    # gradients are taken of as many batches as are read, and one rank has nothing to add up
    work = cost_runs.work_of(shape, given)
    added = 4 * (work.basis + work.renewed) * work.lora.weights(shape)
    batch = replace(work, probes=work.probes[:1])
    for cost, its, speed in ((one, work, 1e99), (eight, batch, given.gather[0]), (many, batch, given.gather[1])):
        assert cost["ghost"] == pytest.approx(given.machine.seconds(functional_gradients(its)) + added / speed)
    assert one["ghost"] > 4 * eight["ghost"]
    wide = cost_runs.fsdp(shape, 64, replace(given, gather=(1e15, 1e15)))
    slow = cost_runs.fsdp(shape, 64, replace(given, gather=(1e15, 1e9)))
    assert wide["measure"] == pytest.approx(many["measure"], rel=1e-6)
    assert slow["train"] == 2 * 2 * shape.parameters / 1e9


def test_every_run_is_in_the_table() -> None:
    predicted = cost_runs.predict(gpus=(8, 64))
    names = [(run["model"], run["how"], run["gpus"]) for run in predicted["runs"]]
    assert len(names) == len(set(names)) == 2 * (2 + 2 + 1)
    assert ("Llama-3.1-70B", "DDP", 8) not in names
    text = cost_runs.lines(predicted)
    assert len(text) == 1 + len(names)
    assert all(len(row.split("ghost holds")[0].split()) == 11 for row in text[1:])
    for run in predicted["runs"]:
        assert 1 < run["ratios"]["step every 50"] < run["ratios"]["step every 10"] < run["ratios"]["step every 1"]
