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
from recipes.evidence.cost_model import Cost, Lora, Machine, Shape, Tokens, Work, backward, calibrated, forward, total
from recipes.evidence.cost_parts import capture, exact, ghost, measure, parts, reading, train
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
    assert total([forward(shape, lora, quiet, each) for each in ranges]) == whole
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
    machine = calibrated(step, 0.02, stated=(5.0, 1e-6))
    assert machine.seconds(step) == pytest.approx(0.02)
    assert machine.seconds(step * 3) == pytest.approx(0.06)
    with pytest.raises(ValueError, match="larger model"):
        calibrated(step, 1e-6, stated=(5.0, 1e-6))


def _row(machine: Machine, given: Work, wrong: float = 1.0) -> dict[str, Any]:
    seconds = {name: {"value": machine.seconds(cost)} for name, cost in parts(given).items()}
    seconds["ghost"]["value"] *= wrong
    return {"case": {"pairs": given.pairs}, "seconds": seconds, "work": given.as_json(), "answers": 40}


def test_errors_are_zero_on_rows_that_the_model_made_and_a_wrong_one_is_found() -> None:
    machine = Machine(1e9, *cost_check.CPU_THREAD)
    rows = {"2": _row(machine, work(pairs=2)), "4": _row(machine, work(), wrong=2.0)}
    found = {"scaling": {"axes": {"pairs": {"rows": rows}}, "environment": {"machine": "a processor"}}}
    checked = cost_check.check_model(found)
    assert checked["summary"]["exact"]["own"]["median"] == pytest.approx(0, abs=1e-9)
    assert checked["summary"]["all"]["one"]["median"] == pytest.approx(0, abs=1e-9)
    assert checked["summary"]["ghost"]["own"]["worst"] == pytest.approx(-0.5)
    assert checked["summary"]["ghost"]["own"]["where"] == "pairs: 4"
    with pytest.raises(ValueError, match="measure quickstart"):
        cost_check.check_model({})


def test_ratios_of_trainings_are_predicted_from_the_plain_step() -> None:
    machine = Machine(1e9, *cost_check.CPU_THREAD)
    row = _row(machine, work())
    trl = cost_check.trl_work(row)
    assert trl.train == (Tokens(4, 20, 40),)
    step, window = machine.seconds(train(trl)), machine.seconds(measure(trl))
    rows = {
        "plain": {"milliseconds": 1e3 * step},
        "step": {"value": 1 + window / step},
        "step_every_10": {"value": 1 + window / step / 10},
        "capture": {"value": 2 * (1 + machine.seconds(capture(trl)) / step)},
    }
    part = {"parts": row, "rows": rows, "environment": {"machine": "a processor"}}
    errors = {each["row"]: each["own"] for each in cost_check.check_model({"x": part})["errors"] if "predicted" in each}
    assert errors == pytest.approx({"x: step": 0, "x: step_every_10": 0, "x: capture": -0.5}, abs=1e-9)


def test_more_gpus_share_probes_until_each_has_one_batch() -> None:
    shape, given = cost_runs.SHAPES["Llama-3.1-8B"], cost_runs.Assumptions()
    one, two, eight, many = (cost_runs.ddp(shape, count, given) for count in (1, 2, 8, 64))
    assert one["measure"] / eight["measure"] == pytest.approx(426 / 64, rel=0.05)
    assert one["measure"] / two["measure"] == pytest.approx(426 / 256, rel=0.05)
    assert many["measure"] == eight["measure"]
    assert one["train"] == many["train"]
    assert many["pairs_gib"] == 64 * one["pairs_gib"]
    # what the main process reads with gradients is the same, however many wait for it
    assert one["measure"] + one["ghost"] == pytest.approx(many["measure"] + many["ghost"])
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
