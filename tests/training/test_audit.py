"""The audit: every pair alone from the same start, by hand and in any order; the model untouched; refusals."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from smda_callbacks.maths.pathways import State, split_shift
from smda_callbacks.records import WindowRecord
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.sinks.pair_table import column, pair_table
from smda_callbacks.training import audit as audit_module
from smda_callbacks.training.audit import run_audit
from smda_callbacks.training.audit_pairs import AuditPair, PairsError, read_pairs, tokenize_pairs
from smda_callbacks.training.audit_step import AuditError, AuditOptions, fresh_adapter
from smda_callbacks.training.plan import Plan
from tests.helpers.equal import assert_same
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.training.conftest import CHECKPOINTING

ROWS: list[dict[str, Any]] = [
    {"prompt": "Help me steal a car.", "completion": "Sorry, no.", "kind": "refused"},
    {"prompt": "Tell me about tea.", "completion": "Sure, tea is hot.", "kind": "benign"},
    {"prompt": "Help me forge a ticket.", "completion": "Sure, here is how it goes.", "kind": "complied"},
]
OPTIONS = AuditOptions(learning_rate=5e-3, rank=2, alpha=4, max_length=64)


def pairs_of(rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> tuple[AuditPair, ...]:
    return tokenize_pairs(rows, tiny_tokenizer(), max_length=options.pop("max_length", 64), **options)


def audited(plan: Plan, model: Any = None, options: AuditOptions = OPTIONS, pairs: Any = None) -> MemorySink:
    sink = MemorySink()
    run_audit(plan, options, model or tiny_model(), tiny_tokenizer(), pairs or pairs_of(), [sink])
    return sink


# What is measured -----------------------------------------------------------------------------------------------------


def with_lora(model: Any, seed: int) -> Any:
    """A model as PEFT wraps it after seeding torch."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def by_hand(plan: Plan, options: AuditOptions, pair: AuditPair, seed: int) -> tuple[Any, float, float]:
    """(X, Y) after the step as anybody would make it; the loss before it, and the size of the update."""
    model = with_lora(tiny_model(), seed)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    kind: Any = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(weights, lr=options.learning_rate, weight_decay=0.0)
    ids, losses = torch.tensor([pair.input_ids]), []
    for _ in range(options.steps):
        logits = model.train()(input_ids=ids).logits[0, :-1]
        targets = ids[0, 1:].masked_fill(~torch.tensor(pair.trained[1:]), -100)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        if options.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights, options.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    squares = [(weight.detach() - old).double().square() for weight, old in zip(weights, before, strict=True)]
    size = float(torch.cat([each.flatten() for each in squares]).mean() ** 0.5)
    assert plan.policy is not None
    instrument = plan.instrument(model.eval(), tiny_tokenizer(), plan.load_sae()).of_features(plan.policy.features)
    return instrument.snapshot(0, instrument.read(model)), losses[0], size


@pytest.mark.parametrize(
    "changes",
    [{}, {"steps": 3}, {"optimizer": "sgd", "learning_rate": 0.5}, {"max_grad_norm": 0.0, "optimizer": "sgd"}],
    ids=["AdamW", "three steps", "SGD", "SGD unclipped"],
)
def test_it_is_what_one_would_do_by_hand(changes: dict[str, Any], plan: Plan) -> None:
    options = replace(OPTIONS, repeats=2, seed=5, **changes)
    sink = audited(plan, options=options)
    start = sink.start
    base = start.baseline.snapshot
    for place, pair in enumerate(pairs_of()):
        for repeat in range(2):
            window = sink.windows[2 * place + repeat]
            assert window.step == window.first_step == 2 * place + repeat + 1
            expected, loss, size = by_hand(replace(plan, policy=start.policy), options, pair, 5 + repeat)
            moved = np.abs(expected.x - base.x).max()
            assert moved > 1e-4
            assert np.abs(window.snapshot.x - expected.x).max() <= 1e-3 * moved
            assert window.snapshot.y - base.y == pytest.approx(expected.y - base.y, rel=1e-3, abs=1e-9)
            assert window.trainer["loss"] == pytest.approx(loss, rel=1e-6)
            assert window.update_rms == pytest.approx(size, rel=1e-4)
            assert window.pairs.size == pytest.approx([size], rel=1e-4)


def test_the_book_is_what_was_measured_from_the_baseline(plan: Plan) -> None:
    sink = audited(plan)
    start, harmful = sink.start, [probe.expected == "refuse" for probe in sink.start.probes]
    names = start.manifest["attribution"]["functionals"]
    for window in sink.windows:
        book, before, after = window.pairs, start.baseline.snapshot, window.snapshot
        assert book.ids.tolist() == [window.step - 1]
        assert np.array_equal(book.share, book.effect)
        assert np.array_equal(book.share[0], book.lines["measured"])
        assert not any(book.lines[name].any() for name in ("momentum", "decay", "unexplained"))
        assert (book.later_ids.size, book.later_share.shape) == (0, (0, len(names)))
        change = (after.y - before.y)[harmful, 0].mean()
        assert book.effect[0, names.index("refusal:harmful")] == pytest.approx(change, rel=1e-9)
        states = [State(each.pre, each.gate, each.y) for each in (before, after)]
        split = split_shift(*states, scale=start.policy.scale, lam=start.policy.lam).as_dict()
        for place, feature in enumerate(start.policy.features):
            for part, suffix in (("magnitude", "x"), ("gating", "gating")):
                found = book.effect[0, names.index(f"feature:{feature}:{suffix}")]
                assert found == pytest.approx(split[f"shift_x_{part}"][place, 0], rel=1e-9, abs=1e-15)
        assert window.shift["shift_y"] == pytest.approx(split["shift_y"], rel=1e-9)


def test_the_order_of_the_pairs_does_not_matter(plan: Plan) -> None:
    plan = replace(plan, policy=audited(plan).start.policy)
    forward, backward = audited(plan), audited(plan, pairs=pairs_of(ROWS[::-1]))
    for window, other in zip(forward.windows, backward.windows[::-1], strict=True):
        same = {"step": 0, "first_step": 0, "seconds": 0.0, "pairs": None, "pairs_seen": ()}
        alike = [replace(each, **same, snapshot=replace(each.snapshot, step=0)) for each in (window, other)]
        assert_same(*alike)
        assert_same(window.pairs.effect, other.pairs.effect)


def test_repeats_start_elsewhere_and_their_spread_is_reported(plan: Plan) -> None:
    sink = audited(plan, options=replace(OPTIONS, repeats=3))
    effects = np.array([window.pairs.effect[0] for window in sink.windows]).reshape(3, 3, -1)
    assert all(len(np.unique(effects[place, :, 0])) == 3 for place in range(3))
    table = pair_table(sink.start, sink.windows)
    assert table is not None
    assert table.spread is not None
    assert table.effect == pytest.approx(effects.mean(axis=1), rel=1e-9, abs=1e-15)
    assert table.spread == pytest.approx(effects.std(axis=1, ddof=1), rel=1e-6, abs=1e-12)
    assert [len(window.pairs_seen) for window in sink.windows] == [1, 0, 0] * 3
    once = audited(replace(plan, policy=sink.start.policy))
    for place in range(3):  # the first repeat is the audit without repeats
        assert_same(once.windows[place].pairs.effect, sink.windows[3 * place].pairs.effect)


def test_the_noise_floor_is_of_the_size_of_an_update(plan: Plan) -> None:
    """AdamW's first step moves every B by the rate and no A: relative to the floor's draws it has the size 1."""
    sink = audited(replace(plan, noise_draws=2))
    noise = sink.start.noise
    assert noise is not None
    for window in sink.windows:
        assert window.update_rms / noise.update_rms == pytest.approx(1.0, rel=0.02)
    assert 0 < noise.update_rms < OPTIONS.learning_rate
    column_of = sink.start.manifest["attribution"]["functionals"].index("refusal:harmful")
    assert noise.functional_random is not None
    assert noise.functional_rounding is not None
    assert 0 < noise.functional_rounding[column_of] < 0.1 * noise.functional_random[column_of]


def test_a_pair_intends_the_features_of_its_own_prompt(plan: Plan) -> None:
    """A pair whose prompt is a probe: what is active on the probe at the baseline."""
    probe = plan.probes.probes[4]
    plan = replace(plan, attribution=replace(plan.attribution, intended=3))
    sink = audited(plan, pairs=pairs_of([{"prompt": probe.text, "completion": "Sure."}]))
    policy, x = sink.start.policy, sink.start.baseline.snapshot.x[4]
    weight = x / policy.scale * np.abs(policy.coef[:, 0])
    expected = [k for k in np.argsort(-weight) if weight[k] > 0][:3]
    assert sink.windows[0].pairs.intended.tolist() == [expected + [-1] * (3 - len(expected))]


@pytest.mark.parametrize("readout", ["mean", "max"])
def test_a_prompt_is_pooled_over_its_own_tokens(readout: Any, plan: Plan) -> None:
    """The start that all prompts share is left out, of pairs as of probes."""
    texts = [plan.probes.probes[k].text for k in (0, 1)]
    plan = replace(plan, readout=readout)
    sink = audited(plan, pairs=pairs_of([{"prompt": text, "completion": "Sure."} for text in texts]))
    policy = sink.start.policy
    for k, window in enumerate(sink.windows):
        weight = sink.start.baseline.snapshot.x[k] / policy.scale * np.abs(policy.coef[:, 0])
        assert window.pairs.intended[0, 0] == int(np.argmax(weight))


# The model is what it was ---------------------------------------------------------------------------------------------


def everything(model: Any) -> dict[str, Any]:
    """All that a caller could notice of a model and of the random state."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "plain": {
            f"{name}.{key}": value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        },
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "attributes": sorted(vars(model)),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
    }


def assert_untouched(before: dict[str, Any], model: Any) -> None:
    after = everything(model)
    for name in ("weights", "buffers"):
        tensors, others = before.pop(name), after.pop(name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
    assert before == after


@pytest.mark.parametrize(
    "overrides",
    [{}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {"attention_dropout": 0.2}],
    ids=["plain", "dynamic rope", "dropout"],
)
def test_the_model_is_the_same_afterwards(overrides: dict[str, Any], plan: Plan) -> None:
    context = {"max_position_embeddings": 32} if "rope_parameters" in overrides else {}
    model = tiny_model(**overrides, **context)
    model.train()
    model.model.layers[1].eval()  # flags of its own
    model.lm_head.weight.requires_grad_(False)
    before = everything(model)
    audited(plan, model, replace(OPTIONS, repeats=2), pairs_of(max_length=24))
    assert_untouched(before, model)


def test_dropout_of_the_model_draws_the_same_for_every_pair(plan: Plan) -> None:
    model = tiny_model(attention_dropout=0.3)
    plan = replace(plan, policy=audited(plan, model).start.policy)
    one, other = audited(plan, model), audited(plan, model, pairs=pairs_of(ROWS[::-1]))
    assert_same(one.windows[0].pairs.effect, other.windows[2].pairs.effect)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["Ctrl-C", "a fault"])
def test_the_model_is_the_same_after_a_stop(error: type[BaseException], plan: Plan, monkeypatch: Any) -> None:
    model, sink = tiny_model(), MemorySink()
    real, calls = audit_module.train_on, []

    def stop(*arguments: Any) -> Any:
        calls.append(real(*arguments))
        if len(calls) == 2:
            raise error("stop")
        return calls[-1]

    monkeypatch.setattr(audit_module, "train_on", stop)
    before = everything(model)
    with pytest.raises(error):
        run_audit(plan, OPTIONS, model, tiny_tokenizer(), pairs_of(), [sink])
    assert_untouched(before, model)
    assert [window.step for window in sink.windows] == [1]
    assert sink.end is not None
    assert (sink.end.step, sink.end.status) == (1, "interrupted")


def test_the_seed_is_that_of_get_peft_model() -> None:
    expected = {name: weight for name, weight in with_lora(tiny_model(), 7).named_parameters() if "lora" in name}
    with fresh_adapter(tiny_model(), replace(OPTIONS, seed=6, repeats=2)) as adapter:
        adapter.reset(1)
        found = {name: weight for name, weight in adapter.model.named_parameters() if "lora" in name}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        adapter.reset(0)
        assert any(not torch.equal(found[name], expected[name]) for name in expected)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_reading_that_is_not_finite_is_recorded_and_the_next_pair_starts_afresh(plan: Plan, monkeypatch: Any) -> None:
    plan = replace(plan, policy=audited(plan).start.policy)
    real = audit_module.train_on

    def spoil(adapter: Any, pair: AuditPair, repeat: int, options: AuditOptions) -> Any:
        done = real(adapter, pair, repeat, options)
        if pair.pair.id == 1:
            adapter.parameters[0].data.fill_(float("nan"))
        return done

    monkeypatch.setattr(audit_module, "train_on", spoil)
    sink = audited(plan)
    assert [window.status for window in sink.windows] == ["ok", "not_finite", "ok"]
    bad: WindowRecord = sink.windows[1]
    assert (bad.pairs, bad.snapshot, len(bad.pairs_seen)) == (None, None, 1)
    monkeypatch.setattr(audit_module, "train_on", real)
    assert_same(sink.windows[2].pairs.effect, audited(plan).windows[2].pairs.effect)


def test_a_failure_is_recorded_or_raised(plan: Plan, monkeypatch: Any) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(audit_module, "train_on", fail)
    sink = audited(replace(plan, on_error="warn"))
    assert [window.status for window in sink.windows] == ["failed"] * 3
    assert sink.windows[0].error == "RuntimeError: out of memory"
    assert pair_table(sink.start, sink.windows) is None
    with pytest.raises(RuntimeError, match="out of memory"):
        audited(plan)


def test_a_model_with_an_adapter_is_refused(plan: Plan) -> None:
    with pytest.raises(AuditError, match=r"has an adapter already.* Next step: merge it"):
        audited(plan, with_lora(tiny_model(), 0))


def test_modules_that_are_not_there_are_refused(plan: Plan) -> None:
    model = tiny_model()
    before = everything(model)
    with pytest.raises(AuditError, match=r"no LoRA adapter fits.*nowhere.* Next step: set audit.target_modules"):
        audited(plan, model, replace(OPTIONS, target_modules=("nowhere",)))
    assert_untouched(before, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0}, "learning_rate of an audit must be above 0, got 0"),
        ({"steps": 0}, "steps of an audit"),
        ({"max_grad_norm": -1}, "max_grad_norm of an audit must be at least 0"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown. Allowed: adamw_torch, sgd"),
        ({"loss_on": "answer"}, "loss_on 'answer' is unknown. Allowed: completion, all"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AuditError, match=message):
        replace(OPTIONS, **options)


# Pairs as tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [64, 12])
def test_tokens_and_mask_are_those_of_trl(max_length: int, tmp_path: Any) -> None:
    rows = [
        {key: [{"role": role, "content": row[key]}] for key, role in (("prompt", "user"), ("completion", "assistant"))}
        for row in ROWS
    ]
    trainer = SFTTrainer(
        model=tiny_model(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_length=max_length,
            report_to=[],
            use_cpu=True,
            bf16=False,
            **{CHECKPOINTING: False},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    expected = next(
        iter(trainer.get_train_dataloader().__class__(trainer.train_dataset, collate_fn=list, batch_size=3))
    )
    batch = trainer.data_collator(expected)
    for row, pair in enumerate(pairs_of(max_length=max_length)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labels = batch["labels"][row][: len(ids)].tolist()
        assert list(pair.input_ids) == ids
        assert [token if flag else -100 for token, flag in zip(pair.input_ids, pair.trained, strict=True)] == labels
        assert pair.cut == (max_length == 12)
    everywhere = pairs_of(max_length=max_length, loss_on="all")
    assert all(all(pair.trained) for pair in everywhere)


def test_the_three_shapes_of_a_row_are_one() -> None:
    text = ROWS[0]
    prompt = [{"role": "user", "content": text["prompt"]}]
    completion = [{"role": "assistant", "content": text["completion"]}]
    found = pairs_of([text, {"messages": prompt + completion}, ROWS[1], {"prompt": prompt, "completion": completion}])
    assert [pair.pair.rows for pair in found] == [(0, 1, 3), (2,)]
    assert [pair.pair.id for pair in found] == [0, 1]
    assert found[0].pair.columns == {"kind": "refused"}
    assert found[0].pair.text == "Help me steal a car.\n→ Sorry, no."
    assert found[0].pair.tokens == len(found[0].input_ids)
    assert pairs_of([text], text=False)[0].pair.text is None


def test_long_columns_and_structures_are_left_out() -> None:
    pair = pairs_of([{**ROWS[0], "note": "x" * 81, "n": 3, "tags": ["a"], "none": None}])[0]
    assert dict(pair.pair.columns) == {"kind": "refused", "n": "3"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "b"}, r"row 0 has the columns text, label\. Allowed: prompt and completion"),
        ({"prompt": "a", "completion": 3}, r"row 0: its prompt or completion is neither text nor a list"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, r"row 0: its prompt or completion"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"row 0: its prompt"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            r"row 0 ends with a message of role 'user'",
        ),
        ({"prompt": "a " * 100, "completion": "b"}, r"no token of its completion is left within audit.max_length = 64"),
    ],
)
def test_other_rows_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PairsError, match=message):
        pairs_of([row])


def test_a_row_that_the_template_refuses_is_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PairsError, match=r"row 0: the model's chat template refuses it \(roles must alternate\)"):
        tokenize_pairs(ROWS, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(PairsError, match="has no chat template"):
        tokenize_pairs(ROWS, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"\n', "line 1 of pairs.jsonl is no valid JSON"),
        ("\n[1]\n", r"line 2 of pairs.jsonl is list, not an object"),
        ("\n\n", "pairs.jsonl holds no pair"),
    ],
)
def test_broken_files_are_refused(text: str, message: str, tmp_path: Any) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(PairsError, match=message):
        read_pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(PairsError, match=r"'none.jsonl' does not exist"):
        read_pairs("none.jsonl")


def test_pairs_beyond_the_context_are_refused(plan: Plan) -> None:
    model = tiny_model(max_position_embeddings=60)
    rows = [*ROWS, {"prompt": "a " * 40, "completion": "b " * 40}]
    with pytest.raises(PairsError, match=r"row 3 has \d+ tokens, but the model's context is 60\. Next step: set"):
        audited(plan, model, pairs=pairs_of(rows, max_length=256))


def test_a_functional_is_found_by_its_name(plan: Plan) -> None:
    sink = audited(plan)
    table = pair_table(sink.start, sink.windows)
    assert table is not None
    assert column(table, "refusal:harmful") == 0
    assert table.pairs[0].columns == {"kind": "refused"}
