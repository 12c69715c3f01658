"""A reading equals what a loop over probes and openings computes, on every family and under every wrapper."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from smda_callbacks.observe import reading as reading_module
from smda_callbacks.observe.activations import HookError, decoder_layers, find_module, parse_hook, unwrap
from smda_callbacks.observe.batches import ProbeBatches, chat_prompt, make_batches, response_encoder, tokenize_probes
from smda_callbacks.observe.features import encoder
from smda_callbacks.observe.prefixes import REFUSALS, build_tree
from smda_callbacks.observe.probes import ProbeError
from smda_callbacks.observe.reading import NotFiniteError, read, tree_in_one_pass
from smda_callbacks.observe.sae import SAEHandle
from tests.helpers.tiny import tiny_model, tiny_probes, tiny_sae, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi3")
TOKENIZER = tiny_tokenizer()


def handle(kind: str = "hook_resid_post", layer: int = 1) -> SAEHandle:
    sae = tiny_sae("standard")
    return SAEHandle("tiny", sae, "standard", parse_hook(f"blocks.{layer}.{kind}"), 32, 96, None, None)


def batched(batch_size: int = 3) -> tuple[list[list[int]], ProbeBatches]:
    probes = tiny_probes()
    encode = response_encoder(TOKENIZER, chat_prompt(TOKENIZER, probes.probes[0].text))
    ids = tokenize_probes(TOKENIZER, probes, context=256)
    return ids, make_batches(ids, build_tree(REFUSALS, encode), batch_size=batch_size)


@torch.no_grad()
def slow_twin(model: Any, ids: list[list[int]], batches: ProbeBatches, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Each probe and each opening on its own, without padding, masks or hooks."""
    log_probs = np.zeros((len(ids), len(batches.tree.openings)))
    hidden = []
    for i, prompt in enumerate(ids):
        alone = model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        hidden.append(alone.hidden_states[layer + 1][0, -1].numpy())
        for o, path in enumerate(batches.tree.token_paths):
            logits = model(input_ids=torch.tensor([prompt + list(path)])).logits[0].log_softmax(-1)
            log_probs[i, o] = sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(path))
    return log_probs, np.stack(hidden)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("one_pass", [True, False])
def test_reading_equals_a_loop_over_probes_and_openings(
    family: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    ids, batches = batched()
    expected, hidden = slow_twin(model, ids, batches, layer=1)
    assert tree_in_one_pass(model)
    monkeypatch.setattr(reading_module, "tree_in_one_pass", lambda *_: one_pass)
    site = handle()
    result = read(model, batches, site.site, encoder(site))
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)
    np.testing.assert_allclose(result.hidden.numpy(), hidden, atol=2e-4)


def test_eager_attention_reads_the_same() -> None:
    model = tiny_model()
    _, batches = batched()
    site = handle()
    first = read(model, batches, site.site, encoder(site))
    model.set_attn_implementation("eager")
    second = read(model, batches, site.site, encoder(site))
    np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batching_does_not_matter_and_order_is_that_of_the_probes(batch_size: int) -> None:
    model, site = tiny_model(), handle()
    _, whole = batched(batch_size=100)
    _, split = batched(batch_size=batch_size)
    first, second = (read(model, each, site.site, encoder(site)) for each in (whole, split))
    np.testing.assert_allclose(first.log_probs, second.log_probs, atol=1e-4)
    np.testing.assert_allclose(first.hidden, second.hidden, atol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_a_sliding_window_shorter_than_the_probes_cuts_by_position(family: str) -> None:
    model = tiny_model(family, sliding_window=6)
    ids, batches = batched()
    assert min(map(len, ids)) > 6
    expected, hidden = slow_twin(model, ids, batches, layer=1)
    wide, _ = slow_twin(tiny_model(family, sliding_window=250), ids, batches, layer=1)
    assert np.abs(wide - expected).max() > 0.1  # the window matters here
    site = handle()
    result = read(model, batches, site.site, encoder(site))
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)
    np.testing.assert_allclose(result.hidden.numpy(), hidden, atol=2e-4)


def test_a_multimodal_gemma_is_read_as_text() -> None:
    text = {"vocab_size": 420, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    text |= {"sliding_window": 8, "pad_token_id": 0, "initializer_range": 0.2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_id=419)
    model = Gemma3ForConditionalGeneration(config).eval()
    ids, batches = batched()
    expected, hidden = slow_twin(model, ids, batches, layer=1)
    site = handle()
    result = read(model, batches, site.site, encoder(site))
    np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)
    np.testing.assert_allclose(result.hidden.numpy(), hidden, atol=2e-4)


def test_reads_through_peft_with_the_adapter_active() -> None:
    model = tiny_model()
    site = handle()
    _, batches = batched()
    before = read(model, batches, site.site, encoder(site))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4))
    after = read(adapted, batches, site.site, encoder(site))
    assert not torch.allclose(before.hidden, after.hidden, atol=1e-3)
    for module in adapted.modules():
        if hasattr(module, "_disable_adapters"):
            module._disable_adapters = True
    again = read(adapted, batches, site.site, encoder(site))
    torch.testing.assert_close(before.hidden, again.hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_under_wrappers(family: str) -> None:
    model = tiny_model(family)

    class DistributedLike(torch.nn.Module):  # what DDP looks like: the model is .module, there is no .config
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    peft = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, fan_in_fan_out=family == "gpt2"))
    for wrapped in (model, peft, DistributedLike(peft), torch.compile(peft, backend="eager")):
        assert unwrap(wrapped) is model
        assert len(decoder_layers(wrapped)) == 3


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.2", 2, "resid_post"),
        ("blocks.0.hook_resid_pre", 0, "resid_pre"),
        ("model.language_model.layers.7.output", 7, "resid_post"),
        ("transformer.h.3", 3, "resid_post"),
        ("blocks.5.hook_mlp_out", 5, "mlp_out"),
    ],
)
def test_hook_names(name: str, layer: int, kind: str) -> None:
    site = parse_hook(name)
    assert (site.layer, site.kind) == (layer, kind)


@torch.no_grad()
def test_resid_pre_is_the_residual_before_and_gemma_mlp_out_is_normalised() -> None:
    model = tiny_model()
    ids, batches = batched()
    site = handle("hook_resid_pre", layer=2)
    hidden = read(model, batches, site.site, encoder(site)).hidden
    expected = torch.stack(
        [model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, -1] for row in ids]
    )
    torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=0)
    gemma = tiny_model("gemma2")
    assert find_module(gemma, parse_hook("blocks.1.hook_mlp_out")) is gemma.model.layers[1].post_feedforward_layernorm


def test_unknown_hooks_and_layers_are_refused_by_name() -> None:
    with pytest.raises(HookError, match=r"blocks\.3\.attn\.hook_z.*cannot be read.*hook_resid_post.*Next step"):
        parse_hook("blocks.3.attn.hook_z")
    with pytest.raises(HookError, match=r"layer 9, but LlamaForCausalLM has layers 0 to 2"):
        find_module(tiny_model(), parse_hook("blocks.9.hook_resid_post"))


def test_nan_in_the_model_is_refused_with_its_extent() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    _, batches = batched()
    site = handle()
    with pytest.raises(NotFiniteError, match=r"NaN or inf in the activations of 7 .* of 7 probes"):
        read(model, batches, site.site, encoder(site))


def test_prompts_that_cannot_be_read_are_refused() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(ProbeError, match=r"no chat template.*Next step"):
        chat_prompt(bare, "hello")
    with pytest.raises(ProbeError, match=r"probe 'h-\d' has \d+ tokens and needs 4 more .* context is 16"):
        tokenize_probes(TOKENIZER, tiny_probes(), context=16, reserve=4)


def test_only_needed_logits_are_computed() -> None:
    """One distribution per tree node, the root included: nothing for the rest of the prompt."""
    model = tiny_model()
    _, batches = batched()
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    site = handle()
    read(model, batches, site.site, encoder(site))
    hook.remove()
    assert set(seen) == {len(batches.tree.tokens)}
    assert len(seen) == len(batches.batches)


OUT_OF_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "host": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
}


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_what_does_not_fit_into_memory_is_read_in_halves(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """A model with room for two probes at a time: the same numbers, said once per batch, and nothing left behind."""
    model, sae = tiny_model(), handle()
    _, batches = batched(batch_size=7)
    expected = read(model, batched(batch_size=1)[1], sae.site, encoder(sae))
    real, sizes = model.forward, []

    def small(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise OUT_OF_MEMORY[where]
        return real(*args, **kwargs)

    model.forward = small
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with caplog.at_level(logging.WARNING, "smda_callbacks"):
        found = read(model, batches, sae.site, encoder(sae))
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-5)
    torch.testing.assert_close(found.pre, expected.pre, rtol=1e-4, atol=1e-5)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert "measure.batch_size: 3" in caplog.records[0].message


def test_other_errors_and_a_probe_that_does_not_fit_alone_are_not_hidden() -> None:
    model, sae = tiny_model(), handle()
    _, batches = batched(batch_size=4)
    for error in (RuntimeError("shapes do not match"), OUT_OF_MEMORY["cuda"]):

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> Any:
            raise error

        model.forward = broken
        with pytest.raises(type(error), match=str(error)[:12]):
            read(model, batches, sae.site, encoder(sae))
