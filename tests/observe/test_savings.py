"""Readings with savings equal those without, and nothing that was kept outlives what it was computed from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from smda_callbacks.observe import kept, savings
from smda_callbacks.observe.activations import decoder_layers, parse_hook
from smda_callbacks.observe.batches import ProbeBatches, make_batches
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.passes import tree_pass
from smda_callbacks.observe.prefixes import build_tree
from smda_callbacks.observe.reading import Reading
from smda_callbacks.observe.sae import SAEHandle
from smda_callbacks.observe.savings import SavingOptions, worthwhile_prefix
from tests.helpers.lower import first_trained
from tests.helpers.tiny import tiny_model, tiny_probes, tiny_sae, tiny_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "gpt2", "phi3")
TOKENIZER = tiny_tokenizer()
NONE = SavingOptions(keep_gib=0, share_prefix=False, trim=False)
ONE = {
    "keep_gib": SavingOptions(share_prefix=False, trim=False),
    "share_prefix": SavingOptions(keep_gib=0, trim=False),
    "trim": SavingOptions(keep_gib=0, share_prefix=False),
    "all": SavingOptions(),
}


@pytest.fixture(autouse=True)
def _no_saving_is_left_out_unsaid(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "said" not in request.fixturenames:
        assert not [each for each in caplog.records if "does not give the same" in each.message]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "smda_callbacks")
    return caplog


def adapted(family: str = "llama", layers: tuple[int, ...] | None = (2,), **options: Any) -> Any:
    """A model whose adapters act, on these layers only."""
    overrides = options.pop("overrides", {})
    model = tiny_model(family, **overrides)
    if layers is not None and family == "gpt2":
        options = {"layers_pattern": "h", **options}
    config = LoraConfig(
        r=2, layers_to_transform=layers, fan_in_fan_out=family == "gpt2",
        **{"target_modules": "all-linear" if layers is None else _linears(model), **options},
    )  # fmt: skip
    found: Any = get_peft_model(model, config).eval()
    move(found, 0.1)
    return found


def _linears(model: nn.Module) -> list[str]:
    modules = decoder_layers(model).named_modules()
    return sorted({name.split(".")[-1] for name, each in modules if isinstance(each, nn.Linear | Conv1D)})


def move(model: nn.Module, size: float, seed: int = 0) -> None:
    """An update of the trained weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def handle(kind: str = "hook_resid_post", layer: int = 1) -> SAEHandle:
    return SAEHandle("tiny", tiny_sae("standard"), "standard", parse_hook(f"blocks.{layer}.{kind}"), 32, 96, None, None)


def instrument(model: nn.Module, options: SavingOptions, *, at: SAEHandle | None = None, **given: Any) -> Instrument:
    given = {"system": "Be kind, and say it in a few short words.", "batch_size": 3, **given}
    return build_instrument(model, TOKENIZER, at or handle(), tiny_probes(), savings=options, **given)


def assert_alike(found: Reading, expected: Reading, *, exactly: bool = False) -> None:
    for name, value in vars(expected).items():
        a, b = np.asarray(getattr(found, name)), np.asarray(value)
        if exactly:
            np.testing.assert_array_equal(a, b, err_msg=name)
        elif name != "gate":
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


class Counted:
    """How many tokens the MLP of every layer has worked on; attached before the first reading, as hooks are seen."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = [0] * len(decoder_layers(model))
        for number, layer in enumerate(decoder_layers(model)):
            linear = next(each for each in layer.get_submodule("mlp").modules() if isinstance(each, nn.Linear | Conv1D))
            linear.register_forward_pre_hook(partial(self._count, number))

    def _count(self, number: int, module: nn.Module, args: Any) -> None:
        self.tokens[number] += args[0].shape[0] * args[0].shape[1]

    def of(self, instrument: Instrument, model: nn.Module) -> list[int]:
        """Of one reading."""
        self.tokens[:] = [0] * len(self.tokens)
        instrument.read(model)
        return list(self.tokens)


# 1. The same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saving", ONE)
def test_readings_equal_those_without_savings(family: str, saving: str) -> None:
    model = adapted(family)
    counted, plain, saved = Counted(model), instrument(model, NONE), instrument(model, ONE[saving])
    for step in range(3):
        assert_alike(saved.read(model), plain.read(model), exactly=saving == "keep_gib")
        move(model, 0.05, seed=step)
    full, less = counted.of(plain, model), counted.of(saved, model)
    rows, nodes, start = 7, len(saved.batches.tree.tokens), saved.batches.shared
    assert start > savings.SHORTEST_PREFIX
    shared = rows * start - start if saving in ("share_prefix", "all") else 0
    first = [0, 0] if saving in ("keep_gib", "all") else [full[0] - shared] * 2
    if saving == "all":  # the shared start's own row goes through all layers
        first = [start, start]
    last = rows * nodes + (start if saving == "all" else 0) if saving in ("trim", "all") else full[2] - shared
    assert less == [*first, last]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_windows_shorter_than_the_shared_start(family: str) -> None:
    model = adapted(family, overrides={"sliding_window": 6})
    plain, saved = instrument(model, NONE), instrument(model, SavingOptions())
    assert saved.batches.shared > 6
    for _ in range(2):
        assert_alike(saved.read(model), plain.read(model))


def test_eager_attention_and_half_precision_bear_all_savings() -> None:
    model = adapted()
    model.get_base_model().set_attn_implementation("eager")
    assert_alike(instrument(model, SavingOptions()).read(model), instrument(model, NONE).read(model))
    model.bfloat16()
    counted, saved = Counted(model), instrument(model, SavingOptions())
    saved.read(model)
    assert counted.of(saved, model)[0] == saved.batches.shared


@pytest.mark.parametrize("readout", ["last", "mean", "max"])
@pytest.mark.parametrize(
    ("kind", "layer"), [("hook_resid_post", 0), ("hook_resid_pre", 2), ("hook_mlp_out", 1), ("hook_resid_post", 2)]
)
def test_every_site_and_readout(kind: str, layer: int, readout: Any) -> None:
    """Below the layer that passes begin at, on its edge, and in the last layer, whose MLP is trimmed."""
    model, at = adapted(), handle(kind, layer)
    plain, saved = (instrument(model, each, at=at, readout=readout) for each in (NONE, SavingOptions()))
    for step in range(2):
        assert_alike(saved.read(model), plain.read(model))
        move(model, 0.05, seed=step)


def test_openings_without_a_pass_of_their_own_for_a_reward_model() -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(tiny_model().config)
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2], task_type="SEQ_CLS")
    model: Any = get_peft_model(base, config).eval()
    contrast = {"compliance": ("Sure", "Of course")}
    plain, saved = (instrument(model, each, contrast=contrast) for each in (NONE, SavingOptions()))
    assert first_trained(model) == 2  # its head is trained, and acts after the layers
    for step in range(2):
        assert_alike(saved.read(model), plain.read(model))
        move(model, 0.05, seed=step)


def test_half_a_batch_is_kept_for_itself_where_memory_does_not_suffice() -> None:
    model = adapted()
    counted, plain, saved = Counted(model), instrument(model, NONE), instrument(model, ONE["keep_gib"], batch_size=7)
    base = model.get_base_model()
    real = base.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    base.forward = small
    for _ in range(2):
        found = saved.read(model)
    assert_alike(found, plain.read(model))
    assert counted.of(saved, model)[:2] == [0, 0]


def _with_room_for(rows: Callable[[], float], model: Any) -> list[int]:
    """Passes of a model that has memory for so many rows only, by their sizes."""
    base, sizes = model.get_base_model(), list[int]()
    real = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > rows():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **kwargs)

    base.forward = forward
    return sizes


def test_what_is_kept_gives_way_before_batches_are_halved(said: pytest.LogCaptureFixture) -> None:
    """A batch of 3 fits unless more than two thirds of what there is to keep are kept."""
    model = adapted()
    plain, saved = instrument(model, NONE), instrument(model, ONE["keep_gib"])
    expected, lower = plain.read(model), saved.savings.lower
    saved.read(model)
    whole = lower.bytes
    sizes = _with_room_for(lambda: 3 if lower.bytes <= whole * 2 / 3 else 2, model)
    lower.drop((int(saved.batches.batches[0].index[0]), 3, 0))  # so that a batch is to be computed anew
    lower.bytes = whole  # as if others were kept instead
    assert_alike(saved.read(model), expected, exactly=True)
    assert sizes == [3, 3, 3, 1]  # did not fit, fits with nothing kept; and the others, of which nothing is kept now
    assert 0 < lower.bytes <= lower.limit == whole // 2
    sizes.clear()
    for _ in range(3):
        assert_alike(saved.read(model), expected, exactly=True)
    assert sizes == [3, 3, 1] * 3
    assert "in two halves" not in said.text
    assert said.text.count("out of memory") == 1


def test_a_batch_that_never_fits_costs_nothing_of_what_is_kept() -> None:
    """Batches of 3 and 1 with room for 2: those of 3 are halved, and what is kept of the others has no part in it."""
    model = adapted()
    saved, room = instrument(model, ONE["keep_gib"]), [2]
    expected, lower = instrument(model, NONE).read(model), saved.savings.lower
    limit = lower.limit
    _with_room_for(lambda: room[0], model)
    for _ in range(3):
        assert_alike(saved.read(model), expected)
    assert (lower.limit, len(lower._kept)) == (limit, 5)


def test_a_probe_alone_is_read_when_what_is_kept_has_given_way() -> None:
    model = adapted()
    plain, saved = (instrument(model, each, batch_size=1) for each in (NONE, ONE["keep_gib"]))
    expected, lower = plain.read(model), saved.savings.lower
    sizes = _with_room_for(lambda: 1 if lower.bytes <= lower.limit / 2 else 0, model)
    saved.savings._borne["lower", 2, type(model.get_base_model())] = True
    lower.limit = 4 * 32 * 200  # float32, width 32
    assert_alike(saved.read(model), expected, exactly=True)
    assert len(sizes) > 7


def test_what_does_not_fit_is_not_copied_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lower, copies = kept.LowerLayers(4 * 10, first=1), list[int]()
    clone = torch.Tensor.clone

    def counted(self: torch.Tensor, **given: Any) -> torch.Tensor:
        copies.append(self.numel())
        return clone(self, **given)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    for number, size in enumerate((6, 20, 5, 3)):
        lower.add((number, 1, 0), torch.zeros(1, size, 1), torch.zeros(1, 1, 1) if size == 3 else None)
    assert copies == [6, 3, 1]
    assert lower.bytes == 40
    lower.add((0, 1, 0), torch.ones(1, 6, 1), None)  # another of the same pass takes its place
    assert (lower.bytes, len(lower._kept)) == (40, 2)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_saving_whose_trial_ran_out_of_memory_is_tried_again(failing: int) -> None:
    """The first reading has no memory left in one of its trials, of which the first is the pass without savings."""
    model = adapted()
    plain, saved = instrument(model, NONE), instrument(model, SavingOptions(share_prefix=False))
    expected, passes = plain.read(model), [0]

    def room() -> float:
        passes[0] += 1
        return 0 if passes[0] == failing else 9

    _with_room_for(room, model)
    assert_alike(saved.read(model), expected)
    assert len(saved.savings._borne) == (0 if failing == 1 else 1)
    assert_alike(saved.read(model), expected)
    assert list(saved.savings._borne.values()) == [True, True]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_savings_are_exact(family: str) -> None:
    """Of a model in float64: the stream behind the last layer, which all savings have a part in."""
    model, at = adapted(family).double(), handle(layer=2)
    found: dict[str, torch.Tensor] = {}
    for name, options in {"none": NONE, **ONE}.items():
        saved = instrument(model, options, at=at, batch_size=7)
        with measuring(model):
            for _ in range(2):
                saving, batch = saved.saving(model, gradients=False), saved.batches.batches[0]
                stream, _ = tree_pass(model, batch, saved.batches, at.site, saving)
        made = (bool(saving.lower and saving.lower.bytes), saving.skip > 0, saving.trim)
        assert made == (name in ("keep_gib", "all"), name in ("share_prefix", "all"), name in ("trim", "all"))
        found[name] = stream[:, -1]
    for name in ONE:
        torch.testing.assert_close(found[name], found["none"], rtol=1e-12, atol=1e-12)


# 2. Nothing stale -----------------------------------------------------------------------------------------------------


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[0].mlp.up_proj.weight.mul_(1.5)


def _past_autograd(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data += 0.1


def _another_parameter(model: Any) -> None:
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight.detach() * 1.5, requires_grad=False)


def _embedding(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.add_(0.1)


def _rotary(model: Any) -> None:
    model.get_base_model().model.rotary_emb.inv_freq.mul_(0.5)


def _hook(model: Any) -> None:
    model.get_base_model().model.layers[0].register_forward_hook(lambda _, args, output: output * 1.5)


def _steered(model: Any) -> None:
    model.get_base_model().model.embed_tokens.register_forward_hook(lambda _, args, output: output * 1.5)


def _fed(model: Any) -> None:
    """Of the decoder itself, which holds the layers."""
    model.get_base_model().model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": kwargs["position_ids"] * 2}), with_kwargs=True
    )


@pytest.mark.parametrize(
    "change", [_in_place, _past_autograd, _another_parameter, _embedding, _rotary, _hook, _steered, _fed]
)
def test_a_change_below_is_seen(change: Any, said: pytest.LogCaptureFixture) -> None:
    model = adapted()
    plain, saved = instrument(model, NONE), instrument(model, ONE["keep_gib"])
    before = [saved.read(model) for _ in range(2)][1]
    change(model)
    expected = plain.read(model)
    assert np.abs(expected.log_probs - before.log_probs).max() > 1e-3
    assert_alike(saved.read(model), expected, exactly=True)
    assert any("have changed since the last reading" in each.message for each in said.records)


@pytest.mark.parametrize("where", ["", "base_model.model.lm_head", "base_model.model.model.norm"])
def test_hooks_of_the_whole_model_and_behind_the_layers_do_not_count(where: str) -> None:
    """Those that look at training batches come and go; a head's act on nothing that is kept."""
    model = adapted()
    counted, saved = Counted(model), instrument(model, ONE["keep_gib"])
    saved.read(model)
    model.get_submodule(where).register_forward_pre_hook(lambda module, args: None)
    assert counted.of(saved, model)[:2] == [0, 0]


def test_two_models_and_two_trainings_do_not_see_each_others(said: pytest.LogCaptureFixture) -> None:
    first, second = adapted(), adapted(overrides={"seed": 1})
    plain, saved = instrument(first, NONE), instrument(first, ONE["keep_gib"])
    for model in (first, second, first, second, first):
        assert_alike(saved.read(model), plain.read(model), exactly=True)
    assert "nothing is kept from now on" in "".join(each.message for each in said.records)
    assert saved.savings.lower.bytes == 0


def test_a_model_that_is_gone_leaves_nothing_to_be_mistaken() -> None:
    """Memory and addresses of a freed model are given to the next: what counts are the objects."""
    model = adapted()
    saved, plain = instrument(model, ONE["keep_gib"]), instrument(model, NONE)
    saved.read(model)
    for seed in range(1, 3):
        del model
        model = adapted(overrides={"seed": seed})
        assert_alike(saved.read(model), plain.read(model), exactly=True)


def test_other_layers_are_trained_from_now_on() -> None:
    model = adapted()
    plain, saved = instrument(model, NONE), instrument(model, ONE["keep_gib"])
    saved.read(model)
    weight = model.get_base_model().model.layers[1].mlp.up_proj.weight.requires_grad_()
    for _ in range(2):
        assert_alike(saved.read(model), plain.read(model), exactly=True)
        with torch.no_grad():
            weight.mul_(1.2)
    assert first_trained(model) == 1


def test_what_was_kept_and_then_written_into_is_not_used() -> None:
    model = adapted()
    plain, saved = instrument(model, NONE), instrument(model, ONE["keep_gib"])
    saved.read(model)
    for each in saved.savings.lower._kept.values():
        each.stream.zero_()
    assert_alike(saved.read(model), plain.read(model), exactly=True)


def test_memory_is_bounded_and_given_back(said: pytest.LogCaptureFixture) -> None:
    model = adapted()
    columns = [batch.input_ids.numel() for batch in instrument(model, NONE).batches.batches]
    room = 4 * 32 * (columns[0] + columns[1] // 2)  # float32, width 32: the first batch and a half
    plain, saved = instrument(model, NONE), instrument(model, SavingOptions(room / 2**30, False, False))
    for _ in range(2):
        assert_alike(saved.read(model), plain.read(model), exactly=True)
    lower = saved.savings.lower
    sizes = {key[0]: each.bytes for key, each in lower._kept.items()}
    assert lower.bytes == sum(sizes.values()) <= room
    assert len(sizes) == 1 + (4 * 32 * (columns[0] + columns[2]) < room)
    assert "measure.keep_gib allows" in "".join(each.message for each in said.records)
    lower.forget()
    assert (lower.bytes, lower._kept) == (0, {})


# 3. What may be left out, and what not --------------------------------------------------------------------------------


def test_the_lowest_layer_that_training_changes() -> None:
    assert [first_trained(adapted(layers=each)) for each in ((2,), (1, 2), (0, 2), None)] == [2, 1, 0, 0]
    assert first_trained(tiny_model()) == 0  # everything
    assert first_trained(tiny_model().requires_grad_(False)) == 0  # nothing
    assert first_trained(adapted(modules_to_save=["embed_tokens"])) == 0
    assert first_trained(adapted(modules_to_save=["lm_head"])) == 2
    assert first_trained(adapted(layers=None, target_modules=["lm_head"])) == 2
    assert first_trained(adapted(layers=None, target_modules=["embed_tokens"])) == 0
    assert first_trained(adapted(overrides={"tie_word_embeddings": True})) == 2
    tied = adapted(overrides={"tie_word_embeddings": True})
    tied.get_base_model().lm_head.weight.requires_grad_()
    assert first_trained(tied) == 0
    below = adapted(layers=None)  # adapters below that are frozen may be switched off or merged
    for name, parameter in below.named_parameters():
        parameter.requires_grad_("layers.2." in name and "lora_" in name)
    assert first_trained(below) == 0
    assert first_trained(torch.compile(adapted(), backend="eager")) == 0
    head_only = tiny_model().requires_grad_(False)
    head_only.lm_head.requires_grad_()
    assert first_trained(head_only) == 2


def test_a_short_or_cheap_shared_start_is_not_worth_a_pass() -> None:
    tree = build_tree(["a"], lambda text: [5])

    def batches(shared: int, own: int) -> ProbeBatches:
        return make_batches([[1] * shared + [2 + k] * own + [9] for k in range(10)], tree, batch_size=4)

    assert [worthwhile_prefix(batches(n, 6)) for n in (0, 3, 4, 9)] == [0, 0, 4, 9]
    assert [worthwhile_prefix(batches(4, n)) for n in (110, 120)] == [4, 0]  # 36 of 1150 tokens, of 1250


def test_padding_is_that_of_rows_sorted_by_length() -> None:
    tree = build_tree(["a"], lambda text: [5])
    ids = [[1] * n for n in (3, 9, 4, 10, 3)]
    assert make_batches(ids, tree, batch_size=2).padding == pytest.approx(2 / 31)  # 10 9 | 4 3 | 3
    assert make_batches(ids, tree, batch_size=5).padding == pytest.approx(1 - 29 / 50)


def test_what_a_model_does_not_bear_is_left_out_and_said(
    said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose layers pass on more than the stream, whose MLP mixes tokens, and that ignores the cache."""
    model = adapted()
    layers = decoder_layers(model)
    inner = layers[0].forward
    aside: dict[str, torch.Tensor] = {}

    def first(hidden: torch.Tensor, **given: Any) -> Any:
        aside["was"] = inner(hidden, **given)
        return aside["was"]

    layers[0].forward = first
    layers[2].register_forward_hook(lambda _, args, output: output + aside.pop("was", torch.zeros(())))
    mlp: Any = layers[2].mlp
    whole = mlp.forward
    mlp.forward = lambda hidden: whole(hidden.cumsum(dim=1))
    plain, saved = instrument(model, NONE), instrument(model, SavingOptions())
    monkeypatch.setattr(savings.Prefix, "update", lambda self, keys, values, *args, **kwargs: (keys, values))
    for _ in range(2):
        assert_alike(saved.read(model), plain.read(model), exactly=True)
    told = [each.message for each in said.records if "does not give the same" in each.message]
    assert len(told) == 3  # once each
    assert all(f"measure.{key}: " in "".join(told) for key in ("keep_gib", "share_prefix", "trim"))
    assert layers[0].forward is first


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_nothing_is_left_behind_and_training_is_the_same_to_the_bit(family: str) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = adapted(family, lora_dropout=0.3).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        saved = instrument(model, SavingOptions())
        ids = torch.arange(1, 25).reshape(2, 12)
        for _ in range(3):
            if watched:
                saved.read(model)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any("forward" in vars(module) for module in decoder_layers(model).modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder_layers(model).modules())
        assert all(module.training for module in model.modules())
        ends.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_error_in_a_pass_puts_the_layers_back() -> None:
    model = adapted()
    layers = decoder_layers(model)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), kept.begun_at(model, 2, torch.zeros(1)):
        assert all("forward" in vars(layer) for layer in layers[:2])
        raise RuntimeError("stop")
    assert not any("forward" in vars(layer) for layer in layers)
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]


def test_a_negative_room_is_refused() -> None:
    with pytest.raises(ValueError, match="keep_gib must be at least 0, got -1"):
        SavingOptions(keep_gib=-1)
