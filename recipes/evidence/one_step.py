"""Does a live effect say what would have happened without the pair? One-step leave-one-out, made for real.

A LoRA run on the quickstart model, watched as a user would, with engine ghost. After every optimizer step, and for
every pair in it, the step is made again without that pair: its gradient by a backward pass of its own from the weights
before the step, the gradients of the others summed and clipped, torch's own optimizer from its state before the step,
all probes read. What came out with the pair minus what came out without it is the exact effect; the callback predicted
it before anything of this was done. ``refusal_r`` is the Pearson correlation of the two over cases and categories,
``policy_r`` that of the policy's coefficients (median over features, of magnitude and outputs, the pathways that engine
ghost predicts; ``policy_gating_r`` counts gates that flip as well).

    python recipes/evidence/one_step.py --json one_step.json          # three seeds, 400 cases each
    python recipes/evidence/one_step.py --seeds 1 --steps 5           # a look
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations.integration_utils import WandbCallback

from smda_callbacks.cli.quickstart_run import build, environment
from smda_callbacks.maths.functionals import measured
from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.ridge import fit_ridge
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.instrument import arrays
from smda_callbacks.observe.sequences import split_batch
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.trajectory_options import TrajectoryOptions

Array = NDArray[np.float64]


@dataclass
class Before:
    """The run just before an optimizer step."""

    weights: list[Tensor] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Tensor] = field(default_factory=dict)


class LeaveOneOut(TrainerCallback):
    """Makes every step again without each of its pairs, and keeps predicted and exact effects."""

    def __init__(self, watched: MeasuringCallback, sink: MemorySink) -> None:
        self.watched, self.sink, self.before = watched, sink, Before()
        self._hook: Any = None
        self.predicted: list[Array] = []
        self.exact: list[Array] = []
        self.coefficients: list[Array] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook = kwargs["model"].register_forward_pre_hook(self._keep_batch, with_kwargs=True)

    def _keep_batch(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled() and "labels" in kwargs:
            self.before.batch = {name: kwargs[name] for name in ("input_ids", "attention_mask", "labels")}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = _trained(kwargs["model"])
        self.before.weights = [parameter.detach().clone() for parameter in parameters]
        self.before.state = copy.deepcopy(kwargs["optimizer"].optimizer.state_dict())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, monitor = kwargs["model"], self.watched.monitor
        assert monitor is not None
        assert monitor.attributor is not None
        book = self.sink.windows[-1].pairs
        assert book is not None
        policy, functionals = monitor.policy, monitor.attributor.functionals
        after = State(monitor.snapshot.pre, monitor.snapshot.gate, monitor.snapshot.y)
        gradients = self._own_gradients(model)
        coef = fit_ridge(after.x, after.y, policy.lam, scale=policy.scale).coef[:, 0]
        for left_out, example in enumerate(split_batch(self.before.batch)):
            rest = [sum(g for k, g in enumerate(rows) if k != left_out) for rows in zip(*gradients, strict=True)]
            weights = self._step(kwargs["optimizer"].optimizer, model, rest, args.max_grad_norm)
            with weights_restored(_trained(model)):
                _put(model, weights)
                reading = monitor.instrument.read(model)
            without = State(*arrays(reading), monitor.instrument.scores(reading))
            pair = monitor.attributor.index.pair_of(example.key, example.tokens)
            self.predicted.append(book.effect[book.ids.tolist().index(pair)])
            self.exact.append(measured(functionals, without, after, scale=policy.scale, lam=policy.lam))
            refitted = fit_ridge(without.x, without.y, policy.lam, scale=policy.scale).coef[:, 0]
            self.coefficients.append(coef - refitted)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _own_gradients(self, model: Any) -> list[list[Tensor]]:
        """Per pair the gradient of its part of the loss, at the weights before the step."""
        batch, found = self.before.batch, []
        tokens = (batch["labels"][:, 1:] != -100).sum()
        parameters = _trained(model)
        with weights_restored(parameters), torch.enable_grad():
            _put(model, self.before.weights)
            for row in range(len(batch["input_ids"])):
                ids, mask, labels = (batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "labels"))
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits[0], labels[0, 1:], reduction="sum") / tokens
                found.append(list(torch.autograd.grad(loss, parameters)))
        return found

    def _step(self, optimizer: Any, model: Any, gradients: list[Any], max_norm: float) -> list[Tensor]:
        """The weights after torch's own step from before, with other gradients."""
        copies = [torch.nn.Parameter(weight.clone()) for weight in self.before.weights]
        groups, at = [], 0
        for group in self.before.state["param_groups"]:
            groups.append({"params": copies[at : at + len(group["params"])]})
            at += len(group["params"])
        fresh = type(optimizer)(groups, lr=optimizer.param_groups[0]["lr"])
        fresh.load_state_dict(copy.deepcopy(self.before.state))
        for parameter, gradient in zip(copies, gradients, strict=True):
            parameter.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(copies, max_norm)
        fresh.step()
        return [parameter.detach() for parameter in copies]


def _trained(model: Any) -> list[torch.nn.Parameter]:
    """Trained weights in the order of the optimizer's state: that of the model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _put(model: Any, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(_trained(model), weights, strict=True):
            parameter.copy_(weight)


def run_seed(seed: int, steps: int, learning_rate: float | None = None) -> dict[str, Any]:
    """One watched run with its leave-one-out; its correlations."""
    sink = MemorySink()
    with tempfile.TemporaryDirectory() as folder, environment(Path(folder)):
        work = build(Path(folder), seed=seed)
        options = AttributionOptions(engine="ghost", features=None)
        work.callback.plan = replace(
            work.callback.plan,
            attribution=options,
            trajectory=TrajectoryOptions(),  # there is no store to keep it in
            make_sinks=lambda _: [sink],
            on_error="raise",
            noise_draws=0,
        )
        loo = LeaveOneOut(work.callback, sink)
        work.trainer.add_callback(loo)
        work.trainer.remove_callback(WandbCallback)
        work.trainer.args.max_steps = steps
        if learning_rate is not None:
            work.trainer.args.learning_rate = learning_rate
        work.trainer.train()
    names = sink.start.manifest["attribution"]["functionals"] if sink.start else []
    return {"seed": seed, **correlations(names, *map(np.array, (loo.predicted, loo.exact, loo.coefficients)))}


def correlations(names: Sequence[str], predicted: Array, exact: Array, coefficients: Array) -> dict[str, Any]:
    """Pearson correlations of predicted and exact effects, ``[case, functional]``."""
    groups = [k for k, name in enumerate(names) if name.startswith("refusal:") and name.count(":") == 1]
    x, y = ([k for k, name in enumerate(names) if name.endswith(end)] for end in (":x", ":y"))
    policy = [_pearson(predicted[:, a] + predicted[:, b], exact[:, a] + exact[:, b]) for a, b in zip(x, y, strict=True)]
    gating = [
        _pearson(predicted[:, a] + predicted[:, b], coefficients[:, j])
        for j, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    return {
        "refusal_r": _pearson(predicted[:, groups], exact[:, groups]),
        "refusal_r_worst_group": min(_pearson(predicted[:, k], exact[:, k]) for k in groups),
        "policy_r": float(np.median(policy)),
        "policy_r_worst_feature": min(policy),
        "policy_gating_r": float(np.median(gating)),
        "n_cases": len(exact),
    }


def _pearson(first: Array, second: Array) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run all seeds, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (default 3)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of 8 pairs each (default 50: 400 cases)")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: that of the quickstart, 1e-3")
    parser.add_argument("--json", metavar="FILE", type=Path, default=None, help="write the results there")
    args = parser.parse_args(argv)
    found = []
    for seed in tqdm(range(args.seeds), desc="one-step leave-one-out", unit="seed"):
        found.append(run_seed(seed, args.steps, args.learning_rate))
        print(json.dumps(found[-1]))
        if args.json is not None:  # after every seed: a long run that is stopped keeps what it has
            args.json.write_text(json.dumps({"seeds": found}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
