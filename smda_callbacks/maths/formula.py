"""A fitted policy as a formula that a person can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MINUS = "\u2212"
_TARGETS = {"probability": "P({})", "logit": "logit P({})"}


def format_policy(
    features: ArrayLike,
    coef: ArrayLike,
    intercept: float,
    scale: ArrayLike,
    *,
    behaviour: str,
    target: Literal["probability", "logit"],
    lam: float,
    r2: float,
    r2_loo: float,
    edf: float,
    n: int,
    labels: Mapping[int, str] | None = None,
    top: int = 12,
    x_max: ArrayLike | None = None,
    width: int = 100,
) -> str:
    """One behaviour's policy as text of several lines, largest coefficients first.

    ``features`` (SAE indices), ``coef`` (behaviour units per unit of z = x / scale) and ``scale`` are ``[feature]``.
    ``labels`` names features by SAE index. The ``top`` largest terms are written out; the rest are counted, with a
    bound on their sum: on the probes where ``x_max [feature]`` (largest activation of each feature) is given, else for
    |z| <= 1. Features with a coefficient of exactly 0 are left out. Lines are at most ``width`` characters unless a
    single term is longer.

    Raises ``ValueError`` for lengths that do not match, an unknown target, and ``top`` < 1.
    """
    names, weights, sizes = (np.asarray(a) for a in (features, coef, scale))
    reach = np.ones(names.shape) if x_max is None else np.abs(np.asarray(x_max, dtype=np.float64))
    _check({"features": names, "coef": weights, "scale": sizes, "x_max": reach}, target, top)
    order = np.argsort(-np.abs(weights), kind="stable")
    order = order[weights[order] != 0]
    shown, rest = order[:top], order[top:]
    terms = [_term(int(names[j]), float(weights[j]), labels or {}) for j in shown]
    if rest.size:
        largest = reach if x_max is None else reach / sizes
        bound = float(np.abs(weights[rest]) @ largest[rest])
        noun, where = ("term" if rest.size == 1 else "terms"), ("for |z| <= 1" if x_max is None else "on the probes")
        terms.append(f"(+ {rest.size} smaller {noun}, |sum| <= {_rounded_up(bound)} {where})")
    lines = _wrap(f"{_TARGETS[target].format(_plain(behaviour))} = {_signed(float(intercept))}", terms, " ", width)
    if shown.size:
        divisors = [f"{names[j]}: {sizes[j]:.3g}" for j in shown]
        lines += _wrap("with z[j] = activation / scale[j], scales", divisors, ", ", width)
    lines.append(f"λ = {lam:g}, R² = {_share(r2)}, leave-one-out R² = {_share(r2_loo)}, edf = {edf:.1f}, n = {n}")
    return "\n".join(lines)


def _term(feature: int, weight: float, labels: Mapping[int, str]) -> str:
    label = _plain(labels.get(feature, ""))
    name = f"{feature} '{label}'" if label else str(feature)
    return f"{_MINUS if weight < 0 else '+'} {_size(weight)}·z[{name}]"


def _signed(value: float) -> str:
    return (_MINUS if value < 0 else "") + _size(value)


def _size(value: float) -> str:
    """Two decimals where that shows two digits, else two significant ones."""
    return f"{abs(value):.2f}" if abs(value) >= 0.095 or value == 0 else f"{abs(value):.2g}"


def _rounded_up(value: float) -> str:
    """Two significant digits, never below the value: it is printed as a bound."""
    if not 0 < value < math.inf:
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"


def _share(value: float) -> str:
    return "undefined (no variance)" if np.isnan(value) else _MINUS * (value < 0) + f"{abs(value):.2f}"


def _plain(text: str, longest: int = 40) -> str:
    """One line of printable characters: labels come from files and may hold anything."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else line[: longest - 1].rstrip() + "…"


def _wrap(head: str, parts: Sequence[str], joint: str, width: int) -> list[str]:
    """``head``, then the parts with ``joint`` between them; lines break between parts and go on indented."""
    lines = [head]
    for number, part in enumerate(parts):
        before = " " if number == 0 else joint
        after = joint.rstrip() if number + 1 < len(parts) else ""
        if len(lines[-1] + before + part + after) <= width:
            lines[-1] += before + part
        else:
            lines[-1] += before.rstrip()
            lines.append("    " + part)
    return lines


def _check(columns: Mapping[str, NDArray[Any]], target: str, top: int) -> None:
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) != 1 or columns["coef"].ndim != 1:
        raise ValueError(
            f"features, coef, scale and x_max must be 1-D and of one length, got {shapes}. Pass one behaviour."
        )
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(_TARGETS)}, got {target!r}.")
    if top < 1:
        raise ValueError(f"top must be at least 1, the number of terms to write out, got {top}.")
