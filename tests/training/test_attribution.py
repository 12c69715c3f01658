"""Books of pairs in real runs: against one pair at a time, against measuring, and against themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from smda_callbacks.maths.ledger import balance_error
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.lora import AttributionError
from smda_callbacks.observe.sequences import split_batch
from smda_callbacks.records import LINES, PairBook
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.attempts import GIVE_UP, Attempts
from smda_callbacks.training.attribution import Attributor
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.ghost import Ghost, StepUpdate
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.row_identity import PairIndex
from tests.helpers.tiny import tiny_model
from tests.training.conftest import CHECKPOINTING

Make = Callable[..., Any]


def books(sink: MemorySink) -> list[PairBook]:
    found = [window.pairs for window in sink.windows]
    assert all(book is not None for book in found)
    return [book for book in found if book is not None]


def attributed(plan: Plan, **options: Any) -> Plan:
    return replace(
        plan, attribution=AttributionOptions(**{"engine": "ghost", "features": None, "renew": None, **options})
    )


class OneByOne(TrainerCallback):
    """After every step, the gradient of every example by a pass of its own, without padding or packing."""

    def __init__(self, watched: MeasuringCallback) -> None:
        self.watched = watched
        self.batches: list[dict[str, Any]] = []
        self.before: list[torch.Tensor] = []
        self.gradient_errors: list[float] = []
        self.share_errors: list[float] = []
        self.examples: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.batches.append({name: value for name, value in kwargs.items() if torch.is_tensor(value)})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.watched.monitor.attributor  # type: ignore[union-attr]
        assert isinstance(step, Attributor)
        captured, sites = step._capture.take(), step._sites
        rows = self.loop(kwargs["model"], [f"{site.name}.weight" for site in sites])
        self.batches = []
        assert len(captured.examples) == len(rows)
        found = torch.cat(captured.gradients, dim=1).double()
        self.gradient_errors += ((found - rows).norm(dim=1) / rows.norm(dim=1)).tolist()
        self.rows, self.examples = rows, [*self.examples, len(rows)]

    def loop(self, model: Any, weights: list[str]) -> torch.Tensor:
        """``[example, weight]``: the gradients of all examples of the step, one at a time, without dropout."""
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches)
        batches, self.batches = self.batches, []
        parameters = dict(model.named_parameters())
        wanted, found = [parameters[name] for name in weights], []
        flags = [(module, module.training) for module in model.modules()]
        model.eval()  # no dropout here, and no checkpointing
        for batch in batches:
            for example in split_batch(batch):
                place = (slice(example.row, example.row + 1), slice(example.start, example.stop))
                given = {name: batch[name][place].clone() for name in ("input_ids", "labels")}
                given["labels"][:, 0] = -100
                with torch.enable_grad():  # TRL's own loss
                    output = model(**given, use_cache=False, fused_lm_head=True)
                    loss = -(output.log_probs * output.label_mask).sum() / tokens
                    gradients = torch.autograd.grad(loss, wanted)
                found.append(torch.cat([each.flatten().double() for each in gradients]))
        for module, training in flags:
            module.training = training
        return torch.stack(found)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        window = self.watched.monitor.attributor._window  # type: ignore[union-attr]
        self.step: StepUpdate = window.steps[-1]  # type: ignore[union-attr]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shares from the loop's gradients, in float64, with the engine's own gradients of the functionals."""
        slope = torch.cat([site.clip * site.share_slope().double() for site in self.step.sites])
        own = self.ghost_mean @ (self.rows * slope).T.numpy()
        share = self.shares[-1]
        self.share_errors.append(float(np.linalg.norm(own.T - share) / np.linalg.norm(share)))


def spy_on_ghost(monkeypatch: pytest.MonkeyPatch, twin: OneByOne) -> None:
    """Let the twin see what the engine multiplied with, and what came out, example by example."""
    twin.shares = []  # type: ignore[attr-defined]
    real = Ghost._own

    def own(self: Ghost, step: Any, mean: Any, end: Any) -> Any:
        twin.ghost_mean = torch.cat([each.double() for each in mean], dim=1).numpy()  # type: ignore[attr-defined]
        entries = real(self, step, mean, end)
        twin.shares.append(entries.share)  # type: ignore[attr-defined]
        return entries

    monkeypatch.setattr(Ghost, "_own", own)


def several_adapters(model: Any) -> Any:
    """A second adapter that is there but not trained, and a first that is: what stacked adapters look like."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config, adapter_name="first")
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["first", "second"])
    return model


SETUPS: dict[str, dict[str, Any]] = {
    "padded": {},
    "accumulation with an uneven tail": {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1},
    "assistant-only loss": {"assistant_only_loss": True},
    "truncated": {"max_length": 18},
    "padding free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 64},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "checkpointing": {CHECKPOINTING: True},
    "reentrant checkpointing": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    "tight clipping": {"max_grad_norm": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "sgd": {"optim": "sgd"},
    "rsLoRA": {"lora": {"use_rslora": True}},
    "one layer": {"lora": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}},
    "few modules": {"lora": {"target_modules": ["q_proj", "down_proj"]}},
    "evaluation in between": {"eval_strategy": "steps", "eval_steps": 1},
    "workers": {"dataloader_num_workers": 1},
}


def against_one_by_one(
    plan: Plan, trainer: Make, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **options: Any
) -> OneByOne:
    watched = MeasuringCallback(attributed(plan))
    twin = OneByOne(watched)
    spy_on_ghost(monkeypatch, twin)
    trainer(watched, twin, model=tiny_model().to(dtype), **{"max_steps": 3, **options}).train()
    assert sum(twin.examples) >= 6
    return twin


@pytest.mark.parametrize("name", SETUPS)
def test_gradients_and_shares_are_those_of_one_pair_at_a_time(
    name: str, plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = against_one_by_one(plan, trainer, monkeypatch, torch.float64, **SETUPS[name])
    assert max(twin.gradient_errors) < 1e-6
    assert max(twin.share_errors) < 1e-6
    assert max(book.capture_error for book in books(sink)) < 1e-6


@pytest.mark.parametrize("name", ["padded", "accumulation with an uneven tail", "checkpointing", "few modules"])
def test_float32_loses_nothing_but_its_own_rounding(
    name: str, plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = against_one_by_one(plan, trainer, monkeypatch, torch.float32, **SETUPS[name])
    assert max(twin.share_errors) < 1e-6
    assert max(book.capture_error for book in books(sink)) < 1e-6


def test_several_adapters_at_once(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    model = several_adapters(tiny_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    run = trainer(MeasuringCallback(attributed(plan)), model=model, peft=False, max_steps=3)
    run.train()
    for book in books(sink):
        assert book.capture_error < 1e-5
        assert book.update_error < 1e-3


UNSHUFFLED = {"train_sampling_strategy": "sequential"}

ENGINES = {"ghost": {}, "exact": {"engine": "exact"}, "without momentum": {"momentum": "line"}}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("every", [1, 2])
def test_books_close_for_every_functional_and_over_the_run(
    name: str, every: int, plan: Plan, sink: MemorySink, trainer: Make
) -> None:
    plan = replace(attributed(plan, **ENGINES[name]), every=every)
    trainer(MeasuringCallback(plan), max_steps=4, weight_decay=0.1, lora={"lora_dropout": 0.1}).train()
    assert len(books(sink)) == 4 // every
    for book in books(sink):
        assert balance_error(book.lines, book.share, book.later_share) < 1e-12
    totals = sum(
        book.share.sum(axis=0) + book.later_share.sum(axis=0) + sum(book.lines[line] for line in LINES)
        for book in books(sink)
    )
    functionals = sink.start.manifest["attribution"]["functionals"]  # type: ignore[union-attr]
    first, last = sink.start.baseline, sink.windows[-1]  # type: ignore[union-attr]
    harmful = [probe.expected == "refuse" for probe in plan.probes.probes]
    change = (last.snapshot.y - first.snapshot.y)[harmful].mean()  # type: ignore[union-attr]
    assert totals[functionals.index("refusal:harmful")] == pytest.approx(change, rel=1e-9)
    shift = last.coef[0, 0] - first.coef[0, 0]  # type: ignore[index]
    feature = [k for k, each in enumerate(functionals) if each.startswith(f"feature:{sink.start.policy.features[0]}:")]  # type: ignore[union-attr]
    gating = sum(window.shift["shift_x_gating"][0, 0] for window in sink.windows)
    told = totals[feature].sum() + (0.0 if name == "exact" else gating)
    assert told == pytest.approx(shift, rel=1e-9)


def test_little_is_left_unexplained(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    """At a small step, the pairs' shares, momentum carried, are the measured change of behaviours."""
    trainer(MeasuringCallback(attributed(plan)), max_steps=5, learning_rate=1e-3).train()
    for book in books(sink)[1:]:
        assert abs(book.lines["unexplained"][:2]).max() < 0.03 * abs(book.lines["measured"][:2]).max()
        assert abs(book.lines["momentum"]).max() < 1e-4 * abs(book.later_share).max()
        assert len(book.later_ids)
        assert abs(book.later_share).max() > 0


def test_ghost_agrees_with_exact_and_its_error_shrinks_with_the_step(plan: Plan, trainer: Make) -> None:
    errors, rates = [], (4e-3, 2e-3, 1e-3)
    for rate in rates:
        found = {}
        for engine in ("ghost", "exact"):
            sink = MemorySink()
            one = replace(attributed(plan, engine=engine, momentum="line"), make_sinks=lambda _, s=sink: [s])  # type: ignore[misc]
            trainer(MeasuringCallback(one), max_steps=3, learning_rate=rate, per_device_train_batch_size=4).train()
            names = sink.start.manifest["attribution"]["functionals"]  # type: ignore[union-attr]
            means = [k for k, each in enumerate(names) if each.startswith("refusal:")]
            found[engine] = np.concatenate([book.effect[:, means] for book in books(sink)])
        errors.append(np.linalg.norm(found["ghost"] - found["exact"]) / np.linalg.norm(found["exact"]))
    assert errors[0] < 0.2
    for larger, smaller in pairwise(errors):
        assert 1.4 < larger / smaller < 3.0  # halving the rate halves the error


def test_a_pair_s_effect_is_what_leaving_it_out_does(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    """The exact engine against a training in which the pair really was missing: its loss masked, all else equal."""

    class Masked(TrainerCallback):
        """Zeroes what one row of the first batch adds to the loss, without changing the loss's denominator."""

        def __init__(self, row: int) -> None:
            self.row = row

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kwargs["model"].register_forward_pre_hook(self.mask, with_kwargs=True)

        def mask(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if not (model.training and torch.is_grad_enabled()):
                return None
            labels = kwargs["labels"].clone()
            labels[self.row] = -100
            return args, {**kwargs, "labels": labels}

    options = {"max_steps": 1, "per_device_train_batch_size": 3, "max_grad_norm": 0.5, **UNSHUFFLED}
    trainer(MeasuringCallback(attributed(plan, engine="exact")), **options).train()
    book, whole = books(sink)[0], sink.windows[0].snapshot
    # Without a shuffle, row k of the first batch is row k of the data set.
    row_of = {pair.id: pair.rows[0] for pair in sink.windows[0].pairs_seen}
    effects = {row_of[int(number)]: effect for number, effect in zip(book.ids, book.effect[:, 0], strict=True)}
    assert sorted(effects) == [0, 1, 2]
    for row in range(3):
        other = MemorySink()
        plain = replace(plan, make_sinks=lambda _, s=other: [s], attribution=AttributionOptions(engine="off"))  # type: ignore[misc]
        trainer(MeasuringCallback(plain), Masked(row), **options).train()
        harmful = [probe.expected == "refuse" for probe in plan.probes.probes]
        without = other.windows[0].snapshot
        assert whole is not None
        assert without is not None
        exact = (whole.y - without.y)[harmful].mean()
        assert effects[row] == pytest.approx(exact, rel=2e-3, abs=1e-7)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"lora": {"use_dora": True}}, "DoRA"),
    "modules_to_save": ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
    "Adafactor": ({"optim": "adafactor"}, "Adafactor"),
    "compile": ({"torch_compile": True}, "torch.compile"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_right_is_refused_before_training(
    name: str, plan: Plan, sink: MemorySink, trainer: Make
) -> None:
    options, word = REFUSALS[name]
    run = trainer(MeasuringCallback(attributed(plan)), **options)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(AttributionError, match=word):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert sink.start is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DoRA", "Adafactor"])
def test_auto_goes_without_and_says_why(name: str, plan: Plan, sink: MemorySink, trainer: Make) -> None:
    options, word = REFUSALS[name]
    trainer(MeasuringCallback(attributed(plan, engine="auto")), **options).train()
    assert sink.start is not None
    assert sink.start.manifest["attribution"]["engine"] == "off"
    assert word in sink.start.manifest["attribution"]["why"]
    assert [window.pairs for window in sink.windows] == [None] * 4


def test_every_second_window(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    trainer(MeasuringCallback(attributed(plan, every=2))).train()
    assert [window.pairs is not None for window in sink.windows] == [True, False, True, False]
    for window in sink.windows:
        if window.pairs is not None:
            assert balance_error(window.pairs.lines, window.pairs.share, window.pairs.later_share) < 1e-12
            assert window.pairs.update_error < 1e-3


def test_a_step_that_needs_too_much_memory_costs_its_pairs_only(
    plan: Plan, sink: MemorySink, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(attributed(plan, memory_gib=1e-6), on_error="warn")
    trainer(MeasuringCallback(plan)).train()
    assert [window.status for window in sink.windows] == ["ok"] * 4
    assert [window.pairs for window in sink.windows] == [None] * 4
    assert "attribution.memory_gib" in caplog.text


def test_memory_held_is_bounded(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    """Momentum is followed only as far as the limit allows; what is forgotten is in the momentum line."""
    watched = MeasuringCallback(attributed(plan, memory_gib=150e-6))
    trainer(watched, max_steps=6).train()
    for book in books(sink):
        assert 0 < book.held_bytes <= 150e-6 * 2**30
        assert balance_error(book.lines, book.share, book.later_share) < 1e-12
    assert abs(books(sink)[-1].lines["momentum"]).max() > 1e-3 * abs(books(sink)[-1].lines["measured"]).max()


def test_bf16_says_how_ill_conditioned_the_first_steps_are(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    trainer(MeasuringCallback(attributed(plan)), bf16=True).train()
    for book in books(sink):
        assert 1e-4 < book.update_error < 1  # float32: below 1e-5
        assert book.capture_error < 0.02
        assert balance_error(book.lines, book.share, book.later_share) < 1e-12


def test_no_window_starts_at_gradients_of_an_earlier_reading(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is read with gradients but fails, step 3 has no memory for them: step 4 needs those of step 3."""
    read, snapshot, readings, failed = Ghost.read, Instrument.snapshot, list[float](), list[int]()

    def weights(model: Any) -> float:
        return float(sum(each.detach().double().sum() for each in model.parameters() if each.requires_grad))

    def reading(self: Ghost, model: Any) -> Any:
        readings.append(weights(model))
        if len(readings) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return read(self, model)

    def at(self: Instrument, step: int, given: Any) -> Any:
        if step == 2 and not failed:
            failed.append(step)
            raise RuntimeError("broken")
        return snapshot(self, step, given)

    monkeypatch.setattr(Ghost, "read", reading)
    monkeypatch.setattr(Instrument, "snapshot", at)
    trainer(MeasuringCallback(replace(attributed(plan, every=2), on_error="warn"))).train()
    assert [window.status for window in sink.windows] == ["ok", "failed", "ok", "ok"]
    assert readings[4] == readings[3]  # taken again, at the weights where memory had not sufficed


@pytest.mark.parametrize("reentrant", [False, True])
def test_bf16_with_checkpointing_is_attributed(plan: Plan, sink: MemorySink, trainer: Make, reentrant: bool) -> None:
    """The recomputation runs inside of autocast; gradients of pairs stay float32."""
    watched = MeasuringCallback(attributed(plan))
    found = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert watched.monitor is not None
            assert watched.monitor.attributor is not None
            found.append({each.dtype for each in watched.monitor.attributor._capture.take().gradients})

    checkpointing = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    trainer(watched, Look(), bf16=True, **checkpointing).train()
    assert found == [{torch.float32}] * 4
    assert len(books(sink)) == 4
    assert max(book.capture_error for book in books(sink)) < 0.02


def test_a_book_that_fails_leaves_no_half_remembered_momentum(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are remembered one by one; after a failure between two of them, ages would be counted wrongly."""
    real, calls = Ghost._own, list[int]()

    def own(self: Ghost, *given: Any) -> Any:
        calls.append(len(self._past))
        if len(calls) == 4:
            raise RuntimeError("broken")
        return real(self, *given)

    monkeypatch.setattr(Ghost, "_own", own)
    watched = MeasuringCallback(replace(attributed(plan), on_error="warn", every=2))
    trainer(watched, max_steps=6).train()
    assert [window.pairs is not None for window in sink.windows] == [True, False, True]
    assert calls[4:] == [0, 1]


def test_pairs_that_could_not_be_described_are_described_later(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PairIndex.describe, list[int]()

    def describe(self: PairIndex, number: int) -> Any:
        calls.append(number)
        if len(calls) == 2:
            raise RuntimeError("broken")
        return real(self, number)

    monkeypatch.setattr(PairIndex, "describe", describe)
    trainer(MeasuringCallback(replace(attributed(plan), on_error="warn")), max_steps=20).train()
    assert {pair.id for window in sink.windows for pair in window.pairs_seen} == set(range(20))


def test_gradients_that_do_not_fit_into_memory_cost_the_pairs_only(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = Ghost.read, []

    def small(self: Ghost, model: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, model)

    monkeypatch.setattr(Ghost, "read", small)
    trainer(MeasuringCallback(replace(attributed(plan), on_error="warn"))).train()
    assert [window.status for window in sink.windows] == ["ok"] * 4
    assert [window.pairs is not None for window in sink.windows] == [True, False, True, True]
    assert "lower measure.batch_size" in caplog.text


def test_features_by_number_and_by_name(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    trainer(MeasuringCallback(attributed(plan, features=2)), max_steps=1).train()
    assert sink.start is not None
    policy, names = sink.start.policy, sink.start.manifest["attribution"]["functionals"]
    largest = sorted(policy.features[np.argsort(-np.abs(policy.coef[:, 0]))[:2]].tolist())
    assert sorted({int(name.split(":")[1]) for name in names if name.startswith("feature:")}) == largest
    last, other = int(policy.features[-1]), MemorySink()
    plan = replace(plan, make_sinks=lambda _: [other])
    trainer(MeasuringCallback(attributed(plan, features=(last,))), max_steps=1).train()
    assert other.start is not None
    names = other.start.manifest["attribution"]["functionals"]
    assert [name for name in names if name.startswith("feature:")] == [f"feature:{last}:x", f"feature:{last}:y"]
    with pytest.raises(AttributionError, match=r"names 99999.*Allowed: .*" + str(last)):
        trainer(MeasuringCallback(attributed(plan, features=(99999,))), max_steps=1).train()


def test_momentum_is_followed_by_each_group_s_own_betas(plan: Plan, sink: MemorySink, trainer: Make) -> None:
    run = trainer(MeasuringCallback(attributed(plan)), max_steps=5, learning_rate=1e-3)
    named = [(name, each) for name, each in run.model.named_parameters() if each.requires_grad]
    halves = [[each for name, each in named if f"lora_{side}" in name] for side in "AB"]
    betas = [(0.5, 0.9), (0.95, 0.99)]
    groups = [{"params": half, "betas": each} for half, each in zip(halves, betas, strict=True)]
    run.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)
    run.train()
    for book in books(sink)[1:]:
        assert abs(book.lines["momentum"]).max() < 1e-4 * abs(book.later_share).max()


def test_attribution_that_fails_for_one_reason_is_switched_off_and_says_so_once(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, readings = Ghost.read, list[int]()

    def counted(self: Ghost, model: Any) -> Any:
        readings.append(1)
        return real(self, model)

    monkeypatch.setattr(Ghost, "read", counted)
    run = trainer(MeasuringCallback(replace(attributed(plan, memory_gib=1e-6), on_error="warn")), max_steps=6)
    run.train()
    assert len(readings) == 2 * GIVE_UP  # at the start and the end of each of them, and at no later one
    assert [window.status for window in sink.windows] == ["ok"] * 6
    whys = [window.unattributed or "" for window in sink.windows]
    assert all(why.startswith("the gradients of this step's pairs need more than") for why in whys[:GIVE_UP])
    off = "attribution was switched off at step 3, after 3 windows in a row failed for one reason"
    assert set(whys[GIVE_UP:]) == {off}
    told = [alert for alert in sink.alerts if alert.kind == "attribution_off"]
    assert [(alert.step, alert.message) for alert in told] == [(3, f"{off}: {whys[0]}")]
    assert caplog.text.count("attribution was switched off") == 1
    for module in run.model.modules():
        assert not [each for each in module._forward_hooks.values() if "smda" in getattr(each, "func", each).__module__]


def test_failures_for_different_reasons_or_with_a_success_between_go_on() -> None:
    attempts = Attempts()
    told = ["no step was seen", "they miss 12.5% of it", "they miss 7% of it", "no step was seen"]
    assert [attempts.failed(why) for why in told] == [False] * 4
    attempts = Attempts()
    assert [attempts.failed("too large") for _ in range(2)] == [False, False]
    attempts.succeeded()
    assert [attempts.failed(f"{k}.5 GiB are too little") for k in range(3)] == [False, False, True]


def test_a_window_that_the_cadence_leaves_out_has_no_reason_and_others_have(
    plan: Plan, sink: MemorySink, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = PairIndex.describe, list[int]()

    def describe(self: PairIndex, number: int) -> Any:
        calls.append(number)
        if len(calls) == 1:
            raise RuntimeError("broken")
        return real(self, number)

    monkeypatch.setattr(PairIndex, "describe", describe)
    trainer(MeasuringCallback(replace(attributed(plan, every=2), on_error="warn"))).train()
    assert [window.unattributed for window in sink.windows] == ["RuntimeError: broken", None, None, None]
