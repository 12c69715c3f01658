"""Everything that stays fixed while one model is watched, checked once, before training.

Probes, their batches, the SAE, the scorers and the read-out never change during a run, so that two snapshots differ
only by the weights of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.batches import (
    ProbeBatch,
    ProbeBatches,
    answer_lead,
    chat_prompt,
    make_batches,
    response_encoder,
    tokenize_probes,
)
from smda_callbacks.observe.behaviour import Scorer, openings_of, prefix_probability, score
from smda_callbacks.observe.divided import device_of, is_divided
from smda_callbacks.observe.features import READOUTS, Encoder, Readout, encoder
from smda_callbacks.observe.preference import preference_tree, scores_texts
from smda_callbacks.observe.prefixes import PrefixError, PrefixTree, build_tree, check_prefix_free
from smda_callbacks.observe.probes import ProbeSet
from smda_callbacks.observe.reading import (
    Part,
    Reading,
    Visitor,
    assemble,
    begin_saving,
    read,
    read_parts,
    tree_in_one_pass,
)
from smda_callbacks.observe.sae import SAEHandle, check_fit
from smda_callbacks.observe.savings import Saving, SavingOptions
from smda_callbacks.observe.sharding import Command, Move, Team
from smda_callbacks.observe.trials import Savings
from smda_callbacks.records import Array, Snapshot

Target = Literal["probability", "logit"]
TARGETS: tuple[Target, ...] = ("probability", "logit")


@dataclass(frozen=True)
class Instrument:
    """Reads one model: fixed probes, batches, SAE, scorers, read-out and encoded features.

    ``team``: the processes that share its readings, None for one alone; ``command``: what it tells them to read.
    ``savings``: kept from reading to reading, and by all instruments that were made of this one.
    """

    handle: SAEHandle
    probes: ProbeSet
    batches: ProbeBatches
    scorers: tuple[Scorer, ...]
    target: Target
    readout: Readout
    encode: Encoder
    team: Team | None = None
    command: Command = Command("read")
    savings: Savings = field(default_factory=Savings)

    @property
    def behaviours(self) -> tuple[str, ...]:
        """Names of the behaviours, in the order of the columns of y."""
        return tuple(each.name for each in self.scorers)

    @property
    def by_preference(self) -> bool:
        """Whether behaviours are those of a reward model: which opening it prefers, not which it says."""
        return self.batches.tree.prior is not None

    def read(self, model: nn.Module, visit: Visitor | None = None, *, command: Command | None = None) -> Reading:
        """One pass over the probes; see :func:`smda_callbacks.observe.reading.read`.

        With a team, every process reads its share of the batches, and only that is visited here. ``command``: what the
        others are told to do beside reading.
        """
        if self.team is not None:
            asked = command or self.command
            parts = self.team.read(asked, lambda: self.read_share(model, visit), divided=is_divided(model))
            return assemble(parts, self.batches)
        return read(
            model,
            self.batches,
            self.handle.site,
            self.encode,
            readout=self.readout,
            visit=visit,
            savings=self.savings,
        )

    @property
    def share(self) -> list[ProbeBatch]:
        """The batches that this process reads."""
        batches = self.batches.batches
        return list(batches) if self.team is None else self.team.share(batches)

    def read_share(self, model: nn.Module, visit: Visitor | None = None) -> list[Part]:
        """This process's part of a reading."""
        batches, team = self.batches.batches, self.team
        in_step = team.in_step(len(batches)) if team is not None and is_divided(model) else None
        return read_parts(
            model,
            self.batches,
            self.share,
            self.handle.site,
            self.encode,
            readout=self.readout,
            visit=visit,
            in_step=in_step,
            savings=self.savings,
        )

    def saving(self, model: nn.Module, *, gradients: bool) -> Saving:
        """What a pass over the probes may leave out now."""
        return begin_saving(self.savings, model, self.batches, self.handle.site, self.readout, gradients=gradients)

    def snapshot(self, step: int, reading: Reading) -> Snapshot:
        """(X, Y) of a reading as float64 numpy arrays."""
        return Snapshot(step, *arrays(reading), self.scores(reading))

    def scores(self, reading: Reading) -> Array:
        """Behaviours ``[probe, behaviour]``: probabilities, or log-odds when the target is ``logit``."""
        return score(self.scorers, self.batches.tree, reading.log_probs, self.target)

    def of_features(self, features: np.ndarray) -> Instrument:
        """The same instrument, reading only these SAE features from now on."""
        command = replace(self.command, features=tuple(features.tolist()))
        return replace(self, encode=encoder(self.handle, torch.from_numpy(features)), command=command)

    def with_team(self, team: Team | None) -> Instrument:
        """The same instrument, sharing its readings with other processes."""
        return replace(self, team=team)

    def moved(self, move: Move) -> Instrument:
        """The same instrument for weights that a random update has moved: other processes move theirs alike."""
        return replace(self, command=replace(self.command, move=move))


def arrays(reading: Reading) -> tuple[Array, Array]:
    """``pre`` and ``gate`` of a reading, ``[probe, feature]`` float64 numpy."""
    return reading.pre.double().cpu().numpy(), reading.gate.double().cpu().numpy()


def build_instrument(
    model: nn.Module,
    tokenizer: Any,
    handle: SAEHandle,
    probes: ProbeSet,
    *,
    scorers: Sequence[Scorer] = (prefix_probability(),),
    contrast: Mapping[str, Sequence[str]] | None = None,
    target: Target = "probability",
    readout: Readout = "last",
    batch_size: int = 64,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
    allow_model_mismatch: bool = False,
    savings: SavingOptions | None = None,
) -> Instrument:
    """Check that model, SAE, tokenizer, probes and openings fit together, and make the instrument that reads them.

    Args:
        contrast: lists of openings that are not scored but must be told apart from the scored ones (compliance).
        system: a system prompt put before every probe; template: extra arguments of the chat template, for example
            ``{"enable_thinking": False}``.
        savings: what readings need not compute again, or at all; None: the defaults.

    Raises:
        SAEError, HookError, ProbeError, PrefixError, ValueError: each says what does not fit and what to do.
    """
    if target not in TARGETS or readout not in READOUTS:
        raise ValueError(
            f"target {target!r} or readout {readout!r} is unknown. Allowed targets: {', '.join(TARGETS)}; "
            f"read-outs: {', '.join(READOUTS)}."
        )
    names = [each.name for each in scorers]
    if not names or len(set(names)) != len(names):
        raise PrefixError(f"behaviours must have different names and there must be one at least, got {names}.")
    check_fit(handle, model, allow_model_mismatch=allow_model_mismatch)
    first = chat_prompt(tokenizer, probes.probes[0].text, system=system, template=template)
    lead = answer_lead(tokenizer, probes.probes[0].text, system=system, template=template)
    encode_opening = response_encoder(tokenizer, first, lead)
    for each in scorers:
        check_prefix_free({each.name: each.openings, **(contrast or {})}, encode_opening)
    tree = _tree(model, scorers, contrast or {}, encode_opening)
    config = unwrap(model).config
    ids = tokenize_probes(
        tokenizer,
        probes,
        context=getattr(config.get_text_config(), "max_position_embeddings", None),
        reserve=max(tree.depths),
        system=system,
        template=template,
    )
    batches = make_batches(ids, tree, batch_size=batch_size, pad=tokenizer.pad_token_id or 0)
    handle = handle.to(device_of(model))
    return Instrument(
        handle, probes, batches, tuple(scorers), target, readout, encoder(handle), savings=Savings(savings)
    )


def _tree(
    model: nn.Module,
    scorers: Sequence[Scorer],
    contrast: Mapping[str, Sequence[str]],
    encode: Callable[[str], Sequence[int]],
) -> PrefixTree:
    """The openings that are read: those of the scorers, and with a reward model those that it chooses between."""
    if not scores_texts(model):
        return build_tree(openings_of(scorers), encode)
    if not tree_in_one_pass(model):
        raise ValueError(
            "a reward model is read with masks of our own, which its attention does not take. Allowed: "
            "attn_implementation sdpa or eager. Next step: load the model with one of these."
        )
    return preference_tree([*(each.openings for each in scorers), *contrast.values()], encode)
