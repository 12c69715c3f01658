"""What the sections of the report are made of: the page with its figures, and a section with the runs that have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from smda_callbacks.report import texts
from smda_callbacks.report.data import RunData
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.markup import Html, element, fixed, join
from smda_callbacks.report.shifts import run_reliability, unreliable_parts
from smda_callbacks.report.verdict import warning


@dataclass(frozen=True)
class Page:
    """What the sections are built from, and what they leave behind by key for the page's script."""

    data: RunData
    figures: dict[str, go.Figure] = field(default_factory=dict)
    rankings: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def figure(self, key: str, found: go.Figure, caption: str) -> Html:
        """Keep a figure and return its place in the page."""
        self.figures[key] = found
        return self.place(key, caption)

    def place(self, key: str, caption: str) -> Html:
        """A place for the figure ``key``, as high as it will be."""
        return figure_place(key, self.figures[key], caption)

    def for_behaviours(self, build: Callable[[Page, int], Html | None]) -> Html:
        """What ``build`` makes for every behaviour; one is shown at a time."""
        built = ((m, build(self, m)) for m in range(len(self.data.behaviours)))
        return join(element("div", each, class_="behaviour", data_behaviour=m, hidden=m > 0) for m, each in built)


@dataclass(frozen=True)
class Section:
    """``name`` is its anchor, ``short`` stands in the bar on top, ``applies`` says which runs have it."""

    name: str
    short: str
    title: str
    build: Callable[[Page], Html]
    applies: Callable[[RunData], bool] = lambda data: True


def say(text: str, **values: object) -> Html:
    """A sentence or two on how to read what follows."""
    return element("p", text.format(**values), class_="say")


def feature_warning(data: RunData) -> Html | None:
    """What must stand beside every view of features where the SAE does not follow the change."""
    text = warning(data)
    return None if text is None else element("p", text, class_="warning")


def figure_place(key: str, found: go.Figure, caption: str) -> Html:
    """The place in a page where the figure ``key`` will be drawn."""
    height = f"min-height:{found.layout.height}px"
    box = element("div", class_="figure", data_figure=key, style=height, role="img", aria_label=caption)
    return element("figure", box, element("figcaption", caption))


def chooser(
    figures: Mapping[str, go.Figure], prefix: str, selects: Mapping[str, Sequence[tuple[object, str]]], caption: str
) -> Html:
    """Selects by label, of (value, title), over figures with the key ``<prefix>-<value>-<value>…``; the first shown."""
    boxes = [
        element(
            "label",
            f"{name} ",
            element("select", *(element("option", title, value=value) for value, title in options), data_part=name),
        )
        for name, options in selects.items()
    ]
    first = "-".join([prefix, *(str(options[0][0]) for options in selects.values())])
    controls = element("p", *boxes, class_="controls")
    place = figure_place(first, figures[first], caption)
    return element("div", controls, place, class_="chooser", data_prefix=prefix)


def unreliable_note(data: RunData) -> str:
    """Which parts are greyed as a whole."""
    parts, values = unreliable_parts(data), run_reliability(data)
    if not parts:
        return ""
    return texts.FEATURES_UNRELIABLE.format(
        parts=", ".join(f"{PART_NAMES[part]} {fixed(values[part])}" for part in parts)
    )
