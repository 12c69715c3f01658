"""Which opening a reward model prefers: against one forward pass per text, and against Bradley and Terry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from smda_callbacks.observe.batches import chat_prompt
from smda_callbacks.observe.behaviour import prefix_probability
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.preference import choice_log_probs, scores_texts
from smda_callbacks.observe.prefixes import COMPLIANCES, REFUSALS, PrefixError
from smda_callbacks.observe.sae import SAEHandle, load_sae
from tests.helpers.tiny import save_sae, tiny_model, tiny_probes, tiny_sae, tiny_tokenizer

LISTS = {"refusal": REFUSALS, "compliance": COMPLIANCES}


@pytest.fixture(scope="module")
def handle(tmp_path_factory: pytest.TempPathFactory) -> SAEHandle:
    return load_sae(save_sae(tiny_sae(), tmp_path_factory.mktemp("sae")))


def reward_model(family: str = "llama", **overrides: Any) -> Any:
    """A tiny reward model, with a score head whose scores differ."""
    config = tiny_model(family, **overrides).config
    config.num_labels = 1
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


def instrument_of(model: Any, handle: SAEHandle, lists: Any = LISTS, **options: Any) -> Instrument:
    scorer = prefix_probability("refusal", lists["refusal"])
    contrast = {name: each for name, each in lists.items() if name != "refusal"}
    return build_instrument(
        model, tiny_tokenizer(), handle, tiny_probes(), scorers=(scorer,), contrast=contrast, **options
    )


@torch.no_grad()
def one_by_one(model: Any, openings: tuple[str, ...]) -> np.ndarray:
    """Scores ``[probe, opening]``, each text on its own through the model's own forward pass."""
    tokenizer = tiny_tokenizer()
    prompts = [chat_prompt(tokenizer, probe.text) for probe in tiny_probes().probes]
    ids = [[tokenizer(prompt + text, return_tensors="pt")["input_ids"] for text in openings] for prompt in prompts]
    return np.array([[model(input_ids=each).logits.item() for each in row] for row in ids])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "gpt_neox"])
def test_preference_equals_a_loop_over_texts(family: str, handle: SAEHandle) -> None:
    model = reward_model(family)
    refusing, complying = (np.exp(one_by_one(model, LISTS[name])).mean(axis=1) for name in LISTS)
    expected = refusing / (refusing + complying)
    assert np.ptp(expected) > 0.01
    instrument = instrument_of(model, handle, batch_size=3)
    reading = instrument.read(model)
    np.testing.assert_allclose(instrument.scores(reading)[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(np.exp(reading.log_probs).sum(axis=1), 1.0, atol=1e-12)
    hidden = []
    for probe in tiny_probes().probes:
        ids = tiny_tokenizer()(chat_prompt(tiny_tokenizer(), probe.text), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden.append(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1])
    np.testing.assert_allclose(reading.hidden, torch.stack(hidden), atol=1e-5)


def test_one_opening_each_is_bradley_and_terry(handle: SAEHandle) -> None:
    model = reward_model()
    instrument = instrument_of(model, handle, {"refusal": ("I cannot",), "compliance": ("Sure",)}, target="logit")
    apart = one_by_one(model, ("I cannot", "Sure"))
    np.testing.assert_allclose(instrument.scores(instrument.read(model))[:, 0], apart[:, 0] - apart[:, 1], atol=1e-5)


def test_a_window_shorter_than_the_text_and_an_adapter_with_a_trained_head(handle: SAEHandle) -> None:
    model = reward_model("mistral", sliding_window=6)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(model, lora).eval()
    assert any(p.requires_grad for name, p in model.named_parameters() if "score" in name)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.mul_(-2.0)
    scores = {name: np.exp(one_by_one(model, each)).mean(axis=1) for name, each in LISTS.items()}
    instrument = instrument_of(model, handle)
    expected = scores["refusal"] / sum(scores.values())
    np.testing.assert_allclose(instrument.scores(instrument.read(model))[:, 0], expected, atol=1e-5)


def test_equal_scores_are_even_and_a_shift_of_all_scores_does_nothing() -> None:
    prior = [-np.log(3.0)] * 3 + [0.0]
    np.testing.assert_allclose(np.exp(choice_log_probs(np.zeros((1, 4)), prior)), [[1 / 6, 1 / 6, 1 / 6, 1 / 2]])
    scores = np.random.default_rng(0).normal(size=(5, 4)) * 50
    np.testing.assert_allclose(choice_log_probs(scores + 1e3, prior), choice_log_probs(scores, prior), atol=1e-9)
    scores[0, 0], scores[1, 1] = np.nan, np.inf
    assert np.isnan(choice_log_probs(scores, prior)).all(axis=1).tolist() == [True, True, False, False, False]


def test_what_cannot_be_compared_or_read_is_refused(handle: SAEHandle) -> None:
    model = reward_model()
    assert scores_texts(model)
    assert not scores_texts(tiny_model())
    with pytest.raises(PrefixError, match=r"a choice between openings, and there is one list of them only"):
        instrument_of(model, handle, {"refusal": REFUSALS})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"a reward model is read with masks.*Allowed: attn_implementation sdpa"):
        instrument_of(model, handle)
