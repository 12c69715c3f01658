"""What groups of training pairs did to every feature on average, whether they differ, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from smda_callbacks.records import Array
from smda_callbacks.report import figures as f
from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.report.figures_policy import COEF_UNIT
from smda_callbacks.report.group_test import Groups, GroupTest, compare_groups, groups_of
from smda_callbacks.report.pair_ranking import plus
from smda_callbacks.report.pairs_data import PairData
from smda_callbacks.report.shifts import feature_name, shortened

#: Corrected p below which groups count as different.
LEVEL = 0.05


@dataclass(frozen=True)
class GroupShifts:
    """Mean effects of groups of pairs: part of PATHWAYS -> ``[group, feature]``.

    ``error``: standard errors of the means, ``floor``: their noise floors where known, both as ``mean``. ``tests`` has
    one column per part and feature, parts one after another.
    """

    groups: Groups
    features: NDArray[np.int64]  # [feature] SAE indices
    mean: Mapping[str, Array]
    error: Mapping[str, Array]
    floor: Mapping[str, Array] | None
    tests: GroupTest

    def p_holm(self, part: str) -> Array:
        """Corrected p of a part, ``[feature]``."""
        return self._of(part, self.tests.p_holm)

    def p(self, part: str) -> Array:
        """Uncorrected p of a part, ``[feature]``."""
        return self._of(part, self.tests.p)

    def _of(self, part: str, values: Array) -> Array:
        place = list(self.mean).index(part)
        return values[place * len(self.features) : (place + 1) * len(self.features)]

    def above(self, part: str) -> NDArray[np.bool_]:
        """Means beyond the limit of their noise floor, ``[group, feature]``; all where it is not known."""
        if self.floor is None:
            return np.ones(self.mean[part].shape, dtype=bool)
        found: NDArray[np.bool_] = np.abs(self.mean[part]) > TIMES * self.floor[part]
        return found


def group_shifts(pairs: PairData, behaviour: int) -> GroupShifts | None:
    """Groups of the pairs that were trained on in attributed windows; None where no column makes groups.

    None also where no feature is attributed. Pairs of a group are independent: the floor of their mean is the root sum
    square of theirs over their number.
    """
    table = pairs.table
    groups = groups_of(table.pairs, np.flatnonzero(table.windows > 0).tolist())
    parts = pairs.parts(behaviour, table.effect)
    if groups is None or not parts:
        return None
    floors = None if table.floor is None else pairs.parts(behaviour, table.floor)
    return GroupShifts(
        groups,
        table.features,
        {part: _each(groups, lambda rows, v=values: v[rows].mean(axis=0)) for part, values in parts.items()},
        {part: _each(groups, lambda rows, v=values: _error(v[rows])) for part, values in parts.items()},
        floors and {part: _each(groups, lambda rows, v=values: _floor(v[rows])) for part, values in floors.items()},
        compare_groups(np.hstack(list(parts.values())), groups.members),
    )


def _each(groups: Groups, of: Any) -> Array:
    return np.array([of(rows) for rows in groups.members])


def _error(values: Array) -> Array:
    found: Array = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return found


def _floor(values: Array) -> Array:
    found: Array = np.sqrt(np.square(values).sum(axis=0)) / len(values)
    return found


def by_difference(found: GroupShifts) -> list[int]:
    """Places of the features, those in which groups differ most surely first, then by the distance of their means."""
    p = np.min([found.p_holm(part) for part in found.mean], axis=0)
    apart = np.max([np.ptp(mean, axis=0) for mean in found.mean.values()], axis=0)
    order: list[int] = np.lexsort((-apart, p)).tolist()
    return order


def group_bars(data: RunData, found: GroupShifts, features: Sequence[int]) -> go.Figure:
    """Mean effects of the groups on the features at the places ``features``, side by side, a panel per part."""
    names = [f.safe(feature_name(data, int(found.features[j]))) for j in features]
    titles = [f.PART_NAMES[part] for part in found.mean]
    result = make_subplots(rows=1, cols=len(titles), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles)
    for place, part in enumerate(found.mean, start=1):
        for g in range(len(found.groups.names)):
            result.add_trace(_bars(found, part, g, names, features), row=1, col=place)
    bars = len(features) * len(found.groups.names)
    legend = {"orientation": "h", "y": 1.0, "yanchor": "top", "x": 0, "yref": "container", "traceorder": "normal"}
    height = 170 + 13 * bars + 6 * len(features)
    f.style(
        result,
        height=height,
        barmode="group",
        bargap=0.22,
        bargroupgap=0.05,
        legend=legend,
        margin={"t": 66, "l": 8, "r": 12, "b": 8},
    )
    result.update_yaxes(**f.names_axis(names))
    result.update_xaxes(title={"text": "mean effect"}, zeroline=True, tickformat=".2~g", nticks=4)
    result.update_annotations(font={"size": 13, "color": f.INK})
    return result


def _bars(found: GroupShifts, part: str, group: int, names: list[str], features: Sequence[int]) -> go.Bar:
    name = f.safe(f"{shortened(found.groups.names[group], 20)} ({len(found.groups.members[group])})")
    colour, first = f.HIGHLIGHTS[group][0], part == next(iter(found.mean))
    means, errors = found.mean[part][group, list(features)], found.error[part][group, list(features)]
    above = found.above(part)[group, list(features)]
    return go.Bar(
        y=names,
        x=f.values(means),
        orientation="h",
        name=name,
        legendgroup=name,
        showlegend=first,
        marker={"color": colour, "opacity": [1.0 if each else 0.3 for each in above], "line": {"width": 0}},
        error_x={"array": f.values(errors), "color": f.INK, "thickness": 1, "width": 2},
        hovertext=[
            f"<b>{title}</b><br>{name}, {f.PART_NAMES[part]}: {plus(float(mean))} ± {error:.2g} "
            f"{COEF_UNIT}{'' if strong else '<br>not above the noise floor of the mean'}"
            for title, mean, error, strong in zip(names, means, errors, above, strict=True)
        ],
        hoverinfo="text",
    )
