"""Does leaving out the pairs that a method blames keep the model refusing? Retrain without them, and with copies.

A pair's harm is what a method says it took from mean refusal over all harmful probes. Trainings are made again without
the most harmful 5, 10 and 20 % of the pairs, and with the most repairing 10 % counted twice. What is told is the share
of the fall of refusal that is avoided: 0 as with all pairs, 1 no fall at all. Beside it the same for pairs drawn at
random, and drawn at random with as many of every kind (refused, complied with, benign) as the rescore takes.

    python recipes/evidence/removal.py --midi MODEL --pairs pairs.jsonl --json recipes/evidence/results/removal.json
    python recipes/evidence/removal.py --quick
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs as a file, too

from recipes.evidence.lds import compared, comparison_parser, predictions, with_defaults
from recipes.evidence.retrain import Array
from recipes.evidence.setups import Setup
from recipes.evidence.truth import Truth, drops

TARGET = "refusal:harmful"

#: What is done -> to which shares of the pairs.
SHARES = {"remove": (0.05, 0.1, 0.2), "add": (0.1,)}

#: What is done -> the weight of the chosen pairs.
WEIGHT = {"remove": 0.0, "add": 2.0}

#: The method whose choice says how many of every kind the kind-matched draws take.
REFERENCE = "rescore"


def top(influence: Array, action: str, share: float) -> NDArray[np.int64]:
    """The pairs that lower the target most (``remove``) or raise it most (``add``)."""
    order = np.argsort(influence if action == "remove" else -influence, kind="stable")
    return order[: round(share * len(influence))]


def matched(kinds: Sequence[str], like: Sequence[str], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Random choices with as many pairs of every kind as ``like`` has."""
    rng, wanted = np.random.default_rng([seed, len(like)]), Counter(like)
    of_kind = {kind: [k for k, each in enumerate(kinds) if each == kind] for kind in wanted}
    return [
        np.concatenate([rng.choice(of_kind[kind], size=count, replace=False) for kind, count in wanted.items()])
        for _ in range(draws)
    ]


def avoided(truth: Truth, choices: Sequence[NDArray[np.int64]], action: str, what: str) -> Array:
    """Share of the target's change over the run that is avoided, for each choice of pairs."""
    weights = np.ones((len(choices), len(truth.setup.rows)))
    for row, chosen in zip(weights, choices, strict=True):
        row[chosen] = WEIGHT[action]
    k = truth.names.index(TARGET)
    return 1 - truth.outcomes(weights, f"{action}, {what}")[:, k] / truth.full[k]


def compare(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """One setup's figures."""
    truths = [Truth(setup, order, args.work) for order in range(args.orders)]
    predicted, _, missing = predictions([truth.run() for truth in truths], args.methods, args.work)
    predicted.pop("random", None)  # it has draws of its own
    targets = [name for name in truths[0].setup.functionals.names if not name.endswith(":logit")]
    harm = {method: [scores[:, targets.index(TARGET)] for scores in each] for method, each in predicted.items()}
    found: dict[str, Any] = {
        "missing": missing,
        "fall": [float(truth.full[truth.names.index(TARGET)]) for truth in truths],
        "kinds": dict(Counter(setup.kinds)),
    }
    for action, shares in SHARES.items():
        for share in shares:
            found.setdefault(action, {})[f"{share:g}"] = _one(setup, truths, harm, action, share, args.draws)
    return found


def _one(
    setup: Setup, truths: Sequence[Truth], harm: dict[str, list[Array]], action: str, share: float, draws: int
) -> dict[str, Any]:
    pairs = len(setup.rows)
    at_random = [np.flatnonzero(row == 0) for row in drops(pairs, draws, share, seed=0)]
    drawn, like = [], []
    for k, truth in enumerate(truths):
        what = f"{share:.0%}"
        drawn.append(avoided(truth, at_random, action, f"{what} at random"))
        kinds = [setup.kinds[p] for p in top(harm[REFERENCE][k], action, share)]
        choices = matched(setup.kinds, kinds, draws, seed=k)
        like.append(avoided(truth, choices, action, f"{what} of the same kinds"))
    found = {"random": _spread(drawn), "random, kinds as the rescore's": _spread(like)}
    for method, per_order in harm.items():
        chosen = [top(each, action, share) for each in per_order]
        values = [float(avoided(truth, [each], action, method)[0]) for truth, each in zip(truths, chosen, strict=True)]
        z = [(v - r.mean()) / r.std() if r.std() > 0 else 0.0 for v, r in zip(values, drawn, strict=True)]
        taken = Counter(setup.kinds[p] for each in chosen for p in each)
        found[method] = {
            "avoided": float(np.mean(values)),
            "per_order": values,
            "z_of_random": float(np.mean(z)),
            "kinds": {kind: count / sum(map(len, chosen)) for kind, count in taken.items()},
        }
    return found


def _spread(per_order: Sequence[Array]) -> dict[str, Any]:
    everything = np.concatenate(per_order)
    low, high = np.percentile(everything, [2.5, 97.5])
    return {
        "avoided": float(everything.mean()),
        "per_order": [float(each.mean()) for each in per_order],
        "low": float(low),
        "high": float(high),
        "draws": len(per_order[0]),
    }


def show(result: dict[str, Any]) -> None:
    """Print the shares avoided, best first."""
    for name, setup in result["setups"].items():
        for action in SHARES:
            shares = list(setup[action])
            print(f"\n{name}: share of the fall of refusal avoided, {action} {', '.join(shares)}")
            rows = {m: [setup[action][s][m]["avoided"] for s in shares] for m in setup[action][shares[0]]}
            for method, values in sorted(rows.items(), key=lambda row: -row[1][-1]):
                print(f"  {method:<34} {'  '.join(f'{value:6.2f}' for value in values)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Retrain, print, write."""
    parser = comparison_parser(__doc__)
    parser.add_argument("--draws", type=int, help="random choices per share and order (default 20)")
    args = with_defaults(parser.parse_args(argv))
    args.draws = args.draws or (4 if args.quick else 20)
    if REFERENCE not in args.methods:
        parser.error(f"--methods must hold {REFERENCE}: random draws are matched to the kinds of its pairs.")
    show(compared(args, compare, draws=args.draws, target=TARGET))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
