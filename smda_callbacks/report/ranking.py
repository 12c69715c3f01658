"""Pairs in order of what they did to one functional, as plain rows for a table or a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import Array, PolicyRecord
from smda_callbacks.sinks.pair_table import PairTable, by_feature, column

Quantity = Literal["effect", "share", "influence"]


def ranked(
    table: PairTable, policy: PolicyRecord, name: str, *, quantity: Quantity = "effect", top: int | None = None
) -> list[dict[str, Any]]:
    """The ``top`` pairs (all if None) by the size of their ``quantity`` of the functional ``name``, largest first.

    ``influence`` is that of ``smda rescore``, see :func:`~smda_callbacks.report.rescored.with_influence`.

    Pairs that were in no attributed window are left out. A row has ``pair`` (number in the run), ``rows`` (numbers in
    the user's data set), ``level``, ``columns`` (of the data set; each again under its own name where that is none of
    the row's), ``effect``, ``share``, ``influence``, ``floor`` (noise floor of the effect), ``above_noise`` (whether
    the effect is more than twice it), ``spread`` (over an audit's repeats), ``shift_x`` (``magnitude``, ``gating``),
    ``shift_y``, ``interference``, ``flagged``, ``windows``, ``text``; None where something is not known.

    ``shift_x`` and ``shift_y`` are in ``quantity``: where ``name`` is of a feature, on its coefficient, with the sign;
    else L2 norms over all attributed features. Raises ValueError for an unknown functional, naming the nearest, and for
    influences that were not computed.
    """
    place = column(table, name)
    known = table.known & ~np.isnan(_influence(table, place)) if quantity == "influence" else table.known
    values = np.nan_to_num(getattr(table, quantity))
    order = [int(row) for row in np.argsort(-np.abs(values[:, place]), kind="stable") if known[row]]
    shifts = _shifts(table, policy, name, values)
    return [_row(table, row, place, shifts) for row in order[:top]]


def rescored(table: PairTable) -> list[str]:
    """Functionals whose influences on the end of the run are known."""
    if table.influence is None:
        return []
    missing = [bool(np.isnan(each).all()) for each in table.influence.T]
    return [name for name, gone in zip(table.functionals, missing, strict=True) if not gone]


def _influence(table: PairTable, place: int) -> Array:
    name, known = table.functionals[place], rescored(table)
    if table.influence is None or name not in known:
        which = f"; those on {', '.join(known)} are" if known else ": the run has not been rescored"
        raise ValueError(
            f"the influences on {name} at the end of the run are not known{which}. Next step: smda rescore RUN "
            f"--target {name}"
        )
    found: Array = table.influence[:, place]
    return found


def unit_of(table: PairTable, policy: PolicyRecord, name: str) -> str:
    """Unit of a functional; that of a coefficient is per standard deviation of its feature."""
    if name.startswith("feature:"):
        return f"{policy.target} per standard deviation"
    head, _, last = name.rpartition(":")
    return last if last in ("logit", "probability") and head in table.functionals else policy.target


def unexplained_part(table: PairTable, name: str) -> float | None:
    """What is unexplained of a functional's change over the attributed windows, relative to it; None if it is 0."""
    place = column(table, name)
    measured = float(table.lines["measured"][place])
    return abs(float(table.lines["unexplained"][place])) / abs(measured) if measured else None


def _shifts(table: PairTable, policy: PolicyRecord, name: str, values: Array) -> Mapping[str, Array]:
    """Part of PATHWAYS -> what each pair did through it, ``[pair]``."""
    parts = by_feature(table, values, _behaviour(policy.behaviours, name))
    if not name.startswith("feature:"):
        return {part: np.linalg.norm(each, axis=1) for part, each in parts.items()}
    place = table.features.tolist().index(int(name.split(":")[1]))
    return {part: each[:, place] for part, each in parts.items()}


def _behaviour(behaviours: Sequence[str], name: str) -> str:
    """The behaviour that a functional is about; empty for the first."""
    if name.startswith("feature:"):
        return name.split(":", 3)[3] if name.count(":") > 2 else ""
    about = [each for each in behaviours if name.startswith(f"{each}:")]
    best = max(about, key=len, default=behaviours[0])
    return "" if best == behaviours[0] else best


def _row(table: PairTable, row: int, place: int, shifts: Mapping[str, Array]) -> dict[str, Any]:
    pair, effect = table.pairs[row], float(table.effect[row, place])
    floor = _known(table.floor, row, place)
    found: dict[str, Any] = {
        "pair": pair.id,
        "rows": list(pair.rows),
        "level": pair.level,
        "columns": dict(pair.columns),
        "effect": effect,
        "share": float(table.share[row, place]),
        "influence": _known(table.influence, row, place),
        "floor": floor,
        "above_noise": None if floor is None else bool(above_floor(effect, floor)),
        "spread": _known(table.spread, row, place),
        "shift_x": {name: _part(shifts, f"shift_x_{name}", row) for name in ("magnitude", "gating")},
        "shift_y": _part(shifts, "shift_y", row),
        "interference": _finite(table.interference[row]),
        "flagged": bool(table.flagged[row]),
        "windows": int(table.windows[row]),
        "text": pair.text,
    }
    return {**pair.columns, **found}


def _part(shifts: Mapping[str, Array], part: str, row: int) -> float | None:
    return float(shifts[part][row]) if part in shifts else None


def _known(values: Array | None, row: int, place: int) -> float | None:
    return None if values is None else _finite(values[row, place])


def _finite(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
