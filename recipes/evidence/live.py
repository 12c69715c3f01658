"""What the callback says while TRL trains, at its default settings but of all features; and what the audit says."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import TrainerCallback

from recipes.evidence.retrain import Array, Run, trl_trainer
from smda_callbacks.records import Pair, PairBook, WindowRecord
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.audit import run_audit
from smda_callbacks.training.audit_step import AuditOptions
from smda_callbacks.training.callback import MeasuringCallback
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.ghost import Ghost, StepUpdate


def ghost(run: Run) -> dict[str, Array]:
    """Engine ghost: effects, with momentum booked to its cause and without; shares; and the form of SGD."""
    sgd = SGDForm()
    sink = watched(run, "ghost", [sgd])
    return {
        "live ghost": effects(run, sink, "effect", later=True),
        "live ghost, momentum not booked": effects(run, sink, "effect", later=False),
        "live ghost, shares": effects(run, sink, "share", later=True),
        "in-run SGD form": in_targets(run, sink, sgd.total(len(run.pairs), _rows(sink))),
    }


def exact(run: Run) -> dict[str, Array]:
    """Engine exact: every pair's update of every step applied and measured."""
    return {"live exact": effects(run, watched(run, "exact", []), "effect", later=True)}


def audit(run: Run) -> dict[str, Array]:
    """``smda audit``: every pair's own step alone, from the start of the run."""
    hyper, sink = run.setup.hyper, MemorySink()
    options = AuditOptions(
        learning_rate=hyper.learning_rate,
        rank=hyper.rank,
        alpha=hyper.alpha,
        max_grad_norm=hyper.max_grad_norm,
        max_length=hyper.max_length,
        seed=hyper.adapter_seed,
    )
    model, tokenizer = run.setup.load()
    run_audit(run.setup.plan, options, model, tokenizer, run.setup.pairs(tokenizer), [sink])
    return {"audit": effects(run, sink, "effect", later=False)}


def watched(run: Run, engine: Literal["ghost", "exact"], others: Sequence[Any]) -> MemorySink:
    """TRL's training of this run with the callback; what it wrote."""
    sink = MemorySink()
    options = AttributionOptions(engine=engine, features=None, text=False)
    callback = MeasuringCallback(replace(run.setup.plan, attribution=options, make_sinks=lambda _: [sink]))
    for each in others:
        each.watched = callback
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(run.setup, run.order, Path(folder), [callback, *others])
        trainer.train()
    return sink


def effects(run: Run, sink: MemorySink, quantity: Literal["effect", "share"], *, later: bool) -> Array:
    """Sum over the run of what the books say of every pair, ``[pair, target]``."""
    assert sink.start is not None
    names = list(sink.start.manifest["attribution"]["functionals"])
    rows, total = _rows(sink), np.zeros((len(run.pairs), len(names)))
    for window in sink.windows:
        book = _book(window)
        _add(total, rows, book.ids, getattr(book, quantity))
        if later:
            _add(total, rows, book.later_ids, getattr(book, f"later_{quantity}"))
    return in_targets(run, sink, total)


def in_targets(run: Run, sink: MemorySink, total: Array) -> Array:
    """Columns of the functionals -> those of the run's targets; NaN for a target that is not among them."""
    assert sink.start is not None
    names = list(sink.start.manifest["attribution"]["functionals"])
    found = np.full((len(run.pairs), len(run.targets)), np.nan)
    for k, target in enumerate(run.targets):
        if target in names:
            found[:, k] = total[:, names.index(target)]
    return found


def _add(total: Array, rows: dict[int, int], ids: Any, values: Array) -> None:
    np.add.at(total, [rows[int(number)] for number in ids], values)


def _book(window: WindowRecord) -> PairBook:
    if window.pairs is None:
        raise RuntimeError(f"step {window.step} was not attributed: {window.error}")
    return window.pairs


def _rows(sink: MemorySink) -> dict[int, int]:
    """Number of a pair in the books -> its row in the setup."""
    seen: dict[int, Pair] = {pair.id: pair for window in sink.windows for pair in window.pairs_seen}
    return {number: pair.rows[0] for number, pair in seen.items()}


class SGDForm(TrainerCallback):
    """In-run influence that takes the step for SGD's: rate x (gradient of the target before it) · (pair's gradient).

    In-Run Data Shapley's first-order form (Wang et al. 2024), from the gradients that engine ghost holds anyway.
    """

    def __init__(self) -> None:
        self.watched: MeasuringCallback | None = None
        self.parts: list[tuple[tuple[int, ...], Array]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.watched is not None
        assert self.watched.monitor is not None
        assert self.watched.monitor.attributor is not None
        engine = self.watched.monitor.attributor.engine
        assert isinstance(engine, Ghost)
        book = engine.book

        def also(steps: list[StepUpdate]) -> Any:
            before = engine._before
            assert before is not None
            self.parts += [(step.ids, _sgd(step, before)) for step in steps]
            return book(steps)

        engine.book = also  # type: ignore[method-assign]

    def total(self, pairs: int, rows: dict[int, int]) -> Array:
        """Sum over the run, ``[pair, functional]``."""
        found = np.zeros((pairs, self.parts[0][1].shape[1]))
        for ids, values in self.parts:
            _add(found, rows, ids, values)
        return found


def _sgd(step: StepUpdate, before: tuple[torch.Tensor, ...]) -> Array:
    parts = (
        -site.rule.lr * site.clip * (site.rows @ gradient.T).double()
        for site, gradient in zip(step.sites, before, strict=True)
    )
    found: Array = torch.stack(list(parts)).sum(dim=0).numpy()
    return found
