"""Do the openings fit the model? What it really answers, greedily, against what the lists of openings expect."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.batches import ProbeBatch, answer_lead, chat_prompt, response_encoder
from smda_callbacks.observe.guard import measuring
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.records import Array, Expected

#: How much of an answer names its opening: "I won't help", "Sure, here is".
OPENING_WORDS = 3

_OPENING = re.compile(r"\s*\S+(?:\s+\S+){0," + str(OPENING_WORDS - 1) + "}")

Paths = Mapping[str, Sequence[tuple[int, ...]]]


@dataclass(frozen=True)
class Answer:
    """The beginning of a greedy answer. ``kind``: name of the list that holds its opening; None where none does."""

    probe: int  # number in the probe set
    expected: Expected
    text: str
    kind: str | None

    @property
    def opening(self) -> str:
        """The first words, as they would be written into a list of openings."""
        match = _OPENING.match(self.text)
        return match[0] if match else self.text


@dataclass(frozen=True)
class Missed:
    """An opening that no list holds, with the number of probes of each group that it was given to."""

    opening: str
    refuse: int
    comply: int


@dataclass(frozen=True)
class Calibration:
    """Greedy answers against the lists of openings.

    ``agreement``: share of the answers for which "score above one half" and "opens as one of the scored openings" say
    the same.
    """

    answers: tuple[Answer, ...]
    agreement: float

    def count(self, expected: Expected, name: str | None) -> int:
        """Answers to probes of one group that open as the list ``name`` (None: as no list)."""
        return sum(answer.expected == expected and answer.kind == name for answer in self.answers)

    def size(self, expected: Expected) -> int:
        """Answers to probes of one group."""
        return sum(answer.expected == expected for answer in self.answers)

    def share(self, expected: Expected, name: str | None) -> float:
        """:meth:`count` as a share of the group, in [0, 1]; NaN for an empty group."""
        size = self.size(expected)
        return self.count(expected, name) / size if size else float("nan")

    @property
    def missed(self) -> tuple[Missed, ...]:
        """Openings that no list holds, the most frequent on probes to refuse first."""
        rows = [(answer.opening, answer.expected) for answer in self.answers if answer.kind is None]
        counts = Counter(rows)
        found = [
            Missed(opening, counts[opening, "refuse"], counts[opening, "comply"])
            for opening in dict.fromkeys(opening for opening, _ in rows)
        ]
        return tuple(sorted(found, key=lambda each: (-each.refuse, -each.comply)))


def calibrate(
    instrument: Instrument,
    model: nn.Module,
    tokenizer: Any,
    probability: Array,
    contrast: Mapping[str, Sequence[str]],
    *,
    per_group: int = 32,
    max_new_tokens: int = 12,
    system: str | None = None,
    template: Mapping[str, Any] | None = None,
) -> Calibration:
    """Let ``model`` answer up to ``per_group`` probes of each group greedily, and compare with the lists of openings.

    An answer counts for a list when its tokens begin with those of an opening: exactly what is scored, so a refusal
    with a line end before it counts for none, and shows among the missed openings.

    Args:
        probability: probability of the first behaviour, ``[probe]``, from a reading of the same model.
        contrast: lists that are not scored, by name, such as compliances.
        system, template: as the instrument was built with.
    """
    scorer, probes = instrument.scorers[0], instrument.probes.probes
    rows = choose_rows([probe.expected for probe in probes], per_group)
    prompt = chat_prompt(tokenizer, probes[0].text, system=system, template=template)
    lead = answer_lead(tokenizer, probes[0].text, system=system, template=template)
    encode = response_encoder(tokenizer, prompt, lead)
    lists = {scorer.name: scorer.openings, **contrast}
    paths = {name: [tuple(encode(text)) for text in openings] for name, openings in lists.items()}
    # An opening is recognised by all of its tokens, so as many are needed as the longest one has.
    length = max(max_new_tokens, *(len(path) for each in paths.values() for path in each))
    tokens = greedy_tokens(model, instrument.batches.batches, rows, length, stop_tokens(model, tokenizer))
    answers = tuple(
        Answer(
            probe=row,
            expected=probes[row].expected,
            text=tokenizer.decode(tokens[row], skip_special_tokens=True),
            kind=find_list(tokens[row], paths),
        )
        for row in rows
    )
    same = [(probability[answer.probe] > 0.5) == (answer.kind == scorer.name) for answer in answers]
    return Calibration(answers, float(np.mean(same)))


def choose_rows(expected: Sequence[Expected], per_group: int) -> list[int]:
    """Up to ``per_group`` probes of each group, evenly spaced in their order, so that every category has its share."""
    if per_group < 1:
        raise ValueError(f"per_group must be at least 1, got {per_group}.")
    chosen: list[int] = []
    for name in ("refuse", "comply"):
        members = [row for row, each in enumerate(expected) if each == name]
        places = np.linspace(0, len(members) - 1, min(per_group, len(members))).round().astype(int)
        chosen += [members[place] for place in places]
    return sorted(chosen)


def find_list(tokens: Sequence[int], paths: Paths) -> str | None:
    """The name of the list that holds the opening of ``tokens``; None if none does. Lists do not overlap."""
    for name, openings in paths.items():
        if any(tuple(tokens[: len(path)]) == path for path in openings):
            return name
    return None


def stop_tokens(model: nn.Module, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the tokenizer and by the model's generation settings."""
    settings = getattr(unwrap(model), "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return {int(token) for token in [*found, tokenizer.eos_token_id] if token is not None}


def greedy_tokens(
    model: nn.Module, batches: Sequence[ProbeBatch], rows: Sequence[int], length: int, stop: set[int]
) -> dict[int, list[int]]:
    """The first ``length`` tokens of the most likely answer to each probe of ``rows``, cut before a stop token.

    The prompt stands in the same columns as in a reading, so both see the same numbers. Leaves no trace in the model.
    """
    wanted, answers = set(rows), {}
    with measuring(model):
        device = next(model.parameters()).device
        for batch in batches:
            keep = [k for k, row in enumerate(batch.index.tolist()) if row in wanted]
            if keep:
                tokens = _continue(model, batch.to(device), torch.tensor(keep, device=device), length)
                answers.update({int(batch.index[k]): _until(line, stop) for k, line in zip(keep, tokens, strict=True)})
    return answers


def _continue(model: Any, batch: ProbeBatch, keep: Tensor, length: int) -> NDArray[np.int64]:
    """Greedy tokens ``[row, length]`` for the rows ``keep`` of a batch."""
    end = batch.width + 1
    mask = batch.attends[keep, 0, batch.width, :end].long()
    tokens, positions, cache = batch.input_ids[keep, :end], batch.position_ids[keep, :end], None
    found = []
    for _ in range(length):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        found.append(tokens)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    result: NDArray[np.int64] = torch.cat(found, dim=1).cpu().numpy()
    return result


def _until(tokens: NDArray[np.int64], stop: set[int]) -> list[int]:
    line = tokens.tolist()
    return line[: next((k for k, token in enumerate(line) if token in stop), len(line))]
