"""Bergson (EleutherAI, 2.5.1): gradients that its callback keeps during a real run of TRL's SFTTrainer.

The callback stores, per epoch and pair, the gradient of the pair's part of the loss at the step it was trained on; by
default divided by Adam's square root of v of the step before, times that step's rate, projected to 16 x 16 per matrix,
and in half precision. A pair's score is the product with the target's gradient at the trained model, taken by
Bergson's own collector with the same projection, summed over epochs; the sign is turned, as for every product of
gradients.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.evidence.peers_given import Array, Given, PeerError, checked, collate, given, quiet
from recipes.evidence.retrain import Run, flat_weights, trl_trainer

#: How far its run may end from ours, relative to the size of the weights' change: the same training, but for rounding.
SAME = 1e-2


def defaults(run: Run) -> Array:
    """Scores ``[pair, target]`` from the callback as it comes.

    Raises:
        ImportError: Bergson is not installed. PeerError: its run is not ours, or its scores cannot be used.
    """
    return _scores(run, "Bergson's callback", 16)


def raw(run: Run) -> Array:
    """Scores ``[pair, target]`` from raw gradients in float32, not projected; raises as :func:`defaults`."""
    return _scores(run, "Bergson's callback, raw", 0, use_optimizer_state=False, dtype=np.dtype(np.float32))


def _scores(run: Run, name: str, projection: int, **options: Any) -> Array:
    question = given(run)
    rows = np.zeros((question.pairs, 0))
    with tempfile.TemporaryDirectory() as folder:
        for epoch in stored_rows(run, Path(folder), projection_dim=projection, **options):
            rows = epoch if not rows.size else rows + epoch
    queries = query_rows(question, projection)
    return checked(-rows @ queries.T, question, name)


def stored_rows(run: Run, folder: Path, **options: Any) -> list[Array]:
    """Train with the callback; what it kept per epoch, ``[pair, column]``."""
    from bergson.data import load_gradients
    from bergson.huggingface import GradientCollectorCallback, prepare_for_gradient_collection

    with quiet():
        trainer = trl_trainer(run.setup, run.order, folder / "trainer")
        trainer.add_callback(GradientCollectorCallback(folder / "kept", **options))
        prepare_for_gradient_collection(trainer)
        trainer.train()
    _check_same(run, flat_weights(trainer.model))
    epochs = sorted((folder / "kept" / "train").iterdir())
    return [np.array(load_gradients(epoch), dtype=np.float64) for epoch in epochs]


def _check_same(run: Run, final: torch.Tensor) -> None:
    apart = float((final - run.final).norm() / (run.final - run.steps[0].weights).norm())
    if not apart < SAME:
        raise PeerError(
            f"its run ended {apart:.1e} from ours, relative to what training changed; allowed is {SAME:.0e}. "
            "Next step: check that the order of pairs and the arguments are the same."
        )


def query_rows(question: Given, projection: int) -> NDArray[np.float64]:
    """The targets' gradients as Bergson's collector keeps them, ``[target, column]``, columns as in its store."""
    from bergson import GradientProcessor
    from bergson.collector.gradient_collectors import StreamingGradientCollector
    from bergson.utils.peft import detect_peft_modules

    asked = question.copy()
    model: Any = asked.model
    collector = StreamingGradientCollector(
        model=model.base_model,
        processor=GradientProcessor({}, projection_dim=projection or None, reshape_to_square=True),
        target_modules=detect_peft_modules(model),
        attention_cfgs={},
        dtype=torch.float32,
    )
    with collector:
        asked(**collate(question.query_rows())).sum().backward()
    found = [collector.mod_grads[name].flatten(1) for name in collector.shapes()]
    rows: NDArray[np.float64] = torch.cat(found, dim=1).double().numpy()
    return rows
