"""What watching a run costs, computed: FLOPs, bytes and calls of every part of the callback.

All that is counted is read off the code: tokens of the training batch and of the probes (padding, and the tree of
openings behind every prompt, included), passes forward and backward, gradients of LoRA matrices, functionals,
dictionary. Bytes are counted where arrays are combined element by element outside of the model; inside of it they are
in what a FLOP takes, for the training step has them as well. What seconds that makes is in
recipes/evidence/cost_machine.py.

Conventions as of torch.utils.flop_counter: a multiplication with an addition is two; attention is counted in full,
masked places included; the backward pass of a frozen layer is one forward pass, that of attention two. Calls are those
that torch's dispatcher and Python's profiler count, to about a tenth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from recipes.evidence.cost_machine import Cost

#: Calls of a forward pass: of a decoder layer, of the adapters on its seven linear layers, and of what is around them.
LAYER_CALLS, ADAPTER_CALLS, PASS_CALLS = (
    Cost(calls=70, python=150),
    Cost(calls=70, python=330),
    Cost(calls=39, python=490),
)

#: Calls of a backward pass in a layer with adapters.
BACKWARD_CALLS = 220

#: Passes over an array of single precision that are combined element by element: read, read, written.
PASS = 12


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes of its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Hugging Face configuration of a Llama-like model."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        return cls(*sizes, heads, config.num_key_value_heads, width, config.vocab_size)

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of query, key, value, output, gate, up, down."""
        own, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mlp = (self.hidden, self.intermediate)
        return ((self.hidden, own), (self.hidden, kv), (self.hidden, kv), (own, self.hidden), mlp, mlp, mlp[::-1])

    @property
    def parameters(self) -> int:
        """Weights of the linear layers and one embedding."""
        return self.layers * sum(i * o for i, o in self.linears) + self.vocabulary * self.hidden


@dataclass(frozen=True)
class Lora:
    """Adapters of one rank on all linear layers of the top ``layers`` layers."""

    rank: int
    layers: int

    def sizes(self, shape: Shape) -> tuple[int, ...]:
        """Weights of the two matrices of each linear layer of one layer."""
        return tuple(self.rank * (i + o) for i, o in shape.linears)

    def weights(self, shape: Shape) -> int:
        """All trained weights."""
        return self.layers * sum(self.sizes(shape))


@dataclass(frozen=True)
class Tokens:
    """One batch: rows, columns (padding included), and places in all at which the vocabulary is predicted."""

    rows: int
    columns: int
    predicted: int

    @property
    def count(self) -> int:
        """All places."""
        return self.rows * self.columns


def forward(
    shape: Shape, lora: Lora, tokens: Tokens, layers: tuple[int, int] | None = None, *, trim: bool = False
) -> Cost:
    """A forward pass, of the layers ``[first, last)`` alone where given; the vocabulary's part is by ``predicted``.

    ``trim``: the last layer's MLP works only at the places that are predicted.
    """
    first, last = layers or (0, shape.layers)
    adapted = max(last - max(first, shape.layers - lora.layers), 0)
    attention = 4 * tokens.columns * shape.heads * shape.head_dim
    frozen = sum(2 * i * o for i, o in shape.linears)
    per_token = (last - first) * (frozen + attention) + adapted * 2 * sum(lora.sizes(shape))
    flops: float = tokens.count * per_token + 2 * tokens.predicted * shape.hidden * shape.vocabulary
    flops -= trim * (tokens.count - tokens.predicted) * mlp(shape, lora, adapters=1)
    calls = LAYER_CALLS * (last - first) + ADAPTER_CALLS * adapted + PASS_CALLS
    return Cost(flops, _logits(shape, tokens)) + calls


def backward(
    shape: Shape,
    lora: Lora,
    tokens: Tokens,
    layers: tuple[int, int] | None = None,
    *,
    weights: bool = True,
    trim: bool = False,
) -> Cost:
    """From the end of the layers ``[first, last)`` down to the lowest adapter.

    ``weights``: gradients of the LoRA matrices are taken too, not only of what goes into and comes out of them. Below
    the lowest adapted layer nothing is computed; in it, nothing of what query, key and value get in.
    """
    first, last = layers or (0, shape.layers)
    lowest = max(first, shape.layers - lora.layers)
    if lowest >= last:
        return Cost()
    attention = 8 * tokens.columns * shape.heads * shape.head_dim
    frozen = sum(2 * i * o for i, o in shape.linears)
    adapters = (2 if weights else 1) * 2 * sum(lora.sizes(shape))
    spared = sum(2 * i * o + (2 * lora.rank * i if weights else 0) for i, o in shape.linears[:3])
    per_token = (last - lowest) * (frozen + attention + adapters) - spared
    flops: float = tokens.count * per_token + 2 * tokens.predicted * shape.hidden * shape.vocabulary
    flops -= trim * (tokens.count - tokens.predicted) * mlp(shape, lora, adapters=2 if weights else 1)
    return Cost(flops, _logits(shape, tokens), calls=(last - lowest) * BACKWARD_CALLS)


def mlp(shape: Shape, lora: Lora, *, adapters: int) -> float:
    """FLOPs of an adapted layer's MLP for one token."""
    frozen = sum(2 * i * o for i, o in shape.linears[4:])
    return frozen + adapters * 2 * sum(lora.sizes(shape)[4:]) * (lora.layers > 0)


def _logits(shape: Shape, tokens: Tokens) -> float:
    return float(PASS * tokens.predicted * shape.vocabulary)


@dataclass(frozen=True)
class Work:
    """One step of training and what the callback does at it.

    ``train``, ``probes``: batches; ``nodes``: places behind a prompt at which openings are scored; ``hook``: layer
    after which the SAE reads; ``features``, ``support``: of the dictionary and of the policy; ``basis``,
    ``functionals``, ``renewed``, ``carried``: of engine ghost, see smda_callbacks/observe/probe_gradients.py and
    training/ghost.py (``carried``: earlier steps whose momentum is followed). ``kept``: lower layers of probes that are
    not computed again; ``prefix``: tokens of their shared start that are computed once per batch. ``head``: forward
    passes that the vocabulary's part of a training step costs, two, or three where TRL computes it again for the
    gradient.
    """

    shape: Shape
    lora: Lora
    train: tuple[Tokens, ...]
    pairs: int
    probes: tuple[Tokens, ...]
    nodes: int
    hook: int
    features: int
    support: int
    basis: int
    functionals: int
    renewed: int
    carried: int
    kept: int = 0
    prefix: int = 0
    trim: bool = False
    head: int = 2

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Work:
        """From :meth:`as_json`."""
        batches = {name: tuple(Tokens(**each) for each in row[name]) for name in ("train", "probes")}
        return cls(**{**row, "shape": Shape(**row["shape"]), "lora": Lora(**row["lora"]), **batches})
