"""How often would a shift of this size come up by chance, and which statements of the report survive another run?

    python recipes/evidence/noise.py --json noise.json                       # the quickstart model
    python recipes/evidence/noise.py --midi MODEL --pairs PAIRS.jsonl --json noise.json
    python recipes/evidence/noise.py --quick                                 # a look

1. ``survival``: the training is watched again with other orders of the pairs, other adapters, on halves of the probes,
   and with SAEs trained from other seeds. Of every statement of one run's report: does the other run make it too, and
   what would chance give (recipes/evidence/reruns.py, survival.py)?
2. ``null``: the trained weights are moved at random; how much is called above noise (recipes/evidence/null.py)?
3. ``reliability``: windows in bins of split-half reliability; how many features have one sign in both halves?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.evidence.faithfulness import stamp
from recipes.evidence.interventions import along
from recipes.evidence.null import ANY, CATEGORIES, KINDS, NOMINAL, Watch, false_positives
from recipes.evidence.reruns import (
    SAME_FEATURE,
    by_reliability,
    findings_of,
    half_of,
    in_terms_of,
    sae_again,
    signs_between_halves,
    watched,
)
from recipes.evidence.setups import Setup, add_setups, chosen_setups
from recipes.evidence.survival import STATEMENTS, Findings, Survival, survival
from smda_callbacks.observe.sae import load_sae
from smda_callbacks.records import PATHWAYS
from smda_callbacks.report.data import RunData

#: Kind of re-run -> what is other.
RERUNS = {
    "order": "another order of the pairs",
    "adapter": "another start of the adapter",
    "probes": "the other half of the probes, policy distilled anew",
    "sae": "an SAE trained from another seed, policy distilled anew",
}


def runs_of(setup: Setup, args: argparse.Namespace) -> tuple[dict[str, list[list[Findings]]], dict[str, Any], RunData]:
    """Kind of RERUNS -> groups of runs to compare with each other; facts on the SAEs; the run that all start from."""
    place = args.work / "noise" / (f"{setup.name}-quick" if args.quick else setup.name)
    base = watched(setup, place / "base")
    own = findings_of(base)
    orders = [own, *(findings_of(watched(setup, place / f"order-{k}", order=k)) for k in range(1, args.seeds))]
    adapters = [own, *(findings_of(watched(setup, place / f"adapter-{k}", adapter=k)) for k in range(1, args.seeds))]
    found = {"order": [orders], "adapter": [adapters], "probes": []}
    for split in range(args.splits):
        sides = (half_of(setup.plan.probes, split, side) for side in (0, 1))
        runs = [watched(setup, place / f"probes-{split}-{k}", probes=half) for k, half in enumerate(sides)]
        found["probes"].append([findings_of(run) for run in runs])
    found["sae"], facts = _of_saes(setup, place, args)
    return found, facts, base


def _of_saes(setup: Setup, place: Path, args: argparse.Namespace) -> tuple[list[list[Findings]], dict[str, Any]]:
    """Groups of two runs, with features named as in the first's SAE, and how many features have a namesake."""
    folders = [sae_again(setup, place / f"sae-{seed}", seed, args.chats) for seed in range(args.saes)]
    said = [findings_of(watched(setup, place / f"sae-run-{k}", sae=folder)) for k, folder in enumerate(folders)]
    handles, groups, shares = [load_sae(folder) for folder in folders], [], []
    for a in range(len(said)):
        for b in range(a + 1, len(said)):
            other, share = in_terms_of(said[b], handles[a], handles[b])
            groups.append([said[a], other])
            shares.append(share)
    return groups, {"same_feature_cosine": SAME_FEATURE, "policy_features_with_a_namesake": shares}


def pooled(groups: Sequence[Sequence[Findings]]) -> dict[str, Survival]:
    """:func:`survival` within every group of runs, statements of all groups together."""
    each = [survival(runs, seed=k) for k, runs in enumerate(groups)]
    found = {}
    for kind in STATEMENTS:
        some = [one[kind] for one in each if kind in one]
        total = sum(one.statements for one in some)
        if total:
            share, chance = (
                sum(getattr(one, name) * one.statements for one in some) / total for name in ("share", "chance")
            )
            found[kind] = Survival(share, chance, total)
    return found


def null_of(setup: Setup, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Part 2 of a setup."""
    model, tokenizer = setup.adapted()
    kept: dict[int, dict[str, torch.Tensor]] = {}
    total = setup.hyper.steps(len(setup.rows))
    half = max(total // 2, 1)

    def keep(trained: Any, _: Any, step: int) -> None:
        kept[step] = {name: value.detach().clone() for name, value in trained.named_parameters() if value.requires_grad}

    along(setup, [half, total], keep)
    later = [setup.adapted()[0] for _ in (half, total)]
    for at, each in zip((half, total), later, strict=True):
        each.load_state_dict(kept[at], strict=False)
    instrument = setup.instrument(model, tokenizer)
    watch = Watch(model, instrument, setup.policy, setup.hyper.learning_rate, args.noise_draws)
    steps = min(total, args.walk)
    return false_positives(watch, *later, draws=args.draws, floors=args.floors, steps=steps, walks=args.walks)


def reliability_of(runs: Sequence[RunData]) -> dict[str, Any]:
    """Part 3: of every part of PATHWAYS the windows of these runs by reliability."""
    found: dict[str, list[tuple[float, float]]] = {part: [] for part in PATHWAYS}
    for run in runs:
        for part, windows in signs_between_halves(run).items():
            found[part] += windows
    return {
        **{part: by_reliability(windows) for part, windows in found.items()},
        "all": by_reliability([each for windows in found.values() for each in windows]),
    }


def show(name: str, found: Mapping[str, Any]) -> None:
    """All parts of a setup in the terminal."""
    print(f"\n{name}: share of statements that survive (chance), by what is other")
    kinds = list(found["survival"])
    print(f"  {'':<46}" + "".join(f"{kind:>20}" for kind in kinds))
    for statement in STATEMENTS:
        cells = []
        for kind in kinds:
            row = found["survival"][kind].get(statement)
            cells.append("–" if row is None else f"{row['share']:.2f} ({row['chance']:.2f}) of {row['statements']}")
        print(f"  {statement:<46}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"  above twice the noise floor where nothing happens (nominal {NOMINAL:.3f})")
    for kind, row in found["null"].items():
        names = {**{part: part for part in PATHWAYS}, ANY: "any part", CATEGORIES: "categories"}
        print(
            f"  {kind:<{max(map(len, KINDS)) + 2}}"
            + "  ".join(f"{title} {row[key]:.3f}" for key, title in names.items())
        )
    print("  reliability of a window -> share of features with one sign in both halves")
    for row in found["reliability"]["all"]:
        share = "–" if row["same_sign"] is None else f"{row['same_sign']:.2f}"
        print(f"  {row['from']:>5} to {row['to']:<5} {share:>5}  of {row['windows']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all setups, print, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setups(parser)
    parser.add_argument("--seeds", type=int, default=5, help="orders, and adapters (default 5 each)")
    parser.add_argument("--splits", type=int, default=3, help="ways of halving the probes (default 3)")
    parser.add_argument("--saes", type=int, default=3, help="SAEs (default 3)")
    parser.add_argument("--noise-draws", type=int, default=8, help="draws of a floor (default 8, as in a run)")
    parser.add_argument("--floors", type=int, default=4, help="floors that judge the null (default 4)")
    parser.add_argument("--draws", type=int, default=12, help="random moves per floor (default 12)")
    parser.add_argument("--walk", type=int, default=20, help="steps of a random run (default 20)")
    parser.add_argument("--walks", type=int, default=8, help="random runs (default 8)")
    parser.add_argument("--json", metavar="FILE", type=Path, default=None, help="write the results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.quick:
        args.seeds, args.splits, args.saes, args.noise_draws = 2, 0, 0, 2
        args.floors, args.draws, args.walk, args.walks = 1, 2, 2, 1
    names = ("seeds", "splits", "saes", "noise_draws", "floors", "draws", "walk", "walks")
    result = stamp(args, **{name: getattr(args, name) for name in names})
    result["reruns"], result["setups"] = RERUNS, {}
    for setup in chosen_setups(args):
        if args.quick:
            setup = short(setup)
        groups, saes, base = runs_of(setup, args)
        kept = {kind: pooled(some) for kind, some in groups.items() if some}
        result["setups"][setup.name] = {
            "survival": {kind: {name: asdict(row) for name, row in rows.items()} for kind, rows in kept.items()},
            "saes": saes,
            "null": null_of(setup, args),
            "reliability": reliability_of([base]),
        }
        show(setup.name, result["setups"][setup.name])
        if args.json is not None:  # after every setup: a long run that is stopped keeps what it has
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def short(setup: Setup) -> Setup:
    """A few pairs for one epoch."""
    return replace(setup, rows=setup.rows[:16], hyper=replace(setup.hyper, epochs=1))


if __name__ == "__main__":
    raise SystemExit(main())
