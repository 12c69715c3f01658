"""The order of events: windows, their books, what goes wrong midway, and what is refused before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe import reading as reading_module
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.sae import SAEError, load_sae
from smda_callbacks.records import PATHWAYS, ROWS
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.alerts import AlertLimits
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.requirements import AdapterError, require_lora, require_whole_model
from tests.helpers.tiny import save_sae, tiny_model, tiny_sae, tiny_tokenizer


class Spy(TrainerCallback):
    """Lets a test act at the end of every step, before the callback under test if listed first."""

    def __init__(self, action: Callable[[int, Any], None]) -> None:
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.action(state.global_step, kwargs)


def test_every_step_is_booked_and_the_books_close(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    trainer(MeasuringCallback(plan)).train()
    assert sink.start is not None
    assert sink.end is not None
    assert [(w.first_step, w.step, w.status) for w in sink.windows] == [(k, k, "ok") for k in (1, 2, 3, 4)]
    start, last, policy = sink.start.baseline, sink.windows[-1], sink.start.policy
    total = sum(w.shift[part] for w in sink.windows for part in PATHWAYS)
    np.testing.assert_allclose(total, last.coef - start.coef, atol=1e-12)
    np.testing.assert_allclose(start.coef, policy.coef, rtol=1e-12)
    refitted = fit_ridge(last.snapshot.x, last.snapshot.y, policy.lam, scale=policy.scale)
    np.testing.assert_array_equal(refitted.coef, last.coef)
    groups = plan.probes.groups
    for before, window in zip([start, *sink.windows], sink.windows, strict=False):
        measured = [
            (window.snapshot.y - before.snapshot.y)[groups == c].mean() for c in range(len(plan.probes.categories))
        ]
        np.testing.assert_allclose(sum(window.account[row] for row in ROWS)[:, 0], measured, atol=1e-12)
        assert window.update_rms > 0
        assert window.trainer["learning_rate"] > 0
    assert sink.windows[0].trainer["learning_rate"] == 5e-3  # of this step, not the scheduler's next
    assert sink.end.status == "finished"


@pytest.mark.parametrize(("every", "windows"), [(2, [(1, 2), (3, 4)]), (3, [(1, 3), (4, 4)]), (9, [(1, 4)])])
def test_windows_cover_every_step_once_and_sum_to_the_same_total(
    plan: Plan, sink: MemorySink, trainer: Any, every: int, windows: list[tuple[int, int]]
) -> None:
    trainer(MeasuringCallback(plan)).train()
    coarse = MemorySink()
    trainer(MeasuringCallback(replace(plan, every=every, make_sinks=lambda _: [coarse]))).train()
    assert [(w.first_step, w.step) for w in coarse.windows] == windows
    fine_total = sink.windows[-1].coef - sink.start.baseline.coef
    coarse_total = sum(w.shift[part] for w in coarse.windows for part in PATHWAYS)
    np.testing.assert_allclose(coarse_total, fine_total, atol=1e-12)


def test_two_runs_give_the_same_records(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    trainer(MeasuringCallback(plan)).train()
    again = MemorySink()
    trainer(MeasuringCallback(replace(plan, make_sinks=lambda _: [again]))).train()
    for a, b in zip(sink.windows, again.windows, strict=True):
        for part in PATHWAYS:
            np.testing.assert_array_equal(a.shift[part], b.shift[part])
        np.testing.assert_array_equal(a.snapshot.y, b.snapshot.y)
    for part in PATHWAYS:
        np.testing.assert_array_equal(sink.start.noise.random[part], again.start.noise.random[part])


def test_a_saved_policy_is_used_as_it_is(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    trainer(MeasuringCallback(plan)).train()
    other = MemorySink()
    trainer(MeasuringCallback(replace(plan, policy=sink.start.policy, make_sinks=lambda _: [other]))).train()
    assert other.start.policy is sink.start.policy
    np.testing.assert_array_equal(other.windows[-1].coef, sink.windows[-1].coef)


@pytest.mark.parametrize("field", ["probe_hash", "sae_id", "features"])
def test_a_policy_of_something_else_is_refused(plan: Plan, sink: MemorySink, trainer: Any, field: str) -> None:
    trainer(MeasuringCallback(plan)).train()
    policy = sink.start.policy
    foreign = np.array([0, 1, 2, 3, 4, 9999]) if field == "features" else "other"
    bad = replace(plan, policy=replace(policy, **{field: foreign}), make_sinks=lambda _: [MemorySink()])
    messages = {
        "probe_hash": r"policy was distilled on other probes \(hash other\)",
        "sae_id": r"policy was distilled with SAE 'other', but this run reads 'tiny-sae'",
        "features": r"policy names feature 9999, but the SAE has features 0 to 95",
    }
    with pytest.raises(ValueError, match=messages[field]):
        trainer(MeasuringCallback(bad)).train()


def test_skipped_steps_are_listed(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    def skip(step: int, kwargs: Any) -> None:
        kwargs["optimizer"]._is_overflow = step in (2, 3)  # what accelerate sets when the gradient scaler skips

    trainer(Spy(skip), MeasuringCallback(replace(plan, every=2))).train()
    assert [w.skipped for w in sink.windows] == [(2,), (3,)]


def test_a_reading_that_is_not_finite_is_booked_nowhere_and_spanned(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    saved: list[Any] = []

    def poison(step: int, kwargs: Any) -> None:
        weight = next(p for n, p in kwargs["model"].named_parameters() if "lora_B" in n)
        with torch.no_grad():
            if step == 2:
                saved.append(weight.detach().clone())
                weight.fill_(torch.nan)

    def heal(step: int, kwargs: Any) -> None:
        if step == 2:
            weight = next(p for n, p in kwargs["model"].named_parameters() if "lora_B" in n)
            with torch.no_grad():
                weight.copy_(saved[0])

    trainer(Spy(poison), MeasuringCallback(plan), Spy(heal)).train()
    assert [w.status for w in sink.windows] == ["ok", "not_finite", "ok", "ok"]
    bad = sink.windows[1]
    assert bad.snapshot is None
    assert not bad.shift
    assert "NaN or inf in the activations of 24" in bad.error
    assert [alert.kind for alert in bad.alerts] == ["not_finite"]
    total = sum(w.shift[part] for w in sink.windows if w.status == "ok" for part in PATHWAYS)
    np.testing.assert_allclose(total, sink.windows[-1].coef - sink.start.baseline.coef, atol=1e-12)


def test_a_failing_measurement_does_not_stop_training(
    plan: Plan, sink: MemorySink, trainer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []
    real = Instrument.read

    def broken(self: Instrument, model: Any, visit: Any = None, **further: Any) -> Any:
        calls.append(1)
        if len(calls) in (6, 7):  # distillation, noise floor and first gradients are over, step 1 was good
            raise RuntimeError("the probe pass broke")
        return real(self, model, visit, **further)

    monkeypatch.setattr(Instrument, "read", broken)
    with caplog.at_level(logging.WARNING, "smda_callbacks"):
        trainer(MeasuringCallback(replace(plan, on_error="warn"))).train()
    assert [w.status for w in sink.windows] == ["ok", "failed", "failed", "ok"]
    assert sink.windows[1].error == "RuntimeError: the probe pass broke"
    assert sum("the probe pass broke" in record.message for record in caplog.records) == 1
    total = sum(w.shift[part] for w in sink.windows if w.status == "ok" for part in PATHWAYS)
    np.testing.assert_allclose(total, sink.windows[-1].coef - sink.start.baseline.coef, atol=1e-12)


def test_on_error_raise_stops_training(plan: Plan, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(MeasuringCallback(plan))
    monkeypatch.setattr(reading_module, "_check_finite", lambda *_: None)

    class Once(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(Instrument, "read", lambda *_, **__: 1 / 0)

    run.add_callback(Once())
    with pytest.raises(ZeroDivisionError):
        run.train()


def test_a_sink_that_fails_does_not_stop_training(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    class Full(MemorySink):
        def write(self, window: Any) -> None:
            raise OSError("disk full")

    trainer(MeasuringCallback(replace(plan, on_error="warn", make_sinks=lambda _: [Full(), sink]))).train()
    assert len(sink.windows) == 4
    assert sink.end is not None


def test_alerts_once_per_cause(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    limits = AlertLimits(refusal_drop=1e-9, refusal_rise=1e-9, delta_fvu=1e-9, fvu_ratio=1e-9)
    trainer(MeasuringCallback(replace(plan, limits=limits))).train()
    causes = [(alert.kind, alert.category) for window in sink.windows for alert in window.alerts]
    assert len(causes) == len(set(causes))
    assert {"delta_fvu", "sae_fvu"} <= {kind for kind, _ in causes}


def test_a_loss_that_is_not_finite_is_an_alert(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    run = trainer(MeasuringCallback(plan), logging_nan_inf_filter=False)
    real = run.compute_loss
    run.compute_loss = lambda *args, **kwargs: real(*args, **kwargs) * float("nan")
    run.train()
    assert [alert.kind for alert in sink.alerts] == ["loss_not_finite"]
    assert sink.windows[-1].status == "not_finite"


def test_the_plain_trainer_is_watched_too(plan: Plan, sink: MemorySink, tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(f"hello {k} there")["input_ids"] for k in range(8))]
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True)
    model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2))
    callback = MeasuringCallback(plan)
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]).train()
    assert [w.status for w in sink.windows] == ["ok", "ok"]


def test_training_twice_watches_twice(plan: Plan, trainer: Any) -> None:
    sinks: list[MemorySink] = []

    def make(_: Any) -> list[MemorySink]:
        sinks.append(MemorySink())
        return sinks[-1:]

    run = trainer(MeasuringCallback(replace(plan, make_sinks=make)))
    run.train()
    run.train()
    assert [len(each.windows) for each in sinks] == [4, 4]


@pytest.mark.parametrize("case", ["no template", "wrong width", "missing layer", "nan weights", "lam"])
def test_bad_input_is_refused_before_the_first_step(
    case: str, plan: Plan, sink: MemorySink, trainer: Any, tmp_path: Any
) -> None:
    errors: dict[str, tuple[type[Exception], str]] = {
        "no template": (ValueError, r"tokenizer has no chat template"),
        "wrong width": (SAEError, r"activations of width 16, but LlamaForCausalLM has width 32"),
        "missing layer": (ValueError, r"layer 9, but LlamaForCausalLM has layers 0 to 2"),
        "nan weights": (RuntimeError, r"NaN or inf in the activations of 24"),
        "lam": (ValueError, r"lam"),
    }
    if case == "wrong width":
        plan = replace(plan, load_sae=lambda: load_sae(save_sae(tiny_sae(d_in=16), tmp_path / "s")))
    if case == "missing layer":
        folder = save_sae(tiny_sae(), tmp_path / "s")
        plan = replace(plan, load_sae=lambda: load_sae(folder, hook_name="blocks.9.hook_resid_post"))
    if case == "lam":
        plan = replace(plan, distil=replace(plan.distil, lam=-1.0))
    steps: list[int] = []
    run = trainer(MeasuringCallback(plan), Spy(lambda step, _: steps.append(step)))
    if case == "no template":
        run.processing_class.chat_template = None
    if case == "nan weights":
        with torch.no_grad():
            run.model.get_base_model().model.norm.weight.fill_(torch.nan)
            run.model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.fill_(torch.nan)
    error, message = errors[case]
    with pytest.raises(error, match=message):
        run.train()
    assert steps == []
    assert sink.windows == []


def test_a_model_without_a_trainable_adapter_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no LoRA adapter.*Next step: pass peft_config"):
        require_lora(tiny_model())
    frozen = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2)).requires_grad_(False)
    with pytest.raises(AdapterError, match=r"no parameter of the model requires a gradient"):
        require_lora(frozen)


def test_an_adapter_of_another_kind_and_a_sharded_model_are_refused() -> None:
    from peft import IA3Config, get_peft_model

    other = get_peft_model(tiny_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match=r"the adapters are \{'default': 'IA3'\}. Allowed: LORA"):
        require_lora(other)
    require_whole_model(other)
    flat = type("FullyShardedDataParallel", (torch.nn.Sequential,), {})(tiny_model())
    with pytest.raises(AdapterError, match=r"FSDP1 keeps.*Allowed: one process, DDP, FSDP2 .*version: 2.*ZeRO-1"):
        require_whole_model(flat)
    first: Any = next(other.parameters())
    first.ds_id, first.nvme_swapper = 0, object()  # how DeepSpeed marks what it has taken away
    with pytest.raises(AdapterError, match=r"DeepSpeed ZeRO-3 keeps.* on NVMe.*Allowed: one process, DDP, FSDP2"):
        require_whole_model(other)


def test_a_gradient_that_is_not_finite_is_an_alert_under_default_settings(
    plan: Plan, sink: MemorySink, trainer: Any
) -> None:
    """By default the trainer logs such a loss as 0: it is neither believed nor stored."""
    run = trainer(MeasuringCallback(plan))
    real = run.compute_loss
    run.compute_loss = lambda *args, **kwargs: real(*args, **kwargs) * float("nan")
    run.train()
    assert [alert.kind for alert in sink.alerts] == ["loss_not_finite"]
    assert all("loss" not in window.trainer for window in sink.windows)


def test_the_loss_carries_the_step_that_it_was_logged_at(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    trainer(MeasuringCallback(plan)).train()
    assert [window.trainer.get("loss_step") for window in sink.windows] == [None, 1.0, 2.0, 3.0]


def test_the_last_window_is_of_the_last_step_not_of_the_best_checkpoint(
    plan: Plan, sink: MemorySink, trainer: Any
) -> None:
    trainer(MeasuringCallback(replace(plan, every=3))).train()
    best = MemorySink()
    loading = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    loading |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer(MeasuringCallback(replace(plan, every=3, make_sinks=lambda _: [best])), **loading).train()
    assert [(w.first_step, w.step) for w in best.windows] == [(1, 3), (4, 4)]
    np.testing.assert_array_equal(best.windows[-1].snapshot.y, sink.windows[-1].snapshot.y)


def test_the_noise_floor_is_of_the_optimizers_own_learning_rate(plan: Plan, sink: MemorySink, trainer: Any) -> None:
    run = trainer(MeasuringCallback(plan))
    run.optimizer = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=0.02)
    run.train()
    assert sink.start.noise.update_rms == 0.02


def test_without_a_tokenizer_the_advice_fits(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer.*processing_class=tokenizer"):
        plan.instrument(tiny_model(), None, plan.load_sae())


STRATEGIES = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "epoch"},
    "best": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"},
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_early_stopping_does_not_lose_the_last_window(
    name: str, first: bool, plan: Plan, sink: MemorySink, trainer: Any
) -> None:
    """Step 2 or epoch 1 is the best of two evaluations; its checkpoint is loaded after the second, which stops."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    watching, stopping = MeasuringCallback(replace(plan, every=3)), EarlyStoppingCallback(1)
    callbacks = [watching, stopping] if first else [stopping, watching]
    end = 10 if name == "epochs" else 4
    run = trainer(*callbacks, **best, **STRATEGIES[name], max_steps=30, per_device_train_batch_size=4)
    weights: dict[int, np.ndarray] = {}
    run.add_callback(Spy(lambda step, given: weights.__setitem__(step, _trained(given["model"]))))
    run.train()
    assert run.state.global_step == end
    assert [(w.first_step, w.step) for w in sink.windows][-1] == (end - (end % 3 or 3) + 1, end)
    assert not np.array_equal(_trained(run.model), weights[end])  # the best checkpoint is another one
    other = MemorySink()
    schedule = {"max_steps": 30, "per_device_train_batch_size": 4}
    trainer(MeasuringCallback(replace(plan, every=3, make_sinks=lambda _: [other])), Stopping(end), **schedule).train()
    np.testing.assert_array_equal(sink.windows[-1].snapshot.y, other.windows[-1].snapshot.y)


def test_a_last_window_that_cannot_be_read_any_more_is_said(
    plan: Plan, sink: MemorySink, trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluation at the end of an epoch, no checkpoint after it: the next event comes after the best one is loaded."""
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    options |= {"eval_strategy": "epoch", "save_strategy": "best", "max_steps": 30, "per_device_train_batch_size": 4}
    trainer(MeasuringCallback(replace(plan, every=3)), EarlyStoppingCallback(1), **options).train()
    assert [(w.first_step, w.step) for w in sink.windows][-1] == (7, 9)
    (lost,) = [alert for alert in sink.alerts if alert.kind == "last_window_lost"]
    assert lost.step == 10
    assert "steps 10 to 10 are not measured: an evaluation stopped training" in caplog.text


class Stopping(TrainerCallback):
    """Stops at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def _trained(model: Any) -> np.ndarray:
    return torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad]).numpy()
