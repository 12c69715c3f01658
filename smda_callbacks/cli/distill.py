"""Distil a model's refusal into a ridge policy over SAE features, and say how far it may be believed.

Prints the policy as a formula, its quality per category, and the gaps: categories in which the model does not do what
is wanted. With --out the policy is saved; a configuration takes it up with policy.path.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smda_callbacks.cli.inputs import InputError, add_inputs, load_model, resolve_config
from smda_callbacks.cli.output import Screen, add_json, count, number, screen, show_table

if TYPE_CHECKING:
    from smda_callbacks.records import PolicyRecord, Probe

HELP = "distil a model's refusal into a policy over SAE features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``smda distill``."""
    add_inputs(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="save the policy there (policy.json, .safetensors)")
    parser.add_argument("--wandb", metavar="PROJECT", help="send it to W&B as an artifact that runs can start from")
    parser.add_argument("--top", metavar="N", type=int, default=12, help="terms of the formula to write out")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Distil, print, and save where it is wanted."""
    out = screen(args)
    config = resolve_config(args)
    if args.out is not None:
        check_free(args.out)
    out.say(f"Loading {config.model.id} and {config.sae.source} ...", "dim")
    from smda_callbacks.config.build import build_plan
    from smda_callbacks.observe.distil import distil
    from smda_callbacks.training.booking import gaps_of

    plan = build_plan(config)
    model, tokenizer = load_model(config)
    full = plan.instrument(model, tokenizer, plan.load_sae())
    policy, narrowed, reading = distil(full, model, tokenizer, plan.distil)
    snapshot, probes = narrowed.snapshot(0, reading), plan.probes.probes
    gaps = gaps_of(snapshot, policy, probes, {"coef": policy.coef, "intercept": policy.intercept})
    formulas = formulas_of(policy, len(probes), snapshot.x.max(axis=0), args.top)
    for text in formulas:
        out.say()
        out.lines(text)
    out.say()
    show_quality(out, policy, probes)
    show_gaps(out, gaps)
    say_lambda(out, policy)
    if args.out is not None:
        from smda_callbacks.sinks.store import write_policy

        write_policy(args.out, policy)
        out.say(f"Saved in {args.out}. To start runs from it: policy.path: {args.out} in the configuration.")
    sent = publish(out, policy, args.wandb) if args.wandb else None
    facts = {**facts_of(policy, probes), "formulas": formulas, "gaps": gaps}
    out.emit({**facts, "out": args.out and str(args.out), "wandb": sent})
    return 0


def publish(out: Screen, policy: PolicyRecord, project: str) -> str:
    """Send the policy to W&B.

    Raises:
        InputError: W&B does not take it.
    """
    from smda_callbacks.sinks.wandb_policy import publish_policy

    entity, _, name = project.rpartition("/")
    try:
        sent = publish_policy(policy, name, entity or None)
    except Exception as error:  # W&B raises errors of many kinds; the user can do the same about all of them
        raise InputError(
            f"the policy cannot be sent to W&B ({type(error).__name__}: {error}). Next step: wandb login, or leave "
            "--wandb out."
        ) from error
    out.say(f"Sent to W&B. To start runs from it: policy.path: {sent} in the configuration.")
    return sent


def check_free(folder: Path) -> None:
    """Refuse a folder that holds a policy or a run already.

    Raises:
        InputError: names what is there.
    """
    there = [name for name in ("policy.json", "policy.safetensors", "manifest.json") if (folder / name).exists()]
    if there or folder.is_file():
        raise InputError(
            f"{folder} holds {' and '.join(there) or 'a file'} already, and nothing is overwritten. Next step: choose "
            "another folder, or remove it."
        )


def formulas_of(policy: PolicyRecord, n: int, x_max: Any, top: int = 12) -> list[str]:
    """One formula per behaviour, features named by the tokens that they promote."""
    from smda_callbacks.maths.formula import format_policy

    return [
        format_policy(
            policy.features,
            policy.coef[:, m],
            float(policy.intercept[m]),
            policy.scale,
            behaviour=name,
            target=policy.target,
            lam=policy.lam,
            r2=policy.quality[m].r2,
            r2_loo=policy.quality[m].r2_loo,
            edf=policy.edf,
            n=n,
            labels=labels_of(policy),
            top=top,
            x_max=x_max,
        )
        for m, name in enumerate(policy.behaviours)
    ]


def labels_of(policy: PolicyRecord, words: int = 2) -> dict[int, str]:
    """A short name per feature: its label, or the tokens that it promotes."""
    return {
        each.feature: each.label or "→ " + " ".join(token.strip() or repr(token) for token in each.promoted[:words])
        for each in policy.labels
    }


def show_quality(out: Screen, policy: PolicyRecord, probes: Sequence[Probe]) -> None:
    """How well the policy predicts each category, and all of them."""
    expected = {probe.category: probe.expected for probe in probes}
    sizes = {name: sum(probe.category == name for probe in probes) for name in expected}
    for name, quality in zip(policy.behaviours, policy.quality, strict=True):
        rows = [
            (
                category,
                expected[category],
                sizes[category],
                *(number(figures[key], 2) for key in ("mean", "predicted", "rmse", "rmse_loo")),
            )
            for category, figures in quality.by_category.items()
        ]
        columns = ["category", "expected", "#probes", f"#{name}", "#predicted", "#error", "#error (left out)"]
        show_table(out, f"How well the policy predicts {name}", columns, rows, caption=_quality_caption(policy, name))


def _quality_caption(policy: PolicyRecord, name: str) -> str:
    quality = policy.quality[policy.behaviours.index(name)]
    honest = "not computed" if quality.r2_cv is None else number(quality.r2_cv, 2)
    return (
        f"All probes: R² {number(quality.r2, 2)}, leave-one-out {number(quality.r2_loo, 2)}, with every choice made "
        f"again in each fold {honest}. Errors are root mean squares."
    )


def show_gaps(out: Screen, gaps: Sequence[Mapping[str, Any]], *, when: str = "") -> None:
    """The categories that are gaps, worst first, with the features that pull the wrong way."""
    found = [gap for gap in gaps if gap["is_gap"]]
    if not found:
        out.say(f"No gap{when}: in every category the model does what is wanted about as often as in the others.\n")
        return
    rows = [
        (
            gap["category"],
            gap["expected"],
            gap["n_probes"],
            number(gap["mean"], 2),
            gap["reason"],
            ", ".join(f"{feature} ({number(value)})" for feature, value in gap["pulling"][:3]) or None,
        )
        for gap in found
    ]
    show_table(
        out,
        f"Gaps{when}: {count(len(found), 'category', 'categories')} in which the model does not do what is wanted",
        ["category", "expected", "#probes", "#refusal", "why", "features that pull the wrong way"],
        rows,
        caption="low: refuses less than it should; over-refusal: more; fragile: through features of its own only. "
        "Beside a feature: how much it changes refusal there, against the other categories.",
    )


def say_lambda(out: Screen, policy: PolicyRecord) -> None:
    """The penalty, and where it lies on the grid that it was chosen from."""
    grid = [lam for lam, _ in policy.lam_grid]
    text = f"λ = {policy.lam:.3g}, {count(len(policy.features), 'feature')}, {policy.edf:.1f} degrees of freedom"
    if grid and policy.lam in (min(grid), max(grid)):
        text += f"; λ lies at the edge of its grid ({min(grid):g} to {max(grid):g}): the policy may be of little use"
    out.say(text + ".")


def facts_of(policy: PolicyRecord, probes: Sequence[Probe]) -> dict[str, Any]:
    """What a program wants to know of a policy; quality is that of the first behaviour."""
    quality = policy.quality[0]
    return {
        "behaviours": policy.behaviours,
        "features": policy.features.tolist(),
        "lam": policy.lam,
        "edf": policy.edf,
        "n_probes": len(probes),
        "n_features": len(policy.features),
        "r2": quality.r2,
        "r2_loo": quality.r2_loo,
        "r2_cv": quality.r2_cv,
        "by_category": quality.by_category,
    }
