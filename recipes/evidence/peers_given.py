"""What every peer is given: the trained model, the pairs as tokens, and the gradient of every target.

Peers ask for a query as a function of the model. A target of ours goes through a tree of openings, an SAE and a ridge
fit, and its gradient is known at the trained model (``Run.queries``). Peers get its linear twin: a function that runs
every LoRA matrix once, and whose gradient by the weights is that one. All of them use no more of a query than this.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recipes.evidence.retrain import Run

Array = NDArray[np.float64]

#: Rows of one length: an item of a data set, or a batch of them.
Rows = dict[str, Tensor]


class PeerError(RuntimeError):
    """A peer that is not there, or that did not do what it was asked to."""


@dataclass(frozen=True, eq=False)
class Given:
    """The question. ``model``: trained, float32, in evaluation mode; never handed out, see :meth:`copy`.

    ``sites``: names of the LoRA matrices in ``model``. ``queries``: per site ``[target, out, in]`` the gradient of
    every target. ``rows``: ``input_ids``, ``attention_mask``, ``labels`` ``[pair, token]``, padded on the right, and
    ``weight`` ``[pair]``: what the run multiplied the summed loss of a pair's tokens by, on average over its steps.
    """

    model: nn.Module
    sites: tuple[str, ...]
    queries: tuple[Tensor, ...]
    rows: Rows

    @property
    def pairs(self) -> int:
        return len(self.rows["input_ids"])

    @property
    def targets(self) -> int:
        return len(self.queries[0])

    def copy(self) -> Asked:
        """A model of a peer's own: they wrap its modules, and freeze its weights."""
        return Asked(copy.deepcopy(self.model), self.sites, self.queries)

    def train_rows(self) -> list[Rows]:
        """One item per pair, as a data set holds them."""
        return [
            {name: values[k] for name, values in self.rows.items()} | {"idx": torch.tensor(k)}
            for k in range(self.pairs)
        ]

    def query_rows(self) -> list[Rows]:
        """One item per target."""
        return [{"idx": torch.tensor(k)} for k in range(self.targets)]


def given(run: Run) -> Given:
    """The question of a run: its final model, its pairs, its targets."""
    sizes = [int(np.prod(shape)) for shape in run.shapes]
    parts = zip(run.queries.float().split(sizes, dim=1), run.shapes, strict=True)
    queries = tuple(part.reshape(-1, *shape).contiguous() for part, shape in parts)
    return Given(run.model(), run.names, queries, _rows(run))


def _rows(run: Run) -> Rows:
    longest = max(len(each.input_ids) for each in run.pairs)
    rows = {
        "input_ids": torch.zeros(len(run.pairs), longest, dtype=torch.int64),
        "attention_mask": torch.zeros(len(run.pairs), longest, dtype=torch.int64),
        "labels": torch.full((len(run.pairs), longest), -100),
        "weight": torch.tensor(_weights(run)),
    }
    for k, pair in enumerate(run.pairs):
        ids, end = torch.tensor(pair.input_ids), len(pair.input_ids)
        rows["input_ids"][k, :end], rows["attention_mask"][k, :end] = ids, 1
        rows["labels"][k, :end] = torch.where(torch.tensor(pair.trained), ids, -100)
    return rows


def _weights(run: Run) -> list[float]:
    """Per pair the mean over its steps of what the sum of its tokens' losses was multiplied by."""
    found: list[list[float]] = [[] for _ in run.pairs]
    for step in run.steps:
        for pair in step.batch.pairs:
            found[pair].append(step.clip / step.batch.tokens)
    return [float(np.mean(each)) for each in found]


class Asked(nn.Module):
    """The model with both questions behind one ``forward``, because peers hook modules below one root.

    With tokens it returns their training loss ``[row]``, without them the twins of the targets ``idx``, ``[row]``.
    """

    def __init__(self, model: nn.Module, sites: Sequence[str], queries: Sequence[Tensor]) -> None:
        super().__init__()
        self.model, self.names, self.queries = model, tuple(sites), tuple(queries)

    @property
    def modules_read(self) -> list[str]:
        """Names of the LoRA matrices below this module."""
        return [f"model.{name}" for name in self.names]

    def forward(
        self,
        idx: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        weight: Tensor | None = None,
        sample: bool = False,
    ) -> Tensor:
        if input_ids is None:
            return self.twins(idx)
        assert labels is not None
        assert weight is not None
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        logits, labels = logits[:, :-1].float(), labels[:, 1:]
        if sample:  # labels that the model itself would give: the true Fisher rather than the empirical one
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            labels = torch.where(labels == -100, labels, drawn)
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return loss.sum(dim=1) * weight

    def twins(self, idx: Tensor) -> Tensor:
        """Per target its linear twin ``Σ W·Q``, through the modules themselves."""
        parts = [self._twin(name, q[idx]) for name, q in zip(self.names, self.queries, strict=True)]
        return torch.stack(parts).sum(dim=0)

    def _twin(self, name: str, query: Tensor) -> Tensor:
        """``query [row, out, in]``: as many tokens as the matrix has rank, so that peers hold little of it."""
        module = self.model.get_submodule(name)
        rows, outputs, inputs = query.shape
        if outputs <= inputs:  # token r carries row r of the query, and only output r of it is read
            seen = query.detach().clone().requires_grad_()
            return module(seen).diagonal(dim1=1, dim2=2).sum(dim=1)
        seen = torch.eye(inputs).to(query).expand(rows, -1, -1).clone().requires_grad_()
        return (module(seen) * query.transpose(1, 2)).sum(dim=(1, 2))


def collate(items: Sequence[Rows]) -> Rows:
    """Items of a data set as a batch."""
    return {name: torch.stack([each[name] for each in items]) for name in items[0]}


def pair_gradients(given: Given) -> Tensor:
    """Every pair's gradient by all LoRA matrices, ``[pair, weight]``: one backward pass each, the slow way."""
    asked = given.copy()
    weights = [asked.model.get_parameter(f"{name}.weight") for name in given.sites]
    found = []
    for row in given.train_rows():
        loss = asked(**collate([row])).sum()
        found.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)]))
    return torch.stack(found)


@contextmanager
def quiet() -> Iterator[None]:
    """Context without the peers' warnings, most of them about names of torch's and transformers' that were changed.

    torch's random state is put back: some draw from it.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checked(scores: Any, given: Given, name: str) -> Array:
    """``scores [pair, target]`` as they must be: of this shape, and finite.

    Raises:
        PeerError: they are not.
    """
    array: Array = np.asarray(scores, dtype=np.float64)
    if array.shape != (given.pairs, given.targets):
        raise PeerError(f"{name} gave scores of shape {array.shape}; {(given.pairs, given.targets)} was asked for.")
    if not np.isfinite(array).all():
        raise PeerError(f"{name} gave {int((~np.isfinite(array)).sum())} of {array.size} scores that are not finite.")
    return array
