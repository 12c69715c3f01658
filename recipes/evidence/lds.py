"""Does the sum of pairs' influences say what a training without them would have come to? Retrain, and rank.

For every setup and order of the pairs, trainings are made again without a random half of the pairs, and without a
random tenth. LDS is Spearman's correlation over these subsets of what a method predicts for a target (the sum of its
scores over the pairs left out) and what came out, mean over the targets of a group. Every method sees the same run and
is asked about the same targets. Intervals: bootstrap over subsets and targets; and every order by itself.

    python recipes/evidence/lds.py --midi MODEL --pairs pairs.jsonl --json recipes/evidence/results/lds.json
    python recipes/evidence/lds.py --quick

Trainings and scores are kept in ``--work``: the script goes on where it was stopped, and removal.py uses the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.evidence.methods import FAMILIES, QUICK, scored
from recipes.evidence.peers import peer_versions
from recipes.evidence.retrain import Array, Run
from recipes.evidence.setups import Setup, add_setups, chosen_setups
from recipes.evidence.stats import GROUPS, LEAST_SPREAD, Fidelity, fidelity, in_group, nested, varying
from recipes.evidence.truth import Truth, drops

#: Name -> share of the pairs that is left out.
DROPS = {"half": 0.5, "tenth": 0.1}


def compare(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """One setup's figures; called again after more is known, it is cheap."""
    truths = [Truth(setup, order, args.work) for order in range(args.orders)]
    subsets = {drop: drops(len(setup.rows), args.subsets, share, seed=0) for drop, share in DROPS.items()}
    actual: dict[str, list[Array]] = {drop: [] for drop in DROPS}
    for truth in truths:
        for drop, weights in subsets.items():
            actual[drop].append(truth.full - truth.outcomes(weights, f"without a {drop}"))
    runs = [truth.run() for truth in truths]
    predicted, seconds, missing = predictions(runs, args.methods, args.work)
    results: dict[tuple[str, str, str], Fidelity | None] = {}
    kept: dict[str, int] = {}
    for group in GROUPS:
        outcomes = {drop: [in_group(each, group, truths[0].names) for each in actual[drop]] for drop in DROPS}
        chosen = varying([each for drop in DROPS for each in outcomes[drop]])
        kept[group] = int(chosen.sum())
        for method, per_order in predicted.items():
            scores = [in_group(each, group, runs[0].targets, predicted=True)[:, chosen] for each in per_order]
            for drop, weights in subsets.items():
                said = [(1 - weights) @ each for each in scores]
                found = fidelity(said, [each[:, chosen] for each in outcomes[drop]], draws=args.draws)
                results[method, group, drop] = found
    return {
        "methods": nested(results),
        "cpu_seconds": seconds,
        "missing": missing,
        "targets": kept,
        "full": [dict(zip(truth.names, truth.full.tolist(), strict=True)) for truth in truths],
        "settings": {"pairs": len(setup.rows), **asdict(setup.hyper), "notes": list(setup.notes)},
    }


def predictions(
    runs: Sequence[Run], families: Sequence[str], work: Path | None
) -> tuple[dict[str, list[Array]], dict[str, float], dict[str, str]]:
    """Scores of every method per order; CPU seconds, mean over orders; which are missing, and why."""
    found: dict[str, list[Array]] = {}
    seconds: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for run in runs:
        for each in scored(run, families, work, missing=missing):
            found.setdefault(each.name, []).append(each.scores)
            seconds.setdefault(each.name, []).append(each.seconds)
            print(f"{run.setup.name}, order {run.order}: {each.name}, {each.seconds:.1f} CPU seconds", flush=True)
    whole = {name: each for name, each in found.items() if len(each) == len(runs)}
    return whole, {name: float(np.mean(seconds[name])) for name in whole}, missing


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to make it again."""
    packages = ("torch", "transformers", "trl", "peft", "sae-lens", "numpy")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in packages} | peer_versions(),
        "orders": list(range(args.orders)),
        "quick": args.quick,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }


def show(result: dict[str, Any]) -> None:
    """Print LDS of the two most asked-for groups, methods in descending order."""
    for name, setup in result["setups"].items():
        print(f"\n{name}: LDS (half, tenth)")
        rows = setup["methods"].items()
        for method, groups in sorted(rows, key=lambda row: -row[1].get("refusal", {}).get("half", {}).get("lds", -1)):
            cells = []
            for group in ("refusal", "coefficient"):
                figures = [f"{found['lds']:5.2f}" for found in groups.get(group, {}).values()]
                cells.append(f"{group} {' '.join(figures)}" if figures else "")
            print(f"  {method:<34} {'   '.join(cells)}")
        for method, why in setup["missing"].items():
            print(f"  {method}: left out: {why}")


def comparison_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every script that compares methods on retrained runs; see :func:`compared`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setups(parser)
    parser.add_argument("--orders", type=int, help="orders of the pairs (default 3)")
    parser.add_argument("--methods", nargs="+", choices=FAMILIES, metavar="FAMILY", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--json", metavar="FILE", type=Path, default=None, help="write the results there")
    return parser


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The options of :func:`comparison_parser`, those not given at their defaults."""
    args.orders = args.orders or (1 if args.quick else 3)
    args.methods = args.methods or (list(QUICK) if args.quick else list(FAMILIES))
    return args


def compared(
    args: argparse.Namespace, compare: Callable[[Setup, argparse.Namespace], dict[str, Any]], **further: Any
) -> dict[str, Any]:
    """Results of all setups, written after each: a long run that is stopped keeps what it has."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {**provenance(args), **further, "setups": {}}
    for setup in chosen_setups(args):
        result["setups"][setup.name] = compare(setup, args)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, write."""
    parser = comparison_parser(__doc__)
    parser.add_argument("--subsets", type=int, help="trainings per kind of drop and order (default 60)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    args = with_defaults(parser.parse_args(argv))
    args.subsets = args.subsets or (10 if args.quick else 60)
    left_out = f"targets whose outcomes spread less than {LEAST_SPREAD} of their group's median spread"
    show(compared(args, compare, subsets=args.subsets, drops=DROPS, groups=GROUPS, left_out=left_out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
