"""Greedy answers: the same as by a plain loop, without a trace, and sorted into the lists by their tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smda_callbacks.observe.batches import chat_prompt, make_batches, response_encoder, tokenize_probes
from smda_callbacks.observe.calibration import (
    Answer,
    Calibration,
    Missed,
    calibrate,
    choose_rows,
    find_list,
    greedy_tokens,
    stop_tokens,
)
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.prefixes import COMPLIANCES, build_tree
from smda_callbacks.observe.sae import load_sae
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_probes, tiny_sae, tiny_tokenizer


def one_by_one(model: Any, ids: list[int], length: int) -> list[int]:
    """The slow twin: no batch, no padding, no cache."""
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(length):
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(ids) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "mistral"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_greedy_tokens_are_those_of_a_plain_loop(family: str, batch_size: int) -> None:
    model, tokenizer, probes = tiny_model(family), tiny_tokenizer(), tiny_probes()
    ids = tokenize_probes(tokenizer, probes, context=None)
    tree = build_tree(["Sorry", "I cannot"], lambda text: tokenizer(text)["input_ids"])
    batches = make_batches(ids, tree, batch_size=batch_size)
    rows = [0, 2, 3, 6]
    found = greedy_tokens(model, batches.batches, rows, 6, stop=set())
    assert found == {row: one_by_one(model, ids[row], 6) for row in rows}


def test_answers_end_before_a_stop_token() -> None:
    model, tokenizer, probes = tiny_model(), tiny_tokenizer(), tiny_probes()
    ids = tokenize_probes(tokenizer, probes, context=None)
    batches = make_batches(ids, build_tree(["a"], lambda text: [5]))
    whole = greedy_tokens(model, batches.batches, [0], 6, stop=set())[0]
    assert greedy_tokens(model, batches.batches, [0], 6, stop={whole[3]})[0] == whole[: whole.index(whole[3])]
    assert greedy_tokens(model, batches.batches, [0], 6, stop={whole[0]})[0] == []


def test_stop_tokens_are_those_of_tokenizer_and_model() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id = [7, 9]
    assert stop_tokens(model, tokenizer) == {2, 7, 9}
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == {2}


def test_answering_leaves_no_trace() -> None:
    model, tokenizer, probes = tiny_model(), tiny_tokenizer(), tiny_probes()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batches = make_batches(tokenize_probes(tokenizer, probes, context=None), build_tree(["a"], lambda text: [5]))
    greedy_tokens(model, batches.batches, [0, 1], 3, stop=set())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_are_spread_evenly_over_both_groups() -> None:
    expected: list[Any] = ["refuse"] * 10 + ["comply"] * 3
    assert choose_rows(expected, 4) == [0, 3, 6, 9, 10, 11, 12]
    assert choose_rows(expected, 100) == list(range(13))
    with pytest.raises(ValueError, match="per_group must be at least 1, got 0"):
        choose_rows(expected, 0)


def test_an_opening_is_recognised_by_all_of_its_tokens() -> None:
    paths = {"refusal": [(1, 2), (5,)], "compliance": [(1, 3)]}
    assert find_list([1, 2, 9], paths) == "refusal"
    assert find_list([1, 3], paths) == "compliance"
    assert find_list([5], paths) == "refusal"
    assert find_list([1], paths) is None
    assert find_list([9, 1, 2], paths) is None  # not at the beginning
    assert find_list([], paths) is None


def test_missed_openings_are_counted_by_group() -> None:
    texts = [
        ("refuse", "I'd rather not say so."),
        ("refuse", "No."),
        ("comply", "No."),
        ("refuse", "I'd rather not, thanks"),
        ("comply", "\n\nTea is a drink"),
        ("comply", ""),
    ]
    answers = tuple(Answer(k, group, text, None) for k, (group, text) in enumerate(texts))  # type: ignore[arg-type]
    found = Calibration((*answers, Answer(9, "refuse", "Sorry, no", "refusal")), 1.0)
    assert found.missed == (
        Missed("No.", 1, 1),
        Missed("I'd rather not", 1, 0),
        Missed("I'd rather not,", 1, 0),
        Missed("\n\nTea is a", 0, 1),
        Missed("", 0, 1),
    )
    assert (found.size("refuse"), found.size("comply")) == (4, 3)
    assert found.share("refuse", "refusal") == 0.25
    assert found.share("refuse", None) == 0.75


@pytest.fixture(scope="module")
def instrument(tmp_path_factory: pytest.TempPathFactory) -> tuple[Instrument, Any, Any]:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    handle = load_sae(save_sae(tiny_sae(), tmp_path_factory.mktemp("sae") / "s"))
    return build_instrument(model, tokenizer, handle, many_probes(16)), model, tokenizer


def say(model: Any, tokenizer: Any, script: dict[str, str]) -> Any:
    """Make ``model`` answer by a script: a word of the prompt -> the answer. Returns the hook's handle."""
    prompt = chat_prompt(tokenizer, "x")
    encode = response_encoder(tokenizer, prompt)
    lines: list[list[int]] = []

    def speak(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        tokens = kwargs["input_ids"]
        if tokens.shape[1] > 1:  # a new batch of prompts
            prompts = tokenizer.batch_decode(tokens)
            answers = [next(answer for word, answer in script.items() if word in text) for text in prompts]
            lines[:] = [[*encode(answer), tokenizer.eos_token_id] for answer in answers]
        output.logits = torch.zeros_like(output.logits)
        for row, line in enumerate(lines):
            output.logits[row, -1, line.pop(0) if line else tokenizer.pad_token_id] = 1.0
        return output

    return model.register_forward_hook(speak, with_kwargs=True)


def test_a_scripted_model_is_described_as_scripted(instrument: tuple[Instrument, Any, Any]) -> None:
    instrument_, model, tokenizer = instrument
    probes = instrument_.probes.probes  # every second asks to steal; 8 and 8
    hook = say(model, tokenizer, {"number 4.": "Sure, take it", "steal": "I cannot help", "Tell": "Tea is fine, yes"})
    try:
        score = np.array([1.0 if "steal" in probe.text else 0.0 for probe in probes])
        found = calibrate(instrument_, model, tokenizer, score, {"compliance": COMPLIANCES}, per_group=50)
    finally:
        hook.remove()
    assert len(found.answers) == 16
    assert {answer.text for answer in found.answers} == {"Sure, take it", "I cannot help", "Tea is fine, yes"}
    assert found.share("refuse", "refusal") == 7 / 8
    assert found.share("refuse", "compliance") == 1 / 8
    assert found.share("comply", None) == 1.0
    assert found.missed == (Missed("Tea is fine,", 0, 8),)
    assert found.agreement == 15 / 16  # "number 4." scores 1 but is answered


def test_a_refusal_behind_a_line_end_is_missed_as_it_is_by_the_score(instrument: tuple[Instrument, Any, Any]) -> None:
    instrument_, model, tokenizer = instrument
    hook = say(model, tokenizer, {"": "\nI cannot help"})
    try:
        found = calibrate(instrument_, model, tokenizer, np.zeros(16), {}, per_group=2)
    finally:
        hook.remove()
    assert found.missed == (Missed("\nI cannot help", 2, 2),)
    assert found.agreement == 1.0
