"""Training pairs of a file as tokens, as TRL's SFTTrainer makes them: chat template, loss on the completion."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from smda_callbacks.records import Pair

LossOn = Literal["completion", "all"]

#: Other columns are shown beside a pair when they are text (or a number) of at most this many characters.
COLUMN_LENGTH = 80

_ALLOWED = (
    "Allowed: prompt and completion, both texts or both lists of messages (role, content); or messages, which end with "
    "the assistant's answer. Next step: rename the columns, or leave the row out"
)


class PairsError(ValueError):
    """A file of pairs that cannot be audited."""


@dataclass(frozen=True)
class AuditPair:
    """A pair as tokens. ``trained`` marks those that the loss is taken on; ``prompt_ids`` end where the answer begins.

    ``cut``: whether tokens beyond the maximal length were left out.
    """

    pair: Pair
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    prompt_ids: tuple[int, ...]
    cut: bool = False


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, blank lines left out.

    Raises:
        PairsError: no such file, no rows, or a line that is no JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise PairsError(f"the file of pairs {str(path)!r} does not exist. Next step: check the path; JSONL is read.")
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            rows.append(_parsed(line, f"line {number} of {file.name}"))
    if not rows:
        raise PairsError(f"{file.name} holds no pair. Next step: give a JSONL file with one pair a line.")
    return rows


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PairsError(f"{where} is no valid JSON: {error}. Next step: mend it.") from error
    if not isinstance(row, dict):
        raise PairsError(f"{where} is {type(row).__name__}, not an object with named columns. {_ALLOWED}.")
    return row


def as_chat(row: Mapping[str, Any], number: int) -> tuple[list[Any], list[Any]]:
    """Messages of the prompt and of the completion; texts become one message each.

    Raises:
        PairsError: other columns, other types, or no answer at the end; names row ``number`` (from 0).
    """
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion}]
    elif "messages" in row and isinstance(row["messages"], list):
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    else:
        raise PairsError(f"row {number} has the columns {', '.join(map(str, row)) or 'none'}. {_ALLOWED}.")
    if not (_is_chat(prompt) and _is_chat(completion)):
        raise PairsError(f"row {number}: its prompt or completion is neither text nor a list of messages. {_ALLOWED}.")
    if completion[-1]["role"] != "assistant":
        raise PairsError(f"row {number} ends with a message of role {completion[-1]['role']!r}. {_ALLOWED}.")
    return prompt, completion


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, dict) and isinstance(each.get("content"), str) and "role" in each for each in value)
    )


def tokenize_pairs(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_length: int = 1024,
    loss_on: LossOn = "completion",
    template: Mapping[str, Any] | None = None,
    text: bool = True,
) -> tuple[AuditPair, ...]:
    """The pairs in the order of the file; rows of equal tokens are one pair with several row numbers.

    Args:
        max_length: what is longer is cut at its end, in tokens.
        loss_on: ``completion``: from where the answer begins, the end of turn included; ``all``: every token.
        template: extra arguments of the chat template.
        text: keep prompt and completion as text; False leaves them out of every record.

    Raises:
        PairsError: a row that is no pair, that the template refuses, or of which no trained token is left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PairsError(
            "the tokenizer has no chat template, so a pair cannot be put into words as the model sees it. Next step: "
            "use a chat model, or set tokenizer.chat_template."
        )
    found: dict[tuple[tuple[int, ...], tuple[bool, ...]], AuditPair] = {}
    for number, row in enumerate(rows):
        made = _tokenized(row, number, tokenizer, max_length, loss_on, dict(template or {}), text)
        key = (made.input_ids, made.trained)
        first = found.setdefault(key, replace(made, pair=replace(made.pair, id=len(found))))
        if first.pair.rows != (number,):
            found[key] = replace(first, pair=replace(first.pair, rows=(*first.pair.rows, number)))
    return tuple(found.values())


def _tokenized(
    row: Mapping[str, Any],
    number: int,
    tokenizer: Any,
    max_length: int,
    loss_on: LossOn,
    template: Mapping[str, Any],
    text: bool,
) -> AuditPair:
    prompt, completion = as_chat(row, number)
    head = _ids(tokenizer, prompt, number, add_generation_prompt=True, **template)
    whole = _ids(tokenizer, prompt + completion, number, **template)
    # The template may render a prompt alone differently: the completion starts where the two part, as in TRL.
    begin = next((k for k, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    ids = whole[:max_length]
    trained = tuple(loss_on == "all" or k >= begin for k in range(len(ids)))
    if not any(trained[1:]):
        raise PairsError(
            f"row {number}: no token of its completion is left within audit.max_length = {max_length} (its prompt has "
            f"{begin}). Next step: raise audit.max_length, or leave the row out."
        )
    shown = f"{prompt[-1]['content']}\n→ {completion[-1]['content']}" if text else None
    pair = Pair(number, (number,), "row", _columns(row), shown, len(ids))
    return AuditPair(pair, tuple(ids), trained, tuple(head[:max_length]), len(whole) > max_length)


def _ids(tokenizer: Any, messages: list[Any], number: int, **options: Any) -> list[int]:
    from jinja2.exceptions import TemplateError  # comes with transformers' chat templates

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise PairsError(
            f"row {number}: the model's chat template refuses it ({error}). Next step: bring its messages into the "
            "order that the model knows, or leave the row out."
        ) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _columns(row: Mapping[str, Any]) -> dict[str, str]:
    """The short columns beside the texts, such as kind and category."""
    others = {str(key): value for key, value in row.items() if key not in ("prompt", "completion", "messages")}
    shown = {key: str(value) for key, value in others.items() if isinstance(value, str | bool | int | float)}
    return {key: value for key, value in shown.items() if len(value) <= COLUMN_LENGTH}


def pairs_hash(pairs: Iterable[AuditPair]) -> str:
    """SHA-256 over tokens, loss masks, row numbers and columns, in order."""
    digest = hashlib.sha256()
    for each in pairs:
        pair = each.pair
        value = [each.input_ids, each.trained, each.prompt_ids, pair.rows, sorted(pair.columns.items())]
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def check_lengths(pairs: Sequence[AuditPair], context: int | None) -> None:
    """Refuse pairs that are longer than the model's ``context``, in tokens. Raises PairsError."""
    longest = max((pair.pair for pair in pairs), key=lambda pair: pair.tokens)
    if context is not None and longest.tokens > context:
        raise PairsError(
            f"the pair of row {longest.rows[0]} has {longest.tokens} tokens, but the model's context is {context}. "
            f"Next step: set audit.max_length to {context} or less."
        )
