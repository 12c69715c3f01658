"""What the savings of a reading that have no switch save: its slow twin, over the reading.

* ``reading_no_tree``: a row per probe and opening, instead of all openings behind the prompt in one row.
* ``reading_no_buckets``: batches in the order of the file, instead of probes of like length together.
* ``reading_all_features``: the whole dictionary is encoded and the policy's features are taken of it, instead of
  encoding these alone.
* ``reading_all_logits``: the vocabulary is predicted at every place, instead of where an opening goes on.

All else as in the reading, in processor time. That a twin reads the same is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from recipes.benchmark_maths import Figure, in_turns
from recipes.benchmark_training import Options
from smda_callbacks.observe.batches import ProbeBatches, make_batches
from smda_callbacks.observe.features import encoder
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.prefixes import PrefixTree, build_tree
from smda_callbacks.observe.reading import Reading
from smda_callbacks.observe.trials import ROUNDED, Savings, alike

#: Makes a reading of the model.
Read = Callable[[Any], Reading]


def readings(instrument: Instrument, model: Any, options: Options) -> Iterator[Figure]:
    """A figure per twin.

    Raises:
        RuntimeError: a twin reads something else.
    """
    for name, twin in twins(instrument).items():
        check_alike(name, instrument.read(model), twin(model))
        turns = in_turns(partial(twin, model), partial(instrument.read, model), options.repeats, options.device)
        yield Figure(name, [slow.cpu / fast.cpu for slow, fast in turns])


def twins(instrument: Instrument) -> dict[str, Read]:
    """The readings by name, each without one saving."""
    return {
        "reading_no_tree": _no_tree(instrument),
        "reading_no_buckets": _other(instrument, in_file_order(instrument.batches)).read,
        "reading_all_features": _all_features(instrument),
        "reading_all_logits": lambda model: _all_logits(instrument, model),
    }


def check_alike(name: str, fast: Reading, slow: Reading) -> None:
    """That both saw the same, but for rounding.

    Raises:
        RuntimeError: they did not; names the twin.
    """
    sides = [
        (r.hidden, (r.pre * r.gate), torch.from_numpy(np.exp(r.log_probs))) for r in (fast, slow)
    ]  # probabilities: an opening that is never said has a log-probability of any size
    for what, a, b in zip(("hidden states", "features", "probabilities"), *sides, strict=True):
        if a.shape != b.shape or not alike(a, b, ROUNDED):
            raise RuntimeError(f"{name} does not give the reading's {what}, so its figure would be of something else.")


def prompt_ids(batches: ProbeBatches) -> list[list[int]]:
    """Token ids of every prompt, by the number of its probe."""
    found: dict[int, list[int]] = {}
    for batch in batches.batches:
        for row, number in enumerate(batch.index.tolist()):
            ids = batch.input_ids[row].tolist()
            found[number] = [*ids[: int(batch.lengths[row]) - 1], ids[batch.width]]
    return [found[number] for number in range(batches.n_probes)]


def in_file_order(batches: ProbeBatches) -> ProbeBatches:
    """As many rows per batch, of probes that follow each other in the file."""
    ids, size = prompt_ids(batches), len(batches.batches[0].index)
    parts = [make_batches(ids[at : at + size], batches.tree, batch_size=size) for at in range(0, len(ids), size)]
    shifted = [replace(batch, index=batch.index + k * size) for k, part in enumerate(parts) for batch in part.batches]
    return replace(batches, batches=tuple(shifted))


def _other(instrument: Instrument, batches: ProbeBatches) -> Instrument:
    """The same instrument with other batches, and with savings of its own: what is kept is kept by batch."""
    return replace(instrument, batches=batches, savings=Savings(instrument.savings.options))


def _no_tree(instrument: Instrument) -> Read:
    batches = instrument.batches
    ids, size = prompt_ids(batches), len(batches.batches[0].index)
    alone = [_other(instrument, make_batches(ids, each, batch_size=size)) for each in single_trees(batches.tree)]

    def read(model: Any) -> Reading:
        found = [each.read(model) for each in alone]
        return replace(found[0], log_probs=np.concatenate([each.log_probs for each in found], axis=1))

    return read


def single_trees(tree: PrefixTree) -> list[PrefixTree]:
    """A tree of one opening for each."""
    paths = dict(zip(tree.openings, tree.token_paths, strict=True))
    return [build_tree([opening], paths.__getitem__) for opening in tree.openings]


def _all_features(instrument: Instrument) -> Read:
    whole, features = replace(instrument, encode=encoder(instrument.handle)), instrument.encode.index

    def read(model: Any) -> Reading:
        reading = whole.read(model)
        return replace(reading, pre=reading.pre[:, features], gate=reading.gate[:, features])

    return read


def _all_logits(instrument: Instrument, model: Any) -> Reading:
    def everywhere(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "logits_to_keep": 0}  # which transformers takes for all

    handle = model.register_forward_pre_hook(everywhere, with_kwargs=True)
    try:
        return instrument.read(model)
    finally:
        handle.remove()
