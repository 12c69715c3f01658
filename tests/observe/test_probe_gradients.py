"""Gradients of functionals: against autograd on one functional at a time, and against really moving the weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from smda_callbacks.maths.functionals import FunctionalSet, Slopes, measured, slopes
from smda_callbacks.maths.pathways import State
from smda_callbacks.observe import probe_gradients
from smda_callbacks.observe.activations import captured
from smda_callbacks.observe.behaviour import prefix_probability, scorer
from smda_callbacks.observe.distil import DistilOptions, distil
from smda_callbacks.observe.gradient_share import GradientShare
from smda_callbacks.observe.guard import measuring, weights_restored
from smda_callbacks.observe.instrument import Instrument, arrays, build_instrument
from smda_callbacks.observe.lora import AttributionError, LoraSite, lora_sites
from smda_callbacks.observe.passes import tree_pass
from smda_callbacks.observe.probe_gradients import Gradients, check_differentiable, gradient_reading, slope_gradients
from smda_callbacks.observe.reading import Reading, opening_log_probs
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.observe.savings import SavingOptions
from smda_callbacks.observe.sharding import Command, ProcessError, Team
from smda_callbacks.records import Array, PolicyRecord
from smda_callbacks.training.attribution_start import functionals_of
from tests.helpers.tiny import many_probes, save_sae, tiny_model, tiny_sae, tiny_tokenizer

HEDGES = ("T", "W")


@scorer("hedging", openings=HEDGES)
def hedging(log_probs: Array) -> Array:
    return 1.0 - np.prod(1.0 - np.exp(log_probs), axis=1)


class Bench:
    """A tiny adapted model whose adapter really acts, a policy on it, and its functionals."""

    def __init__(self, folder: Any, architecture: str = "standard", **options: Any) -> None:
        torch.manual_seed(1)
        config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(tiny_model(), config).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        handle = load_sae(save_sae(tiny_sae(architecture), folder / "tiny-sae"))
        tokenizer = tiny_tokenizer()
        full = build_instrument(self.model, tokenizer, handle, many_probes(20), batch_size=8, **options)
        self.policy: PolicyRecord
        self.instrument: Instrument
        self.policy, self.instrument, _ = distil(full, self.model, tokenizer, DistilOptions(5, 3, cv_folds=0))
        self.sites: tuple[LoraSite, ...] = lora_sites(self.model)
        self.functionals: FunctionalSet = functionals_of(self.instrument, self.policy, None, exact=False)

    def state(self) -> State:
        reading = self.instrument.read(self.model)
        return State(*arrays(reading), self.instrument.scores(reading))

    def slopes(self) -> Slopes:
        return slopes(self.functionals, self.state(), scale=self.policy.scale, lam=self.policy.lam)

    def gradients(self) -> np.ndarray:
        """``[functional, weight]``."""
        return torch.cat(self.read_with_gradients()[1], dim=1).double().numpy()

    def read_with_gradients(self, **options: Any) -> tuple[Reading, Gradients]:
        given = {"scale": self.policy.scale, "lam": self.policy.lam, **options}
        return gradient_reading(self.instrument, self.model, self.sites, self.functionals, **given)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), scorers=[prefix_probability(), hedging])


def slow_twin(bench: Bench, wanted: Slopes, functional: int) -> np.ndarray:
    """One functional by plain autograd through the whole pass, probe by probe."""
    instrument, model = bench.instrument, bench.model
    tree = instrument.batches.tree
    column = {text: number for number, text in enumerate(tree.openings)}
    parts = []
    with measuring(model, gradients=True), captured(model, instrument.handle.site) as seen:
        for batch in instrument.batches.batches:
            _, edges = tree_pass(model, batch, instrument.batches, instrument.handle.site)
            opening = torch.stack([edges[:, list(path)].sum(dim=1) for path in tree.paths], dim=1)
            np.testing.assert_allclose(
                opening.detach(), opening_log_probs(edges.detach().double().numpy(), instrument.batches), rtol=1e-5
            )
            refusal = opening[:, [column[text] for text in instrument.scorers[0].openings]].exp().sum(dim=1)
            hedge = 1 - (1 - opening[:, [column[text] for text in HEDGES]].exp()).prod(dim=1)
            pre, _ = instrument.encode(seen[-1][:, batch.width])
            rows = batch.index.numpy()
            y = torch.from_numpy(wanted.y[functional, rows]) * torch.stack([refusal, hedge], dim=1)
            parts.append(y.sum() + (torch.from_numpy(wanted.pre[functional, rows]) * pre).sum())
        total = torch.stack(parts).sum()
        found = torch.autograd.grad(total, [site.weight for site in bench.sites], allow_unused=True)
    flat = [
        torch.zeros(site.weight.numel()) if each is None else each.flatten()
        for each, site in zip(found, bench.sites, strict=True)
    ]
    return torch.cat(flat).double().numpy()


def test_gradients_are_those_of_autograd(bench: Bench) -> None:
    wanted, found = bench.slopes(), bench.gradients()
    assert len(found) == len(bench.functionals.names)
    for k, name in enumerate(bench.functionals.names):
        twin = slow_twin(bench, wanted, k)
        assert np.abs(twin).max() > 0, name
        assert np.linalg.norm(found[k] - twin) < 1e-5 * np.linalg.norm(twin), name


def test_the_reading_is_the_usual_one(bench: Bench) -> None:
    with_gradients, plain = bench.read_with_gradients()[0], bench.instrument.read(bench.model)
    for name, value in vars(plain).items():
        assert np.array_equal(np.asarray(getattr(with_gradients, name)), np.asarray(value)), name


def test_stale_functionals_are_taken_over(bench: Bench) -> None:
    _, fresh = bench.read_with_gradients()
    x = [k for k, name in enumerate(bench.functionals.names) if ":x" in name]
    older = tuple(torch.full_like(each, 7.0) for each in fresh)
    _, found = bench.read_with_gradients(last=older, stale=x[1:])
    for new, whole in zip(found, fresh, strict=True):
        assert (new[x[1:]] == 7.0).all()
        kept = [k for k in range(len(new)) if k not in x[1:]]
        assert torch.equal(new[kept], whole[kept])


class Other(Team):
    """One of three processes, with a model of its own; it sends its sums nowhere."""

    def __init__(self, rank: int, bench: Bench) -> None:
        super().__init__(rank, 3, None)
        self.instrument = bench.instrument.with_team(self)
        self.share_of = GradientShare(copy.deepcopy(bench.model), self)
        self.sent: list[torch.Tensor] = []

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        self.sent = list(tensors)


class Main(Team):
    """The first of them: what it tells the others, they do at once."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(0, 3, None)
        self.others = [Other(rank, bench) for rank in (1, 2)]
        self.told: list[Command] = []

    def tell(self, command: Command) -> None:
        self.told.append(command)

    def gather(self, found: Any) -> list[Any]:
        return [found, *(other.share_of.parts(self.told[-1], other.instrument) for other in self.others)]

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        for other in self.others:
            other.share_of.add_up()
            for total, each in zip(tensors, other.sent, strict=True):
                total += each
            other.share_of.add_up()
            assert not other.sent  # nothing is held that was sent


def test_the_shares_of_three_processes_add_up_to_the_gradients_of_one(tmp_path: Any) -> None:
    bench = Bench(tmp_path)
    bench.model.double()
    _, alone = bench.read_with_gradients()
    team = Main(bench)
    given: dict[str, Any] = {"scale": bench.policy.scale, "lam": bench.policy.lam}
    reading, together = gradient_reading(
        bench.instrument.with_team(team), bench.model, bench.sites, bench.functionals, **given
    )
    assert [each.what for each in team.told] == ["gradients", "sum", "features", "sum"]
    assert np.array_equal(reading.log_probs, bench.instrument.read(bench.model).log_probs)
    for a, b in zip(together, alone, strict=True):
        assert a.dtype == torch.float64
        assert float((a - b).norm(dim=1).max()) < 1e-10 * float(b.norm())
    assert all(site.weight.grad is None for site in bench.sites)


def test_another_process_that_runs_out_of_memory_makes_room_and_holds_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Other(1, bench)
    command = Command("gradients", functionals=bench.functionals, scale=bench.policy.scale)
    other.share_of.parts(command, other.instrument)

    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    gave: list[str] = []
    monkeypatch.setattr(probe_gradients, "local_slopes", full)
    monkeypatch.setattr(bench.instrument.savings.lower, "give_way", gave.append)
    with pytest.raises(ProcessError, match="lower measure"):
        other.share_of.parts(command, other.instrument)
    other.share_of.add_up()
    assert gave == ["gradients"]
    assert other.sent == []


def test_gradients_predict_what_moving_the_weights_does(bench: Bench) -> None:
    """Central differences along a random direction: the functionals' change is their gradient times the direction."""
    generator = torch.Generator().manual_seed(3)
    parameters = [site.module.weight for site in bench.sites]
    direction = [torch.randn(p.shape, generator=generator) for p in parameters]
    size, ends = 2e-4, []
    for sign in (1, -1):
        with weights_restored(parameters), torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=sign * size)
            ends.append(bench.state())
    scale, lam = bench.policy.scale, bench.policy.lam
    changed = measured(bench.functionals, ends[1], ends[0], scale=scale, lam=lam) / (2 * size)
    predicted = bench.gradients() @ torch.cat([way.flatten() for way in direction]).double().numpy()
    assert (ends[0].gate == ends[1].gate).all()
    np.testing.assert_allclose(predicted, changed, rtol=0.02, atol=2e-3 * np.abs(changed).max())


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("readout", ["last", "mean", "max"])
def test_other_encoders_and_readouts(architecture: str, readout: Any, tmp_path: Any) -> None:
    bench = Bench(tmp_path, architecture, readout=readout)
    wanted, found = bench.slopes(), bench.gradients()
    x = [k for k, name in enumerate(bench.functionals.names) if name.endswith(":x")]
    assert len(x) == 5
    assert all(np.linalg.norm(found[k]) > 0 for k in x if np.abs(wanted.pre[k]).max() > 0)
    if readout == "last":
        single = [slow_x(bench, wanted, k) for k in x]
        np.testing.assert_allclose(found[x], single, rtol=1e-3, atol=1e-5 * np.abs(found[x]).max())


def slow_x(bench: Bench, wanted: Slopes, functional: int) -> np.ndarray:
    parts = []
    with measuring(bench.model, gradients=True), captured(bench.model, bench.instrument.handle.site) as seen:
        for batch in bench.instrument.batches.batches:
            tree_pass(bench.model, batch, bench.instrument.batches, bench.instrument.handle.site)
            pre, _ = bench.instrument.encode(seen[-1][:, batch.width])
            parts.append((torch.from_numpy(wanted.pre[functional, batch.index.numpy()]) * pre).sum())
        found = torch.autograd.grad(torch.stack(parts).sum(), [s.weight for s in bench.sites], allow_unused=True)
    flat = [
        torch.zeros(s.weight.numel()) if g is None else g.flatten() for g, s in zip(found, bench.sites, strict=True)
    ]
    return torch.cat(flat).double().numpy()


def test_nothing_is_left_behind(bench: Bench) -> None:
    model = bench.model.train()
    weight = bench.sites[0].module.weight
    weight.grad = torch.ones_like(weight)
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(1), random.random())
    torch.manual_seed(5)
    random.seed(5)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    before = bench.state()
    bench.gradients()
    after = bench.state()
    assert (before.pre == after.pre).all()
    assert (before.y == after.y).all()
    assert weight.grad is not None
    assert (weight.grad == 1).all()
    assert all(site.module.weight.grad is None for site in bench.sites[1:])
    assert model.training
    assert (torch.rand(1), random.random()) == expected
    assert hooks == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    weight.grad = None
    model.eval()


def test_a_model_that_is_read_in_several_passes_is_refused(bench: Bench) -> None:
    config = bench.model.get_base_model().config
    kept, config._attn_implementation = config._attn_implementation, "flash_attention_2"
    try:
        with pytest.raises(AttributionError, match="attn_implementation sdpa or eager"):
            check_differentiable(bench.model)
    finally:
        config._attn_implementation = kept


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "a bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding"),
    ],
)
def test_what_is_no_plain_lora_matrix_is_refused_by_name(options: dict[str, Any], word: str) -> None:
    overrides = {"attention_bias": True} if "bias" in options else {}
    config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    with pytest.raises(AttributionError, match=word) as caught:
        lora_sites(get_peft_model(tiny_model(**overrides), config))
    assert "Next step" in str(caught.value)


def test_full_fine_tuning_is_refused_by_name() -> None:
    with pytest.raises(AttributionError, match="full weights"):
        lora_sites(tiny_model())


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"layers_to_transform": [1]}, {"lora_dropout": 0.1}])
def test_plain_variants_are_all_found(options: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(tiny_model(), config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"{site.name}.weight" for site in lora_sites(model)} == trained
    assert trained


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("readout", ["last", "mean"])
def test_savings_do_not_change_gradients(layer: int, readout: Any, tmp_path: Any) -> None:
    """With adapters on layers 1 and 2: the SAE below them, where no feature ever changes, and at the first of them."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2])
    model: Any = get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for site in lora_sites(model):
            site.weight.normal_(std=0.05)
    handle = load_sae(save_sae(tiny_sae("standard", hook_name=f"blocks.{layer}.hook_resid_post"), tmp_path / "sae"))
    found, tokenizer = [], tiny_tokenizer()
    for savings in (SavingOptions(keep_gib=0, share_prefix=False, trim=False), SavingOptions(share_prefix=False)):
        given: Any = {"batch_size": 8, "readout": readout, "savings": savings}
        full = build_instrument(model, tokenizer, handle, many_probes(20), **given)
        policy, instrument, _ = distil(full, model, tokenizer, DistilOptions(5, 3, cv_folds=0))
        functionals = functionals_of(instrument, policy, None, exact=False)
        for _ in range(2):
            reading, gradients = gradient_reading(
                instrument, model, lora_sites(model), functionals, scale=policy.scale, lam=policy.lam
            )
        assert np.array_equal(reading.log_probs, instrument.read(model).log_probs)
        found.append(torch.cat(gradients, dim=1).double().numpy())
    assert instrument.savings.lower.first == 1
    assert (np.abs(found[0]).max(axis=1) > 0).sum() >= len(functionals.names) - 5 * (layer == 0)
    for plain, saved in zip(*found, strict=True):
        assert np.linalg.norm(saved - plain) <= 1e-5 * np.linalg.norm(plain)


def test_gradients_of_given_slopes_are_those_of_the_functionals(tmp_path: Any) -> None:
    bench = Bench(tmp_path)
    given: dict[str, Any] = {"scale": bench.policy.scale, "lam": bench.policy.lam}
    _, wanted = gradient_reading(bench.instrument, bench.model, bench.sites, bench.functionals, **given)
    known = slopes(bench.functionals, bench.state(), **given)
    found = slope_gradients(bench.instrument, bench.model, bench.sites, known)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm())
    assert all(site.weight.grad is None for site in bench.sites)
