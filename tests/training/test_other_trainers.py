"""Trainers other than SFT accept the callback; where pairs cannot be told apart, the notice says which it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

from smda_callbacks.observe.lora import AttributionError
from smda_callbacks.records import PATHWAYS
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions, check_model, check_training
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.requirements import AdapterError, require_readable, require_whole_model
from tests.helpers.other_trainers import STEPS, make_trainer
from tests.helpers.tiny import tiny_model

#: What the notice says of pairs.
NOTICES = {
    "DPO": "preference training as DPO's",
    "KTO": "KTO's training",
    "GRPO": "online training as GRPO's",
    "Reward": "a reward model's training, where a pair is two answers",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental:FutureWarning"),
]


class Weights(TrainerCallback):
    """The trained weights after every step."""

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([p.detach().clone() for p in kwargs["model"].parameters() if p.requires_grad])


def weights_of(kind: str, folder: Path, *callbacks: TrainerCallback) -> list[list[torch.Tensor]]:
    weights = Weights()
    make_trainer(kind, folder, [*callbacks, weights]).train()
    return weights.steps


@pytest.mark.parametrize("kind", ["plain", *NOTICES])
def test_windows_are_booked_and_training_is_bit_for_bit_the_same(
    kind: str, plan: Plan, sink: MemorySink, tmp_path: Path
) -> None:
    without = weights_of(kind, tmp_path)
    watched = weights_of(kind, tmp_path, MeasuringCallback(plan))
    assert [(w.step, w.status) for w in sink.windows] == [(k + 1, "ok") for k in range(STEPS)]
    assert len(without) == len(watched) == STEPS
    for a, b in zip(without, watched, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(*without, strict=True))
    assert sink.start is not None
    total = sum(w.shift[part] for w in sink.windows for part in PATHWAYS)
    np.testing.assert_allclose(total, sink.windows[-1].coef - sink.start.baseline.coef, atol=1e-12)
    attribution = sink.start.manifest["attribution"]
    if kind == "plain":
        assert attribution["engine"] != "off"
        assert all(window.pairs is not None for window in sink.windows)
    else:
        assert attribution["engine"] == "off"
        assert NOTICES[kind] in attribution["why"]
        assert "no input_ids, so a step's pairs cannot be recognised" in attribution["why"]


def test_pairs_that_were_asked_for_by_name_are_refused_by_the_trainings_kind(plan: Plan, tmp_path: Path) -> None:
    asked = replace(plan, attribution=AttributionOptions(engine="ghost"))
    with pytest.raises(
        AttributionError, match=r"chosen_ids.* of preference training as DPO's.*attribution.engine: off"
    ):
        make_trainer("DPO", tmp_path, [MeasuringCallback(asked)]).train()


def test_the_notice_names_a_reward_model_and_its_pairs_are_refused_whatever_its_data(
    plan: Plan, sink: MemorySink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="smda_callbacks")
    trainer = make_trainer("Reward", tmp_path, [MeasuringCallback(plan)])
    trainer.train()
    assert "watching refusal, as this reward model prefers it, on 24 probes" in caplog.text
    assert "a reward model's training, where a pair is two answers" in caplog.text
    assert sink.start is not None
    assert sink.start.manifest["scored_by"] == "preference"
    with pytest.raises(AttributionError, match=r"this is a reward model: it learns from two answers at once"):
        check_model(trainer.model)
    check_model(tiny_model())


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("llama", r"LlamaForSequenceClassification .*is no reward model: its head gives 3 numbers.*num_labels=1"),
        ("bert", r"BertForSequenceClassification .*is no reward model: it has no head named score"),
    ],
)
def test_a_classifier_that_is_no_reward_model_is_refused_by_name(kind: str, text: str) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = AutoConfig.for_model(kind, **sizes, num_attention_heads=2, num_labels=3 if kind == "llama" else 1)
    with pytest.raises(AdapterError, match=text):
        require_readable(AutoModelForSequenceClassification.from_config(config))


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["chosen_ids", "rejected_ids"], "of a reward model's training"),
        (["label", "prompt_ids", "completion_ids", "KL_completion_ids"], "of KTO's training"),
        (["words"], r"has the columns \['words'\] and no input_ids"),
    ],
)
def test_the_kind_of_training_is_told_by_its_columns(columns: list[str], text: str) -> None:
    args = SimpleNamespace(world_size=1, fp16=False)
    check_training(args, ["input_ids", "labels"])
    check_training(args, None)
    with pytest.raises(AttributionError, match=text):
        check_training(args, columns)


def test_weights_that_are_split_over_processes_are_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.weight.placements = ("Shard(0)",)  # as a DTensor has
    with pytest.raises(AdapterError, match=r"weight and others are divided over processes as tensor"):
        require_whole_model(model)
