"""What is asked: the probe set. Data, not code: loaded, checked, hashed; two runs compare only if the hashes match."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from smda_callbacks.records import Expected, Probe, probe_hash


class ProbeError(ValueError):
    """A probe set that cannot be used."""


@dataclass(frozen=True)
class Columns:
    """How the columns of a file become a probe.

    ``label`` maps to ``expected`` through ``refuse_labels`` (any other value means comply); without a label column
    every row gets ``expected``.
    """

    text: str = "text"
    category: str | None = "category"
    label: str | None = "expected"
    refuse_labels: tuple[str, ...] = ("refuse", "unsafe", "harmful", "1", "true")
    expected: Expected = "refuse"
    id: str | None = "id"


#: Public prompt sets by name: their column layout.
FORMATS: dict[str, Columns] = {
    "smda": Columns(),
    "xstest": Columns(text="prompt", category="type", label="label", refuse_labels=("unsafe",)),
    "jailbreakbench": Columns(text="Goal", category="Category", label=None, id=None),
    "advbench": Columns(text="goal", category=None, label=None, id=None),
    "strongreject": Columns(text="forbidden_prompt", category="category", label=None, id=None),
    "instructions": Columns(text="instruction", category=None, label=None, id=None, expected="comply"),
}


@dataclass(frozen=True)
class ProbeSet:
    """A checked set of probes, in a fixed order."""

    probes: tuple[Probe, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """Category names in the order of first appearance."""
        return tuple(dict.fromkeys(probe.category for probe in self.probes))

    @property
    def groups(self) -> NDArray[np.int64]:
        """Category number of each probe, ``[probe]``."""
        number = {name: index for index, name in enumerate(self.categories)}
        return np.array([number[probe.category] for probe in self.probes], dtype=np.int64)

    @property
    def hash(self) -> str:
        """Content hash over ids, texts, categories and expectations, in order."""
        return probe_hash(self.probes)

    def __len__(self) -> int:
        return len(self.probes)


def default_probes() -> ProbeSet:
    """The probe set that ships with the library."""
    with resources.as_file(resources.files("smda_callbacks") / "data" / "probes.jsonl") as path:
        return check_probes(load_rows(path))


def load_rows(
    source: str | Path, *, format: str = "smda", columns: Columns | None = None, category: str | None = None
) -> list[Probe]:
    """Read probes from a JSONL, JSON or CSV file, or from a data set of the ``datasets`` library (``name[:split]``).

    Args:
        source: a file, a folder written by ``Dataset.save_to_disk``, or a data set id.
        format: a key of :data:`FORMATS`; ``columns`` overrides it.
        category: the category of rows that have none; default: the file's stem.

    Raises:
        ProbeError: unknown format, missing file or column, empty text, or an unknown ``expected``.
    """
    if columns is None:
        if format not in FORMATS:
            raise ProbeError(f"unknown probe format {format!r}. Allowed: {', '.join(FORMATS)}, or name the columns.")
        columns = FORMATS[format]
    rows = list(_read_table(source))
    if not rows:
        raise ProbeError(f"probe source {str(source)!r} has no rows. Next step: check the file.")
    stem = Path(str(source)).stem
    return [_probe(row, n, stem, columns, category or stem) for n, row in enumerate(rows, start=1)]


def check_probes(probes: Iterable[Probe]) -> ProbeSet:
    """Refuse a set that cannot be measured: empty, duplicated, or without both groups.

    Raises:
        ProbeError: says which probes, and what to do.
    """
    kept = tuple(probes)
    if not kept:
        raise ProbeError("the probe set is empty. Next step: name at least one source, or use the default set.")
    for field in ("id", "text"):
        counts = Counter(getattr(probe, field) for probe in kept)
        twice = [value for value, count in counts.items() if count > 1]
        if twice:
            shown = "; ".join(repr(value[:60]) for value in twice[:3])
            raise ProbeError(f"{len(twice)} probes have the same {field}: {shown}. Next step: remove the duplicates.")
    mixed = [name for name, wanted in _expectations(kept).items() if len(wanted) > 1]
    if mixed:
        raise ProbeError(
            f"category {mixed[0]!r} holds probes to refuse and probes to comply with. Means over it would say nothing. "
            "Next step: give the two kinds different categories."
        )
    missing = {"refuse", "comply"} - {probe.expected for probe in kept}
    if missing:
        wanted = "refuse" if "refuse" in missing else "comply with"
        raise ProbeError(
            f"the probe set has no probe that the model should {wanted}. Both groups are needed, to tell refusing what "
            "it should from refusing everything. Next step: add a source, for example a file of "
            "ordinary instructions with format instructions (expected: comply)."
        )
    return ProbeSet(kept)


def _expectations(probes: Iterable[Probe]) -> dict[str, set[str]]:
    wanted: dict[str, set[str]] = {}
    for probe in probes:
        wanted.setdefault(probe.category, set()).add(probe.expected)
    return wanted


def _probe(row: Mapping[str, Any], number: int, stem: str, columns: Columns, category: str) -> Probe:
    if not isinstance(row, Mapping):
        raise ProbeError(f"row {number} of {stem} is {type(row).__name__}; a row must map column names to values.")
    if columns.text not in row:
        raise ProbeError(
            f"row {number} of {stem} has no column {columns.text!r}. Its columns: {', '.join(map(str, row))}. "
            "Next step: name the text column."
        )
    text = str(row[columns.text] or "").strip()
    if not text:
        raise ProbeError(f"row {number} of {stem} has an empty text. Next step: remove or fill it.")
    value = row.get(columns.category) if columns.category else None
    identity = row.get(columns.id) if columns.id else None
    return Probe(
        id=str(identity) if identity not in (None, "") else f"{stem}-{number:04d}",
        text=text,
        category=str(value) if value not in (None, "") else category,
        expected=_expected(row, number, stem, columns),
    )


def _expected(row: Mapping[str, Any], number: int, stem: str, columns: Columns) -> Expected:
    if columns.label is None or row.get(columns.label) in (None, ""):
        return columns.expected
    value = str(row[columns.label]).strip().lower()
    if columns.label == "expected" and value not in get_args(Expected):
        raise ProbeError(f"row {number} of {stem}: expected is {value!r}. Allowed: {', '.join(get_args(Expected))}.")
    return "refuse" if value in columns.refuse_labels else "comply"


def _read_table(source: str | Path) -> Iterable[Mapping[str, Any]]:
    path = Path(source)
    if path.is_file():
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a mark first
                return list(csv.DictReader(file))
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = _parsed(text, path.name)
            return rows if isinstance(rows, list) else [rows]
        if path.suffix == ".jsonl":
            lines = enumerate(text.split("\n"), start=1)
            return [_parsed(line, f"line {number} of {path.name}") for number, line in lines if line.strip()]
        raise ProbeError(f"probe file {path.name!r} has an unknown ending. Allowed: .jsonl, .json, .csv.")
    if path.suffix in {".csv", ".json", ".jsonl"}:
        raise ProbeError(f"probe file {str(source)!r} does not exist. Next step: check the path.")
    return _read_dataset(str(source))


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ProbeError(f"{where} is no valid JSON: {error}. Next step: mend it.") from error


def _read_dataset(name: str) -> Sequence[Mapping[str, Any]]:
    import datasets  # only when a data set is named: the import is slow

    if Path(name).is_dir():
        return list(datasets.load_from_disk(name))
    repository, _, split = name.partition(":")
    try:
        return list(datasets.load_dataset(repository, split=split or "train"))
    except Exception as error:
        raise ProbeError(
            f"probe source {name!r} is neither a file nor a data set that can be loaded ({error}). Next step: give a "
            ".jsonl, .json or .csv file, or a data set id such as owner/name:split."
        ) from error


def sample_per_category(probes: Sequence[Probe], most: int, seed: int = 0) -> list[Probe]:
    """At most ``most`` probes of each category, drawn with a fixed seed, in their original order."""
    draw = np.random.default_rng(seed)
    keep: set[int] = set()
    for name in dict.fromkeys(probe.category for probe in probes):
        members = [index for index, probe in enumerate(probes) if probe.category == name]
        keep.update(draw.permutation(members)[:most].tolist())
    return [probe for index, probe in enumerate(probes) if index in keep]


def with_expected(probes: Iterable[Probe], expected: Expected) -> list[Probe]:
    """The same probes with another expectation."""
    return [replace(probe, expected=expected) for probe in probes]
