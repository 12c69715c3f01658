"""What commands print: tables for people, and one JSON object for programs.

With ``--json`` the object is the last line of standard output and all that is printed there; what people read goes to
standard error then. Texts that come from files are shown without control characters and without markup.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

#: Width where the output is no terminal: wide enough for a sentence beside a name, narrow enough for a page.
WIDTH = 110

_STYLES = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True)
class Screen:
    """Where a command prints. ``json``: whether a program reads standard output."""

    console: Console
    json: bool

    def say(self, text: str = "", style: str | None = None) -> None:
        """A line; a long one is wrapped."""
        self.console.print(plain(text), style=style)

    def item(self, text: str, style: str | None = None, *, mark: str = " ") -> None:
        """A line under a heading, behind a mark; a long one goes on where its text began."""
        from rich.table import Table

        row = Table.grid(padding=(0, 1))
        row.add_row(f" {mark}", plain(text))
        self.console.print(row, style=style)

    def lines(self, text: str) -> None:
        """Text that is laid out already: never wrapped."""
        self.console.print(plain(text), soft_wrap=True)

    def emit(self, values: Mapping[str, Any]) -> None:
        """The JSON object, where it was asked for."""
        if self.json:
            from smda_callbacks.sinks.codec import dumps  # strict: what is not finite becomes a string

            print(dumps(values), file=sys.stdout, flush=True)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option ``--json``."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout; the rest goes to stderr"
    )


def screen(args: argparse.Namespace) -> Screen:
    """The screen of a command."""
    from rich.console import Console

    json = bool(getattr(args, "json", False))
    stream = sys.stderr if json else sys.stdout
    columns = os.environ.get("COLUMNS", "")  # read here: rich keeps the environment that it was imported in
    width = int(columns) if columns.isdigit() else None if stream.isatty() else WIDTH
    return Screen(Console(file=stream, markup=False, emoji=False, highlight=False, width=width), json)


def show_table(
    where: Screen,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str | None = None,
) -> None:
    """Print a table. Numbers are right-aligned: a column is one of numbers when its name starts with ``#``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(plain(title), style="bold"),
        title_justify="left",
        caption=None if caption is None else Text(plain(caption), style="dim"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
    )
    for name in columns:
        number = name.startswith("#")
        table.add_column(name.removeprefix("#"), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    where.console.print(table)


def _cell(value: object) -> Text:
    from rich.text import Text

    if isinstance(value, Text):
        return value
    shown = plain("–" if value is None else str(value))
    return Text(shown, style=_STYLES.get(shown, ""))


def styled(text: str, style: str) -> Text:
    """Text of a table's cell in a style."""
    from rich.text import Text

    return Text(plain(text), style=style)


def plain(text: str) -> str:
    """``text`` without control characters other than line ends: a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def change(value: float, digits: int = 3) -> str:
    """A number with its sign; exactly 0 where it rounds to it."""
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown if any(c in "123456789" for c in shown) else f"{0:.{digits}f}"


def count(n: int, one: str, many: str | None = None) -> str:
    """``1 probe``, ``2 probes``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
