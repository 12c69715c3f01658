"""Influence on the end of a run, from its trajectory, against trainings in which a pair weighs more or less."""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from smda_callbacks.observe.example_losses import example_losses
from smda_callbacks.observe.lora import AttributionError, lora_sites
from smda_callbacks.observe.sequences import split_batch
from smda_callbacks.sinks import files
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.sinks.rescored import PARTIAL, Rescored, read_rescored, result_file
from smda_callbacks.sinks.store import StoreSink
from smda_callbacks.sinks.store_reader import RunStore
from smda_callbacks.sinks.trajectory import (
    FOLDER,
    META,
    PAIRS,
    TrajectoryError,
    TrajectoryFolder,
    check_room,
    state_file,
    step_file,
)
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.rebuild import load_base
from smda_callbacks.training.replay import Replay, as_trained
from smda_callbacks.training.replay_check import NotTheSameRunError, chosen, verify
from smda_callbacks.training.rescore import RescoreOptions, rescore
from smda_callbacks.training.rescore_partial import identity_of
from smda_callbacks.training.rescore_targets import TargetError, default_targets
from smda_callbacks.training.trajectory_check import check_recordable
from smda_callbacks.training.trajectory_options import TrajectoryOptions
from smda_callbacks.training.trajectory_read import read_state, read_step
from tests.helpers import other_trainers, stopping
from tests.helpers.pair_training import CHECKPOINTING
from tests.helpers.rescoring import STEPS, Recorded, base_model, make_trainer, record, replace, sae_in, trained
from tests.helpers.tiny import tiny_model

# Trained in every way that matters at once: dropout, accumulation, clipping, decay, a schedule. A large eps keeps the
# training smooth enough for differences in float32.
OPTIONS: dict[str, Any] = {
    "gradient_accumulation_steps": 2, "lora": {"lora_dropout": 0.1}, "max_grad_norm": 1.0, "adam_epsilon": 1e-2,
    "learning_rate": 3e-2, "num_train_epochs": 3,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    return record(folder, sae_in(folder), **OPTIONS)


@pytest.fixture(scope="module")
def targets(recorded: Recorded) -> tuple[str, ...]:
    feature = int(recorded.start.policy.features[0])
    names = [f"feature:{feature}{end}" for end in ("", ":x", ":y", ":gating")]
    return ("refusal:harmful:logit", "refusal:benign:logit", *names)


@pytest.fixture(scope="module")
def result(recorded: Recorded, targets: tuple[str, ...]) -> Rescored:
    return rescored(recorded, targets, verify="all")


@pytest.fixture
def copy(recorded: Recorded, tmp_path: Path) -> Recorded:
    """The recorded run, to be changed."""
    shutil.copytree(recorded.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rescore", ignore_errors=True)
    return replace(recorded, run=tmp_path / "run")


def rescored(
    recorded: Recorded, targets: tuple[str, ...] = (), tick: Any = lambda *_: None, **options: Any
) -> Rescored:
    given = RescoreOptions(targets=targets, **options)
    return rescore(recorded.run, recorded.plan, recorded.start, given, model=base_model(), tick=tick)


def keys(recorded: Recorded) -> dict[int, bytes]:
    folder = TrajectoryFolder.open(recorded.run)
    batches = [batch for number in folder.steps for batch in read_step(folder.path, number).batches]
    return {pair: each.key for b in batches for pair, each in zip(b.pairs, b.examples, strict=True)}


def slopes_of_training(recorded: Recorded, targets: tuple[str, ...], pairs: list[int], size: float) -> np.ndarray:
    """Differences of whole trainings of the trainer, ``[pair, target]``."""
    key = keys(recorded)
    ends = [recorded.weights_with(key[pair], more) for pair in pairs for more in (size, -size)]
    values = recorded.values(ends, targets)
    return (values[::2] - values[1::2]) / (2 * size)


def assert_alike(found: np.ndarray, wanted: np.ndarray, away: float) -> None:
    """``[pair, target]``: no further apart than ``away`` of the target's largest."""
    assert (np.abs(found - wanted).max(axis=0) <= away * np.abs(wanted).max(axis=0)).all()


def test_recording_changes_nothing(recorded: Recorded) -> None:
    plain = recorded.weights_with(None, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded.weights, strict=True))


def test_the_run_is_gone_through_again_bit_by_bit(result: Rescored) -> None:
    assert result.verified.exact
    assert result.verified.steps == tuple(range(1, STEPS + 1))
    assert result.verified.worst == 0.0
    assert 0 < result.verified.gradient_error < 1e-5  # dropout's masks were the same


def test_influence_is_the_slope_of_the_trainers_own_training(
    recorded: Recorded, result: Rescored, targets: tuple[str, ...]
) -> None:
    chosen = [0, 3]
    wanted = slopes_of_training(recorded, targets, result.ids[chosen].tolist(), 0.02)
    assert_alike(result.influence[chosen], wanted, 0.05)


def test_what_is_written(recorded: Recorded, result: Rescored, targets: tuple[str, ...]) -> None:
    back = read_rescored(recorded.run)
    assert back.targets == targets
    assert np.array_equal(back.influence, result.influence)
    assert not (recorded.run / "rescore" / PARTIAL).exists()
    np.testing.assert_array_equal(back.measured, recorded.values([recorded.weights], targets)[0])
    assert back.exposures.sum() == STEPS * 4
    described = TrajectoryFolder.open(recorded.run).pairs()
    assert [described[pair].rows for pair in back.ids.tolist()] == [(pair,) for pair in back.ids.tolist()]
    # A coefficient's change is the sum of its parts, and so is the influence on it.
    np.testing.assert_allclose(back.influence[:, 2], back.influence[:, 3:].sum(axis=1), rtol=1e-3, atol=1e-9)


def test_states_in_between_are_computed_again(copy: Recorded, result: Rescored, targets: tuple[str, ...]) -> None:
    for step in (1, 2, 4, 5):
        state_file(copy.run / FOLDER, step).unlink()
    again = rescored(copy, targets)
    assert again.verified.exact
    assert again.verified.steps == tuple(range(1, STEPS + 1))
    assert np.array_equal(again.influence, result.influence)


# All targets at once, and a few at a time.
@pytest.mark.parametrize("memory_gib", [4.0, pytest.param(3e-5, marks=pytest.mark.slow)])
def test_stopped_and_gone_on_with_is_never_stopped(
    copy: Recorded, result: Rescored, targets: tuple[str, ...], memory_gib: float
) -> None:
    options: dict[str, Any] = {"save_every": 2, "memory_gib": memory_gib, "at_once": 4 if memory_gib == 4.0 else 2}
    if memory_gib == 4.0:
        whole = result
    else:
        whole = rescored(
            replace(copy, run=Path(shutil.copytree(copy.run, copy.run.parent / "whole"))), targets, **options
        )
        np.testing.assert_allclose(whole.influence, result.influence, rtol=1e-3, atol=1e-9)
    done: list[int] = []

    def stop(what: str, now: int, total: int) -> None:
        if what == "rescore":
            done.append(now)
            if len(done) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rescored(copy, targets, stop, **options)
    assert (copy.run / "rescore" / PARTIAL).exists()
    with pytest.raises(TrajectoryError, match="has not been rescored"):
        read_rescored(copy.run)
    later: list[int] = []
    found = rescored(copy, targets, lambda what, now, _: later.append(now) if what == "rescore" else None, **options)
    assert later[0] == 5  # after four steps, which were saved
    assert np.array_equal(found.influence, whole.influence)


def test_another_run_is_refused(copy: Recorded) -> None:
    path = state_file(copy.run / FOLDER, 4)
    tensors = load_file(path)
    tensors["weight/0"][0, 0] += 1e-4
    save_file(tensors, path)
    with pytest.raises(NotTheSameRunError, match=r"after step 4 the weights are .* away"):
        rescored(copy, verify="all")
    with as_trained(TrajectoryFolder.open(copy.run)):
        replay = Replay(TrajectoryFolder.open(copy.run), model=base_model())
        near = verify(replay, "all", tolerance=0.5)
        replay.close()
    assert not near.exact
    assert near.worst_step in (4, 5)
    assert 0 < near.worst < 0.5


def test_another_loss_is_refused(copy: Recorded) -> None:
    folder = TrajectoryFolder.open(copy.run)
    with as_trained(folder):
        replay = Replay(folder, model=base_model())
        plain = replay.losses
        replay.losses = lambda share: plain(share) * 1.01  # type: ignore[method-assign]
        with pytest.raises(NotTheSameRunError, match="trained with another loss"):
            verify(replay)
        replay.close()


def test_what_is_not_there_is_named(copy: Recorded, recorded: Recorded) -> None:
    with pytest.raises(TargetError, match="no target 'refusal:nobody'"):
        rescored(recorded, ("refusal:nobody",))
    with pytest.raises(TargetError, match="does not hold feature 99999"):
        rescored(recorded, ("feature:99999",))
    other = base_model()
    other.model.embed_tokens.weight.data += 1.0
    with pytest.raises(TrajectoryError, match="not the one that was trained"):
        rescore(copy.run, copy.plan, copy.start, model=other)
    with pytest.raises(TrajectoryError, match="cannot be loaded from 'nowhere'"):
        load_base(TrajectoryFolder.open(copy.run).meta, "nowhere", "cpu")
    step_file(copy.run / FOLDER, 3).unlink()
    with pytest.raises(TrajectoryError, match=r"step-000000003.safetensors \(1 in all\) is missing"):
        TrajectoryFolder.open(copy.run)
    shutil.rmtree(copy.run / FOLDER)
    with pytest.raises(TrajectoryError, match=r"trajectory\.keep: true"):
        TrajectoryFolder.open(copy.run)


def test_default_targets_are_the_sides_and_the_largest_coefficients(recorded: Recorded) -> None:
    policy = recorded.start.policy
    trainer = make_trainer(recorded.folder / "read", **recorded.options)
    instrument = recorded.plan.instrument(trainer.model, trainer.processing_class, recorded.plan.load_sae())
    largest = sorted(policy.features[np.argsort(-np.abs(policy.coef[:, 0]))[:3]].tolist())
    features = [f"feature:{feature}:{end}" for feature in largest for end in ("x", "y")]
    found = default_targets(instrument.of_features(policy.features), policy)
    assert sorted(found) == sorted(["refusal:harmful", "refusal:harmless", *features])


def test_which_stretches_are_checked() -> None:
    assert chosen(tuple(range(11)), "some") == [(0, 1), (2, 3), (4, 5), (7, 8), (9, 10)]
    assert chosen((0, 3, 6), "some") == [(0, 3), (3, 6)]
    assert len(chosen(tuple(range(11)), "all")) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": "dft"}, "the loss is dft"),
        pytest.param({"neftune_noise_alpha": 5.0}, "NEFTune draws noise", marks=pytest.mark.slow),
        pytest.param({"optim": "adafactor"}, "Adafactor", marks=pytest.mark.slow),
        ({"lora": {"use_dora": True}}, "DoRA"),
    ],
)
def test_refused_before_training(recorded: Recorded, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    trainer = make_trainer(tmp_path, MeasuringCallback(_stored(recorded, tmp_path)), **options)
    with pytest.raises(AttributionError, match=f"{said}.*trajectory.keep: false"):
        trainer.train()
    assert not (tmp_path / "run" / FOLDER).exists()


def test_refused_without_room_or_store(recorded: Recorded, tmp_path: Path) -> None:
    keep = TrajectoryOptions(keep=True, max_gib=1e-4)
    trainer = make_trainer(tmp_path, MeasuringCallback(replace(_stored(recorded, tmp_path), trajectory=keep)))
    with pytest.raises(TrajectoryError, match=r"more than the 0\.0001 GiB of trajectory\.max_gib"):
        trainer.train()
    with pytest.raises(TrajectoryError, match="what the disk has"):
        check_room(tmp_path, 2**60, 2**40)
    nowhere = replace(recorded.plan, make_sinks=lambda _: [MemorySink()])
    with pytest.raises(AttributionError, match="needs a run store"):
        make_trainer(tmp_path, MeasuringCallback(nowhere)).train()


class _Full(TrainerCallback):
    """The disk is full from step 3 on."""

    def __init__(self, watched: MeasuringCallback) -> None:
        self.watched = watched

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        recorder = self.watched.monitor.recording.recorder if self.watched.monitor else None
        if state.global_step == 2 and recorder is not None:
            recorder.index = None  # type: ignore[assignment]


def test_a_recording_that_fails_costs_the_recording_only(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = replace(_stored(recorded, tmp_path), on_error="warn")
    watched = MeasuringCallback(plan)
    trainer = make_trainer(tmp_path, watched, _Full(watched), **OPTIONS)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trained(trainer), recorded.weights, strict=True))
    folder = TrajectoryFolder.open(tmp_path / "run")
    assert (folder.last, folder.steps) == (2, (1, 2))
    assert "step 3 was not seen whole" in (folder.stopped or "")
    assert any("recording the trajectory stopped after step 2" in each.message for each in caplog.records)


def test_a_full_disk_costs_the_recording_only(
    recorded: Recorded, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write_atomic

    def full(path: Path, data: bytes) -> None:
        if path.parent.name == FOLDER and (path.name > step_file(path.parent, 2).name or path.name == "stopped.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files, "write_atomic", full)
    plan = replace(_stored(recorded, tmp_path), on_error="warn")
    trainer = make_trainer(tmp_path, MeasuringCallback(plan), max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert TrajectoryFolder.open(tmp_path / "run").last == 2
    assert any("could not be noted" in each.message for each in caplog.records)


class _Best(TrainerCallback):
    """Puts other weights in place when training ends, as the trainer does that loads its best checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = [site.weight.detach().clone() for site in lora_sites(kwargs["model"])]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for each in kwargs["model"].parameters():
                if each.requires_grad:
                    each.zero_()


class _StopAt(TrainerCallback):
    """Stops the training after a step has ended, as an evaluation does."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_the_last_state_is_that_of_the_last_step(tmp_path: Path) -> None:
    best = _Best()
    made = record(tmp_path, sae_in(tmp_path), best, _StopAt(), keep={"every": 4}, logging_steps=2)
    assert TrajectoryFolder.open(made.run).states == (0, 2)
    state = read_state(made.run / FOLDER, 2)
    assert all(torch.equal(a, b) for a, b in zip(state.weights, best.last, strict=True))
    assert not any(each.any() for each in made.weights)


def test_an_adapter_of_another_name_is_made_again(tmp_path: Path) -> None:
    made = record(tmp_path, sae_in(tmp_path), adapter="refusal", max_steps=1)
    folder = TrajectoryFolder.open(made.run)
    with as_trained(folder):
        replay = Replay(folder, model=base_model())
        assert verify(replay).exact
        replay.close()


def _own_optimizer(trainer: Any) -> None:
    trainer.optimizer = torch.optim.AdamW([each for each in trainer.model.parameters() if each.requires_grad])


def _other_attention(trainer: Any) -> None:
    trainer.model.config._attn_implementation = "flash_attention_2"


def _quantise(trainer: Any) -> None:
    layer = trainer.model.base_model.model.model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def _ask_router(trainer: Any) -> None:
    trainer.aux_loss_enabled = False  # the plain trainer has no such thing
    trainer.model.config.output_router_logits, trainer.model.config.router_aux_loss_coef = True, 0.01


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", _own_optimizer, r"the optimizer \(AdamW, groups of \[12\] weights\) is not the one"),
        ("llama", _other_attention, "attention takes no masks"),
        ("llama", _quantise, "quantised"),
        ("llama", _ask_router, "router_aux_loss_coef"),
        ("mixtral", lambda trainer: None, "router_aux_loss_coef"),
    ],
)
def test_what_could_not_be_rescored_is_not_recorded(tmp_path: Path, family: str, change: Any, said: str) -> None:
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "mixtral" else {}
    lora = {"target_modules": ["q_proj", "v_proj", "o_proj"]}
    trainer = make_trainer(tmp_path, model=tiny_model(family, num_hidden_layers=2, **sizes), lora=lora)
    keep = TrajectoryOptions(keep=True)
    change(trainer)
    trainer.create_optimizer()
    with pytest.raises(AttributionError, match=f"{said}.*trajectory.keep: false"):
        check_recordable(keep, tmp_path, trainer, trainer.model, trainer.optimizer, steps=2)


def test_a_stream_that_goes_on_keeps_its_pairs_apart(recorded: Recorded, tmp_path: Path) -> None:
    """A number is one pair's, before the checkpoint and after; and a result for the earlier end is not the run's."""
    plan = stopping.make_plan(
        sae_in(tmp_path), attribution=AttributionOptions(engine="off"), trajectory=TrajectoryOptions(keep=True),
        noise_draws=0, every=100, probes=recorded.plan.probes, distil=recorded.plan.distil,
    )  # fmt: skip
    run = tmp_path / "out" / "smda"
    for stop, start in ((3, None), (4, 2)):
        trainer = stopping.make_trainer(tmp_path / "out", MeasuringCallback(plan), stopping.Stop(stop))
        trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
        with pytest.raises(stopping.Stopped):
            trainer.train(resume_from_checkpoint=start and str(tmp_path / "out" / f"checkpoint-{start}"))
        if start is None:
            result_file(run).parent.mkdir()
            for name in (result_file(run).name, PARTIAL):
                (result_file(run).parent / name).touch()
    folder = TrajectoryFolder.open(run)
    seen = [(pair, each.key) for n in folder.steps for b in read_step(folder.path, n).batches
            for pair, each in zip(b.pairs, b.examples, strict=True)]  # fmt: skip
    assert len({pair for pair, _ in seen}) == len(set(seen)) == 8
    assert sorted(row["id"] for row in files.read_rows(folder.path / PAIRS)) == list(range(8))
    assert [each.name for each in result_file(run).parent.iterdir()] == [f"superseded-1-{result_file(run).name}"]


def test_what_was_found_for_another_end_is_not_gone_on_with(copy: Recorded) -> None:
    folder = TrajectoryFolder.open(copy.run)
    before = identity_of(folder, "same")
    assert identity_of(folder, "same") == before
    path = state_file(folder.path, folder.last)
    tensors = load_file(path)
    tensors["weight/0"][0, 0] += 1e-4
    save_file(tensors, path)
    assert identity_of(folder, "same") != before


def test_the_check_says_how_many_steps_it_takes(copy: Recorded) -> None:
    told: list[tuple[int, int]] = []

    def tick(what: str, now: int, total: int) -> None:
        if what == "rescore":
            raise KeyboardInterrupt
        told.append((now, total))

    with pytest.raises(KeyboardInterrupt):
        rescored(copy, ("refusal:harmful:logit",), tick)
    assert told == [(k, 5) for k in range(1, 6)]  # of six: the first, the last, and three in between


@pytest.mark.parametrize("own", [True, False])
def test_a_model_that_was_lent_is_given_back(recorded: Recorded, own: bool) -> None:
    model = base_model()
    model.lm_head.train()
    if not own:
        model.lm_head.weight.data += 1.0
    folder = TrajectoryFolder.open(recorded.run)
    before = _looks(model)
    with as_trained(folder):
        if own:
            replay = Replay(folder, model=model)
            replay.model.train()
            assert _looks(model) != before
            replay.close()
        else:
            with pytest.raises(TrajectoryError, match="not the one that was trained"):
                Replay(folder, model=model)
    assert _looks(model) == before


def test_random_state_comes_back(recorded: Recorded) -> None:
    plain, arrays, tensors = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    folder = TrajectoryFolder.open(recorded.run)
    with as_trained(folder):
        Replay(folder, model=base_model()).close()
        random.random(), np.random.rand()
    assert random.getstate() == plain
    assert np.array_equal(np.random.get_state()[1], arrays)
    assert torch.equal(torch.get_rng_state(), tensors)


def test_on_a_cpu_the_trainer_is_told_so(copy: Recorded) -> None:
    path = copy.run / FOLDER / META
    meta = files.read_json(path)
    files.write_json(path, {**meta, "args": {**meta["args"], "use_cpu": False}})
    replay = Replay(TrajectoryFolder.open(copy.run), model=base_model(), device="cpu")
    assert replay.trainer.args.use_cpu
    replay.close()


def test_losses_of_packed_examples_are_those_of_padded_ones() -> None:
    model = base_model().eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [11, 12, 13, 14, 15, 16, 17]])
    mask = (ids > 0).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    padded = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    packed = {
        "input_ids": torch.cat([ids[0, :5], ids[1]])[None],
        "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
        "labels": torch.cat([labels[0, :5], labels[1]])[None],
    }
    first, second = (example_losses(model, each, split_batch(each), 3.0) for each in (padded, packed))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    whole = model(**padded).loss * (labels[:, 1:] != -100).sum() / 3.0
    torch.testing.assert_close(first.sum(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packing": True, "max_length": 48},
        {CHECKPOINTING: True, "lora": {"lora_dropout": 0.1}},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=["adamw", "packing", "checkpointing", "sgd"],
)
@pytest.mark.filterwarnings("ignore")
def test_all_pairs_of_other_trainings(tmp_path: Path, options: dict[str, Any]) -> None:
    given = {"adam_epsilon": 1e-2, "learning_rate": 3e-2, "num_train_epochs": 3, **options}
    made = record(tmp_path, sae_in(tmp_path), keep={"every": 4}, **given)
    assert TrajectoryFolder.open(made.run).states == (0, 4, 6)
    names = ("refusal:harmful:logit", "refusal:benign:logit")
    found = rescored(made, names)
    assert found.verified.exact
    wanted = slopes_of_training(made, names, found.ids.tolist(), 0.02)
    for k in range(len(names)):
        assert np.corrcoef(found.influence[:, k], wanted[:, k])[0, 1] > 0.99


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_is_gone_through_bit_by_bit(tmp_path: Path) -> None:
    made = record(tmp_path, sae_in(tmp_path), bf16=True, **OPTIONS)
    found = rescored(made, ("refusal:harmful:logit",), verify="all")
    assert found.verified.exact
    assert 1e-5 < found.verified.gradient_error < 5e-2
    assert np.isfinite(found.influence).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_plain_trainer_is_gone_through_again_and_others_are_refused(recorded: Recorded, tmp_path: Path) -> None:
    plan = _stored(recorded, tmp_path)
    other_trainers.make_trainer("plain", tmp_path / "out", [MeasuringCallback(plan)]).train()
    start = RunStore.open(tmp_path / "run").start
    found = rescore(tmp_path / "run", plan, start, RescoreOptions(verify="all"), model=tiny_model())
    assert found.verified.exact
    assert found.verified.gradient_error < 1e-5
    assert found.exposures.sum() == 2 * other_trainers.STEPS
    refused = replace(plan, make_sinks=lambda _: [StoreSink(tmp_path / "dpo")])
    with pytest.raises(AttributionError, match=r"the trainer is trl\.DPOTrainer"):
        other_trainers.make_trainer("DPO", tmp_path / "out", [MeasuringCallback(refused)]).train()


@pytest.mark.slow
def test_a_training_that_goes_on_from_a_checkpoint_goes_on_recording(recorded: Recorded, tmp_path: Path) -> None:
    """Stopped after step 5, gone on with from the checkpoint of step 3: the trajectory is that of the whole run."""
    plan = stopping.make_plan(
        sae_in(tmp_path), attribution=AttributionOptions(engine="off"), trajectory=TrajectoryOptions(keep=True),
        noise_draws=0,
    )  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    stopping.train(whole, plan)
    stopping.train(out, plan, stopping.Stop(5))
    stopping.train(out, plan, start=3)
    first, second = (TrajectoryFolder.open(each / "smda") for each in (whole, out))
    assert (first.states, first.steps) == (second.states, second.steps)
    for step in first.states:
        a, b = (load_file(state_file(each.path, step)) for each in (first, second))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [read_step(first.path, n).pairs for n in first.steps] == [
        read_step(second.path, n).pairs for n in first.steps
    ]
    assert first.pairs() == second.pairs()


def _looks(model: Any) -> Any:
    """All that a caller could see of a model but for its tensors."""
    modules = [(name, type(each), each.training, sorted(vars(each))) for name, each in model.named_modules()]
    weights = [(name, each.requires_grad, each.device) for name, each in model.named_parameters()]
    return modules, weights, model.config.to_dict(), model.generation_config.to_dict()


def _stored(recorded: Recorded, folder: Path) -> Any:
    return replace(recorded.plan, make_sinks=lambda _: [StoreSink(folder / "run")])
