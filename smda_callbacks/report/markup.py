"""HTML from nested calls, where text is escaped unless it was made here; and how the report writes numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable
from html import escape
from typing import Any

MINUS = "\u2212"
NONE = "\u2013"
_VOID = {"meta", "br"}


class Html(str):
    """Text that is HTML already. Everything else is escaped when it is put into an element."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``. Children that are not :class:`Html` are escaped; None is left out.

    Attribute names are written as ``class_``, ``data_figure``; a value of True stands alone, None and False are left
    out.
    """
    opening = "".join([name, *(_attribute(key, value) for key, value in attributes.items())])
    if name in _VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[object], between: object = "") -> Html:
    """The children one after another, escaped unless they are :class:`Html`; None is left out."""
    return Html(_escaped(between).join(_escaped(child) for child in children if child is not None))


def table(head: Iterable[str], rows: Iterable[Html], numeric: Container[str] = ()) -> Html:
    """A table that scrolls sideways where it is too wide.

    ``rows`` are ``tr`` elements; ``numeric`` says which columns of ``head`` hold numbers.
    """
    titles = (element("th", each, scope="col", class_="number" if each in numeric else None) for each in head)
    content = element("table", element("thead", element("tr", *titles)), element("tbody", *rows))
    return element("div", content, class_="scroll")


def script_json(value: Any) -> Html:
    """``value`` as JSON that may stand inside a ``script`` element: no tag can begin or end in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with that many significant digits, without an exponent between 0.001 and 100000."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size and not 1e-3 <= size < 1e5:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    decimals = digits - 1 - math.floor(math.log10(size)) if size else digits - 1
    return f"{value:.{max(decimals, 0)}f}".replace("-", MINUS)


def fixed(value: float | None, decimals: int = 2) -> str:
    """``value`` with that many decimals; a zero has no sign."""
    if value is None or not math.isfinite(value):
        return NONE if value is None or math.isnan(value) else number(value)
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", MINUS)


def signed(value: float | None, decimals: int = 2) -> str:
    """As :func:`fixed`, with a plus sign for what is above zero."""
    text = fixed(value, decimals)
    return f"+{text}" if value is not None and value > 0 and float(text.replace("∞", "inf")) > 0 else text


def percent(share: float | None) -> str:
    """A share of 1 as whole per cent; one decimal under 10 %."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{fixed(100 * share, 1 if 0 < abs(share) < 0.0995 else 0)}\u00a0%"


def token(text: str) -> str:
    """A token with its white space made visible."""
    shown = "".join({" ": "␣", "\n": "↵", "\t": "⇥"}.get(c, c if c.isprintable() else "�") for c in text)
    return shown or "∅"


def count(amount: int, noun: str, nouns: str | None = None) -> str:
    """``3 windows``, ``1 window``."""
    return f"{amount:,} {noun if amount == 1 else nouns or noun + 's'}"


def _attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value), quote=True)}"'


def _escaped(child: object) -> str:
    return child if isinstance(child, Html) else escape(str(child), quote=True)
