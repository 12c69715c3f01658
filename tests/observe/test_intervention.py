"""Edits of the residual stream against a loop over probes and openings, and against what they must come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from smda_callbacks.observe.activations import captured, find_module, parse_hook
from smda_callbacks.observe.behaviour import prefix_probability
from smda_callbacks.observe.features import encoder
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.intervention import InterventionError, Recording, Scaling, Where, edited, read_edited
from smda_callbacks.observe.sae import SAEHandle
from tests.helpers.tiny import tiny_model, tiny_probes, tiny_sae, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def handle(architecture: str = "standard", hook: str = "blocks.1.hook_resid_post") -> SAEHandle:
    sae = tiny_sae(architecture, hook_name=hook)
    return SAEHandle("tiny", sae, architecture, parse_hook(hook), 32, 96, None, None)


def instrument(model: Any, of: SAEHandle) -> Instrument:
    return build_instrument(model, TOKENIZER, of, tiny_probes(), batch_size=3)


def prompts(of: Instrument) -> dict[int, list[int]]:
    """Probe number -> token ids, taken back from the batches."""
    found = {}
    for batch in of.batches.batches:
        for row, number in enumerate(batch.index.tolist()):
            length = int(batch.lengths[row])
            ids = batch.input_ids[row]
            found[number] = [*ids[: length - 1].tolist(), int(ids[batch.width])]
    return found


@torch.no_grad()
def slow_twin(
    model: Any, of: Instrument, change: Callable[[Tensor], Tensor], first: Callable[[int], int]
) -> np.ndarray:
    """log P of every opening, each alone, ``[probe, opening]``; the stream is edited up to the prompt's last token."""
    tree, found = of.batches.tree, np.zeros((of.batches.n_probes, len(of.batches.tree.openings)))
    for number, prompt in prompts(of).items():
        start, end = first(len(prompt)), len(prompt)

        def whole(stream: Tensor, start: int = start, end: int = end) -> Tensor:
            return torch.cat([stream[:, :start], change(stream[:, start:end]), stream[:, end:]], dim=1)

        for k, path in enumerate(tree.token_paths):
            with edited(model, of.handle.site, whole):
                logits = model(input_ids=torch.tensor([[*prompt, *path]])).logits[0].log_softmax(-1)
            found[number, k] = sum(logits[end - 1 + at, token].item() for at, token in enumerate(path))
    return found


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
@pytest.mark.parametrize("where", ["last", "prompt", "all"])
def test_an_edited_reading_equals_a_loop_over_probes_and_openings(hook: str, where: Where) -> None:
    model, of = tiny_model(), instrument(tiny_model(), handle(hook=hook))
    ids = list(prompts(of).values())
    shared = next(k for k in range(99) if len({tuple(each[: k + 1]) for each in ids}) > 1)
    first: dict[str, Callable[[int], int]] = {"last": lambda n: n - 1, "prompt": lambda _: shared, "all": lambda _: 0}

    def push(hidden: Tensor) -> Tensor:
        return 0.3 * hidden.roll(1, dims=-1) + 0.5

    plain = of.read(model)
    reading = read_edited(model, of, lambda hidden, _: push(hidden), where)
    expected = slow_twin(model, of, lambda hidden: hidden + push(hidden), first[where])
    np.testing.assert_allclose(reading.log_probs, expected, atol=2e-4)
    assert np.abs(reading.log_probs - plain.log_probs).max() > 0.1  # the edit does something
    torch.testing.assert_close(
        reading.hidden, plain.hidden + push(plain.hidden), atol=1e-4, rtol=1e-4
    )  # read behind the edit
    torch.testing.assert_close(of.read(model).hidden, plain.hidden)  # and nothing of it stays


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_scaling_adds_the_decoder_direction_and_nothing_else(architecture: str) -> None:
    model, sae = tiny_model(), handle(architecture)
    of = instrument(model, sae)
    plain = of.read(model)
    x = plain.gate * plain.pre
    feature = int((x > 0).sum(dim=0).argmax())
    for factor in (0.0, 0.5, 1.0, 2.0):
        added = read_edited(model, of, Scaling(sae, {feature: factor})).hidden - plain.hidden
        expected = (factor - 1) * x[:, [feature]] * sae.sae.W_dec[feature].detach()
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)
    assert (x[:, feature] > 0).any()


def test_scaling_several_features_adds_up() -> None:
    model, sae = tiny_model(), handle()
    of = instrument(model, sae)
    hidden = of.read(model).hidden
    _, gate = encoder(sae)(hidden)
    first, second = (gate.sum(dim=0).argsort(descending=True)[:2]).tolist()
    both = Scaling(sae, {first: 0.0, second: 3.0})(hidden, torch.arange(len(hidden)))
    alone = [Scaling(sae, {k: f})(hidden, torch.arange(len(hidden))) for k, f in ((first, 0.0), (second, 3.0))]
    torch.testing.assert_close(both, alone[0] + alone[1], atol=1e-5, rtol=1e-4)
    assert both.abs().max() > 0


def test_a_whole_recorded_stream_makes_another_model_answer_as_the_recorded_one() -> None:
    """Models alike above the hook say the same once the prompt's stream is carried over, for answers of one token."""
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    for name, part in other.named_modules():
        if name in ("model.layers.2", "model.norm", "lm_head"):
            part.load_state_dict(model.get_submodule(name).state_dict())
    tree = instrument(model, handle()).batches.tree
    short = [text for text, path in zip(tree.openings, tree.token_paths, strict=True) if len(path) == 1]
    assert short
    one_token = prefix_probability(openings=short)
    of = build_instrument(model, TOKENIZER, handle(), tiny_probes(), scorers=[one_token], batch_size=3)
    kept = Recording()
    own = read_edited(model, of, kept.keep, "all")
    np.testing.assert_allclose(own.log_probs, of.read(model).log_probs, atol=1e-5)  # keeping changes nothing
    put = read_edited(other, of, kept.put, "all")
    torch.testing.assert_close(put.hidden, own.hidden)
    np.testing.assert_allclose(put.log_probs, own.log_probs, atol=1e-4)
    assert np.abs(of.read(other).log_probs - own.log_probs).max() > 0.5  # they differ by themselves
    last = Recording()
    read_edited(model, of, last.keep)
    half = read_edited(other, of, last.put).log_probs
    assert np.abs(half - own.log_probs).max() > 0.01  # the last token alone does not carry it all


def test_a_recording_refuses_other_places() -> None:
    model = tiny_model()
    of, kept = instrument(model, handle()), Recording()
    with pytest.raises(InterventionError, match="not recorded"):
        read_edited(model, of, kept.put)
    read_edited(model, of, kept.keep, "all")
    with pytest.raises(InterventionError, match="elsewhere"):
        read_edited(model, of, kept.put, "last")


def test_the_hook_goes_whatever_happens() -> None:
    model, site = tiny_model(), parse_hook("blocks.1.hook_resid_post")
    module = find_module(model, site)
    plain = model(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[2]
    hooks = len(module._forward_hooks)  # the library's own, for hidden states
    with edited(model, site, lambda stream: stream + 1.0), captured(model, site) as seen:
        model(input_ids=torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(seen[0], plain + 1.0)
    with pytest.raises(ZeroDivisionError), edited(model, site, lambda stream: stream / (1 // 0)):
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(module._forward_hooks) == hooks


def test_what_cannot_be_done_is_said() -> None:
    model, sae = tiny_model(), handle()
    of = instrument(model, sae)
    with pytest.raises(InterventionError, match=r"features \[96\] are not in an SAE of 96"):
        Scaling(sae, {96: 0.0})
    with pytest.raises(InterventionError, match="one at least"):
        Scaling(sae, {})
    with pytest.raises(InterventionError, match="Allowed: last, prompt, all"):
        read_edited(model, of, Scaling(sae, {0: 0.0}), "first")  # type: ignore[arg-type]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InterventionError, match="sdpa"):
        read_edited(model, of, Scaling(sae, {0: 0.0}))
