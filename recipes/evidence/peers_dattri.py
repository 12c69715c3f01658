"""dattri-LLM (TRAIS-Lab, 0.1.0): TracIn and EK-FAC at the trained model, AdamW-influence along the trajectory.

Its defaults. The damping of EK-FAC is an absolute number then (1e-3), whatever the gradients' size; where it is large
beside the spectrum, scores are all but plain products. So a row with a relative one is shown too. Samples carry their
number among the inputs: otherwise pairs of equal tokens would be one. TracIn and EK-FAC give products of two
gradients, whose sign is turned. AdamW-influence gives what the target loses where the sample is left out: with minus
without, as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.evidence.peers_given import Array, Asked, Given, Rows, checked, collate, given, quiet
from recipes.evidence.retrain import Run, Step, adamw, put


def ekfac(question: Given, *, relative: float | None = None) -> Array:
    """EK-FAC with the empirical Fisher, ``[pair, target]``. ``relative``: damping as a share of the mean eigenvalue.

    Raises:
        ImportError: dattri-LLM is not installed. PeerError: its scores cannot be used.
    """
    from dattri_llm import EKFACAttributor

    options = {} if relative is None else {"damping": relative, "relative_damping": True}
    return _at_the_end(question, EKFACAttributor, "EK-FAC", **options)


def tracin(question: Given) -> Array:
    """Dot products of gradients at the trained model, ``[pair, target]``; raises as :func:`ekfac`."""
    from dattri_llm import TracInAttributor

    return _at_the_end(question, TracInAttributor, "TracIn")


def adamw_influence(run: Run) -> Array:
    """What leaving a pair out of its steps does to the final weights, through AdamW's state, ``[pair, target]``.

    The steps of ``run`` are made again under its hooks, each from the weights that it was made from. Their gradients
    are taken of the clipped loss: the method itself knows of no clipping.

    Raises:
        ImportError: dattri-LLM is not installed. PeerError: its scores cannot be used.
    """
    from dattri_llm import AdamWInfluenceAttributor

    question = given(run)
    asked = question.copy()
    with tempfile.TemporaryDirectory() as folder, quiet():
        trained, queries = (_store(f"{folder}/{name}") for name in ("train", "test"))
        with _collected(asked, trained):
            for step in run.steps:
                put(asked.model, step.weights)
                asked.zero_grad()
                asked(**_batch(step)).sum().backward()
        put(asked.model, run.final)
        with _collected(asked, queries):
            asked.zero_grad()
            asked(**collate(question.query_rows())).sum().backward()
        found = AdamWInfluenceAttributor(_arguments(folder, question)).attribute_from_cache(
            trained, queries, dynamics=_dynamics(run, asked), propagation="test"
        )
    scores = np.zeros((question.pairs, question.targets))
    order = [int(name) for name in found.test_ids]
    for pair, row in zip(found.row_train_ids, found.scores.double().numpy(), strict=True):
        scores[int(pair), order] += row
    return checked(scores, question, "dattri-LLM AdamW-influence")


def _store(folder: str) -> Any:
    from dattri_llm import GradientStorageManager

    return GradientStorageManager(folder, residency="memory")


@contextmanager
def _collected(asked: Asked, store: Any) -> Iterator[None]:
    """Context whose backward passes go into ``store``, one step each, rows named by their number."""
    from dattri_llm import HookManager, OffloadCallback

    hooks = _hooks(capture_style="materialized")
    manager = HookManager(asked, config=hooks, callbacks=[OffloadCallback(1, store)], sample_id_key="idx")
    with manager.collect(deregister_on_exit=True):
        yield


def _batch(step: Step) -> Rows:
    """A step's rows, each weighted as in the loss that was trained on."""
    rows = {name: getattr(step.batch, name) for name in ("input_ids", "attention_mask", "labels")}
    pairs = torch.tensor(step.batch.pairs)
    return {**rows, "idx": pairs, "weight": torch.full((len(pairs),), step.clip / step.batch.tokens)}


def _dynamics(run: Run, asked: Asked) -> Mapping[int, dict[str, Any]]:
    """AdamW's moments before and after every step, by matrix, as its own recorder hands them on."""
    hyper = run.setup.hyper
    sizes = [int(np.prod(shape)) for shape in run.shapes]

    def by_matrix(first: Tensor, second: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        parts = zip(first.split(sizes), second.split(sizes), strict=True)
        return dict(zip(asked.modules_read, parts, strict=True))

    found = {}
    for place, step in enumerate(run.steps):
        after = adamw(step.weights.clone(), step.first, step.second, step.gradient * step.clip, step, hyper)
        found[place] = {
            "pre": by_matrix(step.first, step.second),
            "post": by_matrix(*after),
            "step": step.number,
            "lr": step.lr,
            "betas": hyper.betas,
            "eps": hyper.eps,
            "weight_decay": hyper.weight_decay,
        }
    return found


def _at_the_end(question: Given, attributor: Any, name: str, **options: Any) -> Array:
    from dattri_llm import AttributionTask

    asked = question.copy()
    with tempfile.TemporaryDirectory() as folder, quiet():
        task = AttributionTask(_loss, asked)
        found = attributor(_arguments(folder, question), task=task).attribute(
            question.train_rows(), question.query_rows(), hook_config=_hooks(), **options
        )
    _check_order(found, question)
    return checked(-found.scores.double().numpy(), question, f"dattri-LLM {name}")


def _check_order(found: Any, question: Given) -> None:
    """Rows are found again by the hash of their inputs: one each, in the order of the data set."""
    from dattri_llm import hash_sample

    wanted = [hash_sample(row) for row in question.train_rows()], [hash_sample(row) for row in question.query_rows()]
    assert (list(found.row_train_ids), list(found.test_ids)) == wanted


def _arguments(folder: str, question: Given) -> Any:
    from dattri_llm import AttributionArguments

    return AttributionArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=question.targets,
        use_cpu=True,
        max_grad_norm=None,
    )


def _hooks(**options: Any) -> Any:
    from dattri_llm import HookManagerConfig

    return HookManagerConfig(linear_io=[r"\.lora_[AB]\."], **options)


def _loss(model: nn.Module, batch: Rows) -> Tensor:
    total: Tensor = model(**batch).sum()
    return total
