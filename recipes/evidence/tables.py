"""Tables of the README, from the results that the scripts of the evidence wrote.

    python recipes/evidence/tables.py README.md            # writes every table between its markers
    python recipes/evidence/tables.py README.md --check    # fails where the file is not what the results say

A table named NAME stands between ``<!-- evidence:NAME -->`` and ``<!-- /evidence:NAME -->``. :data:`TABLES` says which
file of ``recipes/evidence/results`` it is made from, and how.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.evidence.tables_cost import cost_tables
from recipes.evidence.tables_trust import trust_tables

RESULTS = Path(__file__).resolve().parent / "results"

#: A result file's content -> Markdown.
Table = Callable[[Mapping[str, Any]], str]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, all others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def stamp(result: Mapping[str, Any]) -> str:
    """One line on when and with what a result was made."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{result['date']}; orders of the pairs: {len(result['orders'])}; {versions}."


def fidelity(setup: str, group: str = "refusal") -> Table:
    """LDS of every method on one setup: half-drops and tenth-drops of one group with intervals, and CPU seconds."""

    def table(result: Mapping[str, Any]) -> str:
        found = result["setups"][setup]
        best = sorted(found["methods"].items(), key=lambda row: -_lds(row[1], group, "half"))
        rows = [
            [method, *(_interval(groups.get(group, {}).get(drop)) for drop in ("half", "tenth"))]
            + [_lds_text(groups, other, "half") for other in ("policy x", "policy y", "coefficient")]
            + [f"{found['cpu_seconds'][method]:.0f}"]
            for method, groups in best
        ]
        head = ["method", f"{group}, half left out", "a tenth", "ΔX, half", "ΔY, half", "coefficient, half", "CPU s"]
        notes = [f"{method}: left out ({why})." for method, why in found["missing"].items()]
        # A set-up may have been run on fewer orders than the others.
        orders = {"orders": found.get("orders", result["orders"])}
        return "\n".join([grid(head, rows), "", stamp({**result, **orders}), *notes])

    return table


def removal(setup: str) -> Table:
    """Share of the fall of refusal avoided on one setup, by what is left out or counted twice."""

    def table(result: Mapping[str, Any]) -> str:
        found = result["setups"][setup]
        parts = [(action, share) for action in ("remove", "add") for share in found[action]]
        methods = list(found["remove"][parts[0][1]])
        values = {m: [found[action][share][m] for action, share in parts] for m in methods}
        best = sorted(methods, key=lambda m: -values[m][1]["avoided"])
        rows = [[m, *(_avoided(each) for each in values[m])] for m in best]
        head = ["chosen by"] + [
            f"{'without the' if action == 'remove' else 'twice the'} top {float(share):.0%}" for action, share in parts
        ]
        return "\n".join([grid(head, rows), "", stamp(result)])

    return table


def _lds(groups: Mapping[str, Any], group: str, drop: str) -> float:
    return float(groups.get(group, {}).get(drop, {}).get("lds", -2.0))


def _lds_text(groups: Mapping[str, Any], group: str, drop: str) -> str:
    value = groups.get(group, {}).get(drop)
    return "–" if value is None else f"{value['lds']:.2f}"


def _interval(value: Mapping[str, Any] | None) -> str:
    return "–" if value is None else f"{value['lds']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _avoided(value: Mapping[str, Any]) -> str:
    if "low" in value:
        return f"{value['avoided']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['avoided']:.2f}"


#: Name of a table -> the file of results, and what makes it.
TABLES: dict[str, tuple[str, Table]] = {
    "lds-quickstart": ("lds.json", fidelity("quickstart")),
    "lds-midi": ("lds.json", fidelity("midi")),
    "removal-quickstart": ("removal.json", removal("quickstart")),
    "removal-midi": ("removal.json", removal("midi")),
    **trust_tables(grid),
    **cost_tables(grid),
}


def filled(text: str, results: Path, tables: Mapping[str, tuple[str, Table]]) -> str:
    """``text`` with every table between its markers made anew.

    Raises:
        ValueError: a marker names no table, or is not closed; or a result that a table is made from is not there.
    """
    for name in re.findall(r"<!-- evidence:([\w-]+) -->", text):
        if name not in tables:
            raise ValueError(f"there is no table {name!r}. Allowed: {', '.join(tables)}.")
        file, make = tables[name]
        path = results / file
        if not path.is_file():
            raise ValueError(f"table {name!r} is made from {path.name}, which is not there. Next step: run its script.")
        begin, end = f"<!-- evidence:{name} -->", f"<!-- /evidence:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"table {name!r} needs one {begin} with one {end} behind it. Next step: mend the markers.")
        head, _, rest = text.partition(begin)
        tail = rest.partition(end)[2]
        made = make(json.loads(path.read_text(encoding="utf-8")))
        text = f"{head}{begin}\n\n{made}\n\n{end}{tail}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the markers of a file, or check that they are filled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a Markdown file with markers")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the file would change")
    args = parser.parse_args(argv)
    text = args.file.read_text(encoding="utf-8")
    try:
        made = filled(text, args.results, TABLES)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.check and made != text:
        print(f"{args.file} is not what the results say. Next step: python {Path(__file__).name} {args.file}")
        return 1
    if not args.check:
        args.file.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
