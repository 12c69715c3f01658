"""kronfluence (pomonam/kronfluence 1.0.1): influence functions with EK-FAC at the trained model.

Its defaults (true Fisher, EK-FAC), and the damping that its authors recommend for models of this kind: a tenth of the
mean eigenvalue of each matrix. Scores come as ``query · H⁻¹ · gradient of the loss``; a pair that raises a target by
being trained on has a gradient that points away from it, so that the sign is turned.
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from recipes.evidence.peers_given import Array, Asked, Given, Rows, checked, collate, quiet

#: Seed of the labels that the true Fisher draws.
SEED = 0


def ekfac(given: Given, *, strategy: str = "ekfac", empirical: bool = False, batch: int = 16) -> Array:
    """Influence of every pair on every target ``[pair, target]``; ``strategy`` ``identity`` is the plain dot product.

    ``empirical``: the Fisher of the labels in the data, rather than of labels that the model draws.

    Raises:
        ImportError: kronfluence is not installed. PeerError: its scores cannot be used.
    """
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.utils.dataset import DataLoaderKwargs

    asked = given.copy()
    task = _task(asked)
    factors = FactorArguments(strategy=strategy, use_empirical_fisher=empirical)
    train: Any = given.train_rows()
    query: Any = given.query_rows()
    with tempfile.TemporaryDirectory() as folder, quiet():
        torch.manual_seed(SEED)
        model = prepare_model(asked, task)
        analyzer = Analyzer(
            "peer", model, task, cpu=True, log_level=logging.ERROR, disable_tqdm=True, output_dir=folder
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
        analyzer.fit_all_factors("factors", train, per_device_batch_size=batch, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores", "factors", query, train,
            per_device_query_batch_size=given.targets,  # all at once: gradients of the pairs are taken anew per batch
            per_device_train_batch_size=batch,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return checked(-scores.T.double().numpy(), given, f"kronfluence {strategy}")


def _task(asked: Asked) -> Any:
    from kronfluence.task import Task

    names = asked.modules_read

    class LoraTask(Task):
        def compute_train_loss(self, batch: Rows, model: nn.Module, sample: bool = False) -> Tensor:
            return model(**batch, sample=sample).sum()

        def compute_measurement(self, batch: Rows, model: nn.Module) -> Tensor:
            return model(**batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return names

        def get_attention_mask(self, batch: Rows) -> Tensor | None:
            return batch.get("attention_mask")

    return LoraTask()
