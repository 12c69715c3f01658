"""The placeholders in the names of metrics, and what they stand for in a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from string import Formatter

from smda_callbacks.records import PATHWAYS, ROWS, RunStart
from smda_callbacks.sinks import metric_values as values
from smda_callbacks.sinks.pair_values import LEDGER


@dataclass(frozen=True)
class Axis:
    """A placeholder of the names: its values in a run, and what it stands for."""

    of_run: Callable[[RunStart], Sequence[str]]
    meaning: str


AXES: Mapping[str, Axis] = {
    "behaviour": Axis(lambda start: start.policy.behaviours, "a scored behaviour, such as `refusal`"),
    "group": Axis(lambda start: values.groups(start.probes), "the probes that should be met with `refuse` or `comply`"),
    "category": Axis(lambda start: values.categories(start.probes), "a category of probes"),
    "part": Axis(lambda start: PATHWAYS, f"{', '.join(f'`{part}`' for part in PATHWAYS)}"),
    "row": Axis(lambda start: ROWS, f"{', '.join(f'`{row}`' for row in ROWS)}"),
    "line": Axis(
        lambda start: LEDGER,
        "`pairs` (shares of the window's own), `later` (shares of earlier windows' pairs, through momentum), "
        "`momentum`, `decay`, `unexplained`; these sum to `measured`",
    ),
    "further": Axis(
        lambda start: ["", *(f"_{name}" for name in start.policy.behaviours[1:])],
        "empty for the first behaviour, `_` and its name for every further one",
    ),
}


def axes_of(pattern: str) -> list[str]:
    """Names of the axes in a pattern."""
    return [field for _, field, _, _ in Formatter().parse(pattern) if field is not None]


def names_of(pattern: str, start: RunStart) -> list[str]:
    """The names that a pattern stands for in a run, the last axis fastest."""
    axes = axes_of(pattern)
    choices = product(*(slugs(AXES[axis].of_run(start)) for axis in axes))
    return [pattern.format_map(dict(zip(axes, choice, strict=True))) for choice in choices]


def slugs(names: Iterable[str]) -> list[str]:
    """Names fit for a metric's name, all different, in their order."""
    found: list[str] = []
    for name in names:
        slug = base = re.sub(r"[^\w-]", "_", name)
        count = 2
        while slug in found:
            slug, count = f"{base}_{count}", count + 1
        found.append(slug)
    return found
