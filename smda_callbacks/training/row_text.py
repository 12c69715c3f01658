"""Rows of a data set in words: their short columns, and prompt and answer as a reader wants to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Columns that are shown beside a pair hold texts, whole numbers or yes/no of at most this many characters.
COLUMN_LENGTH = 40
#: How many such columns.
COLUMNS = 8
_SAMPLE = 100
_SHOWN_ROWS = 16

_CHATS = ("messages", "conversations")
#: Columns that are the example itself, or what a trainer made of it.
_CONTENT = {
    *(*_CHATS, "prompt", "completion", "chosen", "rejected", "text", "tools", "chat_template_kwargs"),
    *("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "seq_lengths", "position_ids"),
}


class RowText:
    """Describes rows of one data set.

    Args:
        dataset: an Arrow data set with the user's columns, or with the tokens alone.
        tokenizer: has ``decode`` and ``eos_token``; the trainer ends texts with the latter.
        text_field: the column of plain texts.
        id_column: shown first, whatever its length.
    """

    def __init__(self, dataset: Any, tokenizer: Any, *, text_field: str = "text", id_column: str | None = None) -> None:
        self.tokenizer, self.text_field, self.id_column = tokenizer, text_field, id_column
        names = list(dataset.column_names)
        self.short = self._short_columns(dataset, names)
        shown = [each for each in (*_CHATS, "prompt", "completion", text_field, "input_ids") if each in names]
        self._content = dataset.select_columns(list(dict.fromkeys(shown))).with_format(None)
        self._columns = dataset.select_columns(self.short).with_format(None)
        self._features = dict(getattr(dataset, "features", None) or {})

    def columns(self, places: Sequence[int]) -> dict[str, str]:
        """Short columns of the rows at ``places``; where rows differ, their values side by side."""
        found: dict[str, dict[str, None]] = {name: {} for name in self.short}
        for place in places[:_SHOWN_ROWS] if self.short else ():
            row = self._columns[int(place)]
            for name in self.short:
                shown = self._shown(name, row[name])
                if shown is not None and (len(shown) <= COLUMN_LENGTH or name == self.id_column):
                    found[name][shown] = None
        return {name: " | ".join(values) for name, values in found.items() if values}

    def text(self, place: int, start: int = 0, length: int | None = None) -> str:
        """Row ``place``, read from its texts; its tokens ``[start, start + length)`` where there are none."""
        row = self._content[int(place)]
        told = row_text(row, self.text_field, getattr(self.tokenizer, "eos_token", None) or "")
        if told is not None:
            return told
        tokens = row.get("input_ids") or []
        return decode(self.tokenizer, tokens[start : None if length is None else start + length])

    def _short_columns(self, dataset: Any, names: list[str]) -> list[str]:
        features = dict(getattr(dataset, "features", None) or {})
        likely = [
            each
            for each in names
            if each not in _CONTENT | {self.text_field, self.id_column} and _is_plain(features.get(each))
        ]
        sample = dataset.select(range(min(_SAMPLE, len(dataset))))
        values = sample.select_columns(likely).with_format(None)[:] if likely else {}
        short = [each for each in likely if all(len(str(value)) <= COLUMN_LENGTH for value in values[each])]
        return [*([self.id_column] if self.id_column in names else []), *short][:COLUMNS]

    def _shown(self, name: str, value: Any) -> str | None:
        if value is None:
            return None
        named = getattr(self._features.get(name), "int2str", None)  # a class label
        return str(named(value)) if callable(named) and value >= 0 else str(value)


def decode(tokenizer: Any, tokens: Any) -> str:
    """Tokens as text, special tokens shown; as numbers where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(str(int(each)) for each in tokens)
    return str(tokenizer.decode([int(each) for each in tokens]))


def cut_text(text: str, limit: int) -> str:
    """``text`` in at most ``limit`` characters."""
    return text if len(text) <= limit else text[: max(0, limit - 1)] + "…"


def row_text(row: Mapping[str, Any], text_field: str, eos: str = "") -> str | None:
    """Prompt and answer of a row, an arrow before what the model is to say; None where it holds no texts."""
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return f"{prompt}\n→ {_without(completion, eos).lstrip()}"
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat([*prompt, *completion])
    for name in _CHATS:
        if isinstance(row.get(name), list):
            return _chat(row[name])
    text = row.get(text_field)
    return _without(text, eos) if isinstance(text, str) else None


def _chat(messages: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for each in messages:
        role = each.get("role") or each.get("from")
        arrow = "→ " if role in ("assistant", "gpt") else ""
        content = _content_text(each.get("content") or each.get("value") or "")
        lines.append(arrow + (content.lstrip() if arrow else content))
    return "\n".join(lines)


def _content_text(content: Any) -> str:
    """The text of a message whose content is a text, or a list of parts of which some are text."""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if isinstance(part, Mapping) and part.get("text"))


def _without(text: str, ending: str) -> str:
    return text.removesuffix(ending) if ending else text


def _is_plain(feature: Any) -> bool:
    """Whether a column holds texts, whole numbers or yes/no."""
    kind = str(getattr(feature, "dtype", ""))
    return kind in ("string", "large_string", "bool") or kind.startswith(("int", "uint"))
