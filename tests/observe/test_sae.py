"""SAEs that would be read wrongly are refused by name, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smda_callbacks.observe.activations import HookError
from smda_callbacks.observe.sae import SAEError, check_fit, load_sae
from tests.helpers.tiny import save_sae, tiny_model, tiny_sae


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_a_saved_sae_comes_back(tmp_path: Path, architecture: str) -> None:
    sae = tiny_sae(architecture)
    handle = load_sae(save_sae(sae, tmp_path / "mine"))
    assert (handle.id, handle.architecture, handle.d_in, handle.d_sae) == ("mine", architecture, 32, 96)
    assert (handle.site.layer, handle.site.kind, handle.model_name) == (1, "resid_post", "tiny")
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(handle.sae.encode(hidden), sae.encode(hidden), atol=0, rtol=0)
    check_fit(handle, tiny_model())


def test_the_hash_is_that_of_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        load_sae(save_sae(tiny_sae(seed=seed), tmp_path / name)) for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first.hash == again.hash != other.hash


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({"d_in": 16}, {}, r"activations of width 16, but LlamaForCausalLM has width 32"),
        ({"model_name": "org/other"}, {}, r"trained on 'org/other', but the model is 'tiny'.*allow_model_mismatch"),
    ],
)
def test_an_sae_of_another_model_is_refused(tmp_path: Path, options: dict, model: dict, message: str) -> None:
    handle = load_sae(save_sae(tiny_sae(**options), tmp_path / "s"))
    with pytest.raises(SAEError, match=message):
        check_fit(handle, tiny_model(**model))


def test_a_base_models_sae_can_be_allowed_and_names_are_compared_without_their_owner(tmp_path: Path) -> None:
    handle = load_sae(save_sae(tiny_sae(model_name="org/base"), tmp_path / "s"))
    check_fit(handle, tiny_model(), allow_model_mismatch=True)
    check_fit(handle, tiny_model(name="elsewhere/Base"))


def test_layers_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    handle = load_sae(save_sae(tiny_sae(hook_name="blocks.5.hook_resid_post"), tmp_path / "s"))
    with pytest.raises(HookError, match=r"layer 5, but LlamaForCausalLM has layers 0 to 2"):
        check_fit(handle, tiny_model())


@pytest.mark.parametrize("hook", ["blocks.1.attn.hook_z", "somewhere"])
def test_hooks_that_cannot_be_read_are_refused(tmp_path: Path, hook: str) -> None:
    with pytest.raises(HookError, match="cannot be read"):
        load_sae(save_sae(tiny_sae(hook_name=hook), tmp_path / "s"))
    assert load_sae(tmp_path / "s", hook_name="blocks.1.hook_resid_post").site.layer == 1


def test_an_unfolded_norm_is_refused_or_folded(tmp_path: Path) -> None:
    folder = save_sae(tiny_sae("standard", normalize_activations="expected_average_only_in"), tmp_path / "s")
    with pytest.raises(
        SAEError, match=r"normalize_activations='expected_average_only_in' unfolded.*save_inference_model"
    ):
        load_sae(folder)
    handle = load_sae(folder, norm_scaling_factor=0.5)
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(handle.sae.encode(hidden), tiny_sae("standard").encode(hidden * 0.5))


def test_architectures_without_a_gate_are_refused(tmp_path: Path) -> None:
    folder = save_sae(tiny_sae("matching_pursuit"), tmp_path / "s")
    with pytest.raises(SAEError, match=r"architecture 'matching_pursuit'. Allowed: standard, jumprelu, topk, gated"):
        load_sae(folder)


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    folder = save_sae(tiny_sae(), tmp_path / "s")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(SAEError, match=r"SAE folder 's' has no sae_weights.safetensors"):
        load_sae(folder)
    with pytest.raises(SAEError, match=r"'gone' is no folder here, and no sae_id is given"):
        load_sae("gone")
    with pytest.raises(SAEError, match=r"cannot be loaded.*similar name: .*gemma-scope-2b-pt-res-canonical"):
        load_sae("gemma-scope-2b-pt-res-canonica", "layer_0/width_16k/canonical")
    with pytest.raises(SAEError, match=r"Ids of this release: layer_"):
        load_sae("gemma-scope-2b-pt-res-canonical", "nope")


def test_metadata_of_the_file_is_used_not_guessed(tmp_path: Path) -> None:
    folder = save_sae(tiny_sae(hook_name="model.layers.2"), tmp_path / "s")
    assert json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"] == "model.layers.2"
    assert load_sae(folder).site.layer == 2
