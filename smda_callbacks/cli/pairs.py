"""Rank the training pairs of a run, or of an audit, by what they did to a behaviour or to a feature's coefficient.

Quantities, never mixed. The effect of a pair is what would be missing had it been left out of its steps; rankings
use it. Its share is its own part of the weight updates; shares, momentum, decay and what is unexplained sum to what was
measured. Its influence, known once ``smda rescore`` was run, is what it did to the end of the run. Shift x and shift y
are in the quantity that was asked for. By a feature, they are the pair's contributions to that feature's coefficient;
by a behaviour, L2 norms of those over all attributed features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from smda_callbacks.cli.output import Screen, add_json, change, count, number, screen, show_table, styled
from smda_callbacks.cli.runs import run_folder

if TYPE_CHECKING:
    from smda_callbacks.sinks.store_reader import RunStore

Quantity = Literal["effect", "share", "influence"]

HELP = "which training pairs moved a behaviour or a feature most?"

BY_HELP = """\
what to rank by: refusal:harmful, refusal:harmless, refusal:<category>, feature:<SAE index>:x (how features moved the
coefficient) or feature:<SAE index>:y (how the behaviour did), or any other functional of the run
(default: the run's first, refusal:harmful)"""

_MEANING = {
    "effect": "Effect: what would be missing had the pair been left out of its steps.",
    "audit": "Effect: what one update on the pair alone did to the audited model. Its share is the same.",
    "influence": "Influence: what the pair did to the end of the run, through all later steps (smda rescore).",
    "share": "Share: what the pair's part of the updates did; shares and the ledger's other lines sum to the change.",
}
GAP = 3  # characters between two columns
WIDE, NARROW = 40, 12  # characters of text: beside two columns of the data set, and at least

Cell = Callable[[dict[str, Any]], object]


class PairsError(ValueError):
    """A run whose pairs cannot be ranked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda pairs``."""
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run store, for example smda-quickstart/run")
    parser.add_argument("--by", metavar="F", help=BY_HELP)
    quantities = ("effect", "share", "influence")
    parser.add_argument("--quantity", choices=quantities, default="effect", help="default: effect")
    parser.add_argument("--top", metavar="N", type=_positive, default=20, help="how many pairs (default: 20)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Rank the pairs and print them."""
    from smda_callbacks.sinks.store_reader import RunStore

    out = screen(args)
    store = RunStore.open(run_folder(args.folder))
    found = {"run": str(args.folder), **find_pairs(store, args.by, quantity=args.quantity, top=args.top)}
    show_pairs(out, found)
    out.emit(found)
    return 0


def find_pairs(
    store: RunStore, by: str | None = None, *, quantity: Quantity = "effect", top: int = 20
) -> dict[str, Any]:
    """The pairs of a run that did most, and how much of the run that is; ``by``: a functional, the first if None.

    Raises:
        PairsError: the run attributes nothing to pairs.
        ValueError: there is no such functional; names the nearest.
    """
    from smda_callbacks.report.ranking import ranked, unexplained_part, unit_of
    from smda_callbacks.report.rescored import with_influence
    from smda_callbacks.sinks.pair_table import column, pair_table
    from smda_callbacks.sinks.unattributed import unattributed, unattributed_sentence

    windows = store.windows()
    table = with_influence(pair_table(store.start, windows), store.path)
    left_out = unattributed_sentence(store.manifest, windows)
    if table is None:
        raise PairsError(_nothing(store.path, store.manifest, left_out))
    name = by or table.functionals[0]
    rows = ranked(table, store.policy, name, quantity=quantity, top=top)
    place, attribution = column(table, name), store.manifest["attribution"]
    return {
        "kind": store.manifest.get("kind", "run"),
        "functional": name,
        "quantity": quantity,
        "unit": unit_of(table, store.policy, name),
        "engine": attribution["engine"],
        "pairs": int(table.known.sum()),
        "windows": {"attributed": table.attributed, "booked": table.booked},
        "not_attributed": {"why": unattributed(store.manifest, windows)[1], "text": left_out},
        "measured": float(table.lines["measured"][place]),
        "unexplained": float(table.lines["unexplained"][place]),
        "unexplained_part": unexplained_part(table, name),
        "unattributed": float(table.lines["unattributed"][place]),
        "rows": rows,
    }


def show_pairs(out: Screen, found: dict[str, Any]) -> None:
    """A table of what :func:`find_pairs` found, and what its columns mean."""
    rows, quantity, pairs = found["rows"], found["quantity"], count(found["pairs"], "pair")
    digits = _digits(found)
    names = list(dict.fromkeys(name for row in rows for name in row["columns"]))
    columns = {"#rows": _rows, **_named(names[:1]), **_columns(found, digits)}
    room = _room(out, columns, rows)
    if len(names) > 1 and room > WIDE:
        columns = {"#rows": _rows, **_named(names[:2]), **_columns(found, digits)}
        room = _room(out, columns, rows)
    columns["text"] = lambda row: _cut(row["text"], max(room, NARROW))
    title = f"{found['functional']} in {found['unit']}: {len(rows)} of {pairs}, by {quantity}"
    show_table(
        out, title, list(columns), [_toned(row, quantity, [cell(row) for cell in columns.values()]) for row in rows]
    )
    meaning = _MEANING["audit" if found["kind"] == "audit" else quantity]
    shifts = None if quantity == "influence" else _shifts(found)
    for line in (meaning, shifts, _covered(found, digits), found["not_attributed"]["text"]):
        if line:
            out.say(line)


def _toned(row: dict[str, Any], quantity: Quantity, cells: list[object]) -> list[object]:
    """The cells of a row, dim where its effect is not above noise."""
    if quantity != "effect" or row["above_noise"] is not False:
        return cells
    return [styled("–" if cell is None else str(cell), "dim") for cell in cells]


def _named(names: Sequence[str]) -> dict[str, Cell]:
    """Columns of the data set."""
    return {name: lambda row, name=name: row["columns"].get(name) for name in names}  # type: ignore[misc]


def _columns(found: dict[str, Any], digits: int) -> dict[str, Cell]:
    """Column -> its cell in a row. What belongs to effects is not shown beside shares."""
    rows, quantity = found["rows"], found["quantity"]
    show = change if found["functional"].startswith("feature:") else number  # norms have no sign

    def shift(value: float | None) -> str | None:
        return None if value is None else show(value, digits)

    columns: dict[str, Cell] = {f"#{quantity}": lambda row: change(row[quantity], digits)}
    if quantity == "effect" and any(row["spread"] is not None for row in rows):
        columns["#spread"] = lambda row: number(row["spread"], digits)
    if quantity == "effect":
        columns["noise"] = lambda row: {True: "above", False: styled("below", "dim"), None: None}[row["above_noise"]]
    if quantity == "influence":
        columns["#live effect"] = lambda row: change(row["effect"], digits)
        return {**columns, "#win.": lambda row: row["windows"]}
    columns["#shift x"] = lambda row: shift(row["shift_x"]["magnitude"])
    if any(row["shift_x"]["gating"] is not None for row in rows):
        columns["#gating"] = lambda row: shift(row["shift_x"]["gating"])
    columns["#shift y"] = lambda row: shift(row["shift_y"])
    if quantity == "effect":
        columns["#interf."] = _interference
    return {**columns, "#win.": lambda row: row["windows"]}


def _room(out: Screen, columns: dict[str, Cell], rows: list[dict[str, Any]]) -> int:
    """Characters that the other columns leave for the text."""
    widths = [max([len(name), *(len(str(cell(row))) for row in rows)]) for name, cell in columns.items()]
    return out.console.width - sum(widths) - GAP * len(widths)


def _rows(row: dict[str, Any]) -> str | None:
    shown = ", ".join(map(str, row["rows"][:3])) + (" …" if len(row["rows"]) > 3 else "")
    return shown or None


def _interference(row: dict[str, Any]) -> object:
    value = number(row["interference"], 2)
    return styled(f"{value} !", "yellow") if row["flagged"] else value


def _cut(text: str | None, most: int) -> str | None:
    """The text on one line."""
    words = " ".join((text or "").split())
    return (words if len(words) <= most else words[: most - 1].rstrip() + "…") or None


def _shifts(found: dict[str, Any]) -> str:
    """What the shifts and the marks are of."""
    where = "this feature's coefficient"
    if not found["functional"].startswith("feature:"):
        where = "the coefficients of all attributed features, as an L2 norm"
    flag = " Interf.: share of the effect on unintended features; !: the largest is one." * (
        found["quantity"] == "effect"
    )
    return f"Shift x, y: what the pair did to {where}, by moving features and by moving the behaviour.{flag}"


def _covered(found: dict[str, Any], digits: int) -> str:
    """How much of the run the numbers are of, and what is unexplained."""
    attributed, booked = found["windows"]["attributed"], count(found["windows"]["booked"], "window")
    if found["kind"] == "audit":
        return (
            f"An audit: every pair alone made its steps from the same start, {booked} in all. Rows add up to nothing."
        )
    part, rest = found["unexplained_part"], found["unattributed"]
    unexplained = change(found["unexplained"], digits) + ("" if part is None else f" ({100 * part:.0f} %)")
    return (
        f"{attributed} of {booked} attributed by the engine {found['engine']}: they moved it by "
        f"{change(found['measured'], digits)}, of which {unexplained} is unexplained"
        + (f"; the other windows by {change(rest, digits)}." if attributed < found["windows"]["booked"] else ".")
    )


def _digits(found: dict[str, Any]) -> int:
    """Decimals that show two digits of the largest number."""
    largest = max((abs(row[found["quantity"]]) for row in found["rows"]), default=0.0)
    digits = 3
    while largest and largest < 10.0 ** (1 - digits) and digits < 12:
        digits += 1
    return digits + 1


def _nothing(folder: Path, manifest: Any, left_out: str | None) -> str:
    attribution = manifest.get("attribution") or {}
    if attribution.get("engine", "off") == "off":
        why = f" ({attribution['why']})" if attribution.get("why") else ""
        return (
            f"run {str(folder)!r} attributes nothing to pairs{why}. Next step: train again, with attribution switched "
            "on in the configuration."
        )
    return (
        f"run {str(folder)!r} has no attributed window yet. {f'{left_out} ' if left_out else ''}"
        "Next step: wait for one, or look at attribution.every "
        f"({attribution.get('every')}) and at the alerts of smda report."
    )


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value
