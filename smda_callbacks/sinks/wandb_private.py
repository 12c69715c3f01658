"""What may leave the machine of the texts of probes and pairs, and of the files of a run store that hold them.

``log_text`` rules both alike. Columns of the data set go out where they are labels (:func:`is_label`), like categories
of probes; anything longer counts as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from smda_callbacks.records import Pair, Probe
from smda_callbacks.sinks import files
from smda_callbacks.sinks.codec import dumps
from smda_callbacks.sinks.trajectory import FOLDER as TRAJECTORY

LogText = Literal["none", "hash", "full"]

HASH_DIGITS = 16

#: Instead of ``probes.jsonl``.
PROBES_SHOWN = "probes_shown.jsonl"

_LABEL = re.compile(r"[A-Za-z0-9_.:/+-]{1,40}")


def shown_text(text: str | None, log_text: LogText) -> str | None:
    """What may be sent of a text: None, the first 16 hex digits of its SHA-256, or all of it.

    A hash tells which of a known list of texts it is; it hides the text only from those who do not have it.
    """
    if text is not None and log_text == "hash":
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
    return text if log_text == "full" else None


def is_label(value: str) -> bool:
    """Whether a column's value is one short word of plain letters, digits and signs, such as ``harmful_refused``."""
    return _LABEL.fullmatch(value) is not None


def shown_pair(pair: Pair, log_text: LogText) -> Pair:
    """What may be sent of a pair: its text, and columns that are no labels, as :func:`shown_text`."""
    if log_text == "full":
        return pair
    columns = {name: _shown_value(value, log_text) for name, value in pair.columns.items()}
    shown = {name: value for name, value in columns.items() if value is not None}
    return replace(pair, columns=shown, text=shown_text(pair.text, log_text))


def _shown_value(value: str, log_text: LogText) -> str | None:
    return value if is_label(value) else shown_text(value, log_text)


def shown_files(store: Path, probes: tuple[Probe, ...], log_text: LogText) -> Iterator[tuple[str, Path | bytes]]:
    """Everything in a run store that may be sent: its name, and the file itself or other content in its place.

    Unless all text may be sent, ``probes.jsonl`` is left out and ``probes_shown.jsonl`` put in its place, and the texts
    of pairs in the records of windows and in ``tables/pairs.parquet`` are replaced: by their hash, or by nothing. The
    trajectory, which holds the training data, is never sent.
    """
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if not path.is_file() or path.suffix == files.PART or name.startswith(f"{TRAJECTORY}/"):
            continue
        if log_text == "full":
            yield name, path
        elif path.name != files.PROBES:
            yield name, _shown_file(path, log_text) or path
    if log_text != "full":
        rows = [{**vars(probe), "text": shown_text(probe.text, log_text)} for probe in probes]
        yield PROBES_SHOWN, "".join(f"{dumps(row)}\n" for row in rows).encode()


def _shown_file(path: Path, log_text: LogText) -> bytes | None:
    """Other content for a file that holds texts of pairs; None for any other."""
    if path.parent.name == files.STEPS:
        return _shown_record(path, log_text)
    if path.parent.name == files.TABLES and path.name == "pairs.parquet":
        return _shown_table(path, log_text)
    return None


def _shown_record(path: Path, log_text: LogText) -> bytes | None:
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(path, framework="numpy") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
        if not record.get("pairs_seen"):
            return None
        record["pairs_seen"] = [vars(shown_pair(Pair(**pair), log_text)) for pair in record["pairs_seen"]]
        return bytes(save({name: file.get_tensor(name) for name in file.keys()}, {"record": dumps(record)}))  # noqa: SIM118


def _shown_table(path: Path, log_text: LogText) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    for number, name in enumerate(table.column_names):
        if name == "text" or name.startswith("column_"):
            show = shown_text if name == "text" else _shown_value
            values = [None if value is None else show(value, log_text) for value in table[name].to_pylist()]
            table = table.set_column(number, name, pa.array(values, pa.string()))
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
