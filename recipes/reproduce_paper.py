"""The set-up of the SMDA paper (arXiv 2606.29171) in one go: base policy, audit of 200 SFT pairs, three findings.

    python recipes/reproduce_paper.py --config configs/quickstart.yaml --out runs/paper
    python recipes/reproduce_paper.py --config configs/llama32_3b_instruct.yaml --pairs pairs.jsonl --out runs/paper-3b

From one fixed model every pair alone makes one LoRA step. Then, in the folder OUT: paper.html with the base policy and
three findings (gaps, pathways by kind of pair, interference), paper.json and a CSV each with their numbers, and the
store, audit, for smda pairs and smda verify. The same command goes on where it was stopped.

A good file of pairs is JSONL, shuffled, one {"prompt": ..., "completion": ..., "kind": ...} a line, with a kind of
harmful_refused, harmful_complied or benign, some 65 of each. No prompt is a probe. The same harmful prompts are refused
in some lines and complied with in others, so that the kinds differ by their answers. Answers are of similar length and
sound like the model; refusals open in words that behaviour.refusals of the configuration lists.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import erfc, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smda_callbacks import RunStore, load_config
from smda_callbacks.config.audit import AuditJob, carry_out, prepare_audit
from smda_callbacks.config.build import BUILTIN, builtin_path
from smda_callbacks.maths.interference import against_swaps
from smda_callbacks.report.data import TIMES, RunData
from smda_callbacks.report.figures import PART_NAMES
from smda_callbacks.report.gap_pairs import NAMED, closers
from smda_callbacks.report.group_shifts import LEVEL, group_shifts
from smda_callbacks.report.group_test import FEWEST, MOST
from smda_callbacks.report.markup import Html, count, element, fixed, number, percent, table
from smda_callbacks.report.page import render
from smda_callbacks.report.pairs_data import PairData, need_pairs, pair_name
from smda_callbacks.report.sections_groups import Interfering, interfering, matrix_of
from smda_callbacks.report.shifts import feature_name
from smda_callbacks.report.verdict import sae_sentence

#: Share of normally distributed noise that lies beyond the limit for its own root mean square.
BY_CHANCE = erfc(TIMES / sqrt(2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML; its audit section says what the update is")
    parser.add_argument("--pairs", help="JSONL as above; the library has one for the quickstart's model only")
    parser.add_argument("--pairs-limit", type=int, default=200, help="audit so many lines, the first ones (200)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder for page, numbers and store")
    return parser.parse_args()


def main() -> None:
    """Audit, then say what the paper says, with this model's numbers."""
    args = arguments()
    config = load_config(args.config)
    name = config.model.id or ""
    if not name:
        raise SystemExit(f"{args.config} names no model. Next step: set model.id.")
    if not config.measure.noise_draws:
        raise SystemExit("findings are judged by the noise floor. Next step: set measure.noise_draws to 8, say.")
    if not args.pairs and not name.startswith(BUILTIN):
        raise SystemExit(f"no pairs for {name}. Next step: give --pairs FILE; --help says what a good one is.")
    pairs = args.pairs or f"{BUILTIN}quickstart/sft_pairs.jsonl"
    job = limited(prepare_audit(config, pairs, args.out / "audit"), args.pairs_limit)
    tokenizer = AutoTokenizer.from_pretrained(builtin_path(name))
    model = AutoModelForCausalLM.from_pretrained(builtin_path(name), dtype=config.model.dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        carry_out(job, model, tokenizer)  # the model is afterwards what it was, bit for bit
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {job.folder}. The same command goes on.", file=sys.stderr)
        sys.exit(130)

    data = RunData.read(RunStore.open(job.folder))
    if data.pairs is None:
        raise SystemExit("no pair could be measured: every reading failed. Next step: set measure.on_error: raise.")
    found = findings(data)
    write(args.out, data, found)
    for each in found:
        print(f"\n{each.title}\n{each.verdict}")
    print(f"\n{scope(data)}\npage: {args.out / 'paper.html'}\nto recompute every number: smda verify {job.folder}")


def limited(job: AuditJob, limit: int) -> AuditJob:
    """The job with the first ``limit`` rows; refuses pairs that finding 2 could make no groups of."""
    rows = job.rows[: max(limit, 0)]
    kinds = Counter(str(row["kind"]) for row in rows if "kind" in row)
    if sum(size > 1 for size in kinds.values()) < FEWEST or len(kinds) > MOST:
        raise SystemExit(
            f"the first {len(rows)} pairs have the kinds {dict(kinds)}; needed are {FEWEST} to {MOST}, two of which "
            "have two pairs or more. Next step: add a column kind, shuffle the file, or raise --pairs-limit."
        )
    return replace(job, rows=rows)


# The findings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the section ``section`` of the page shows: in words, in numbers, and as the rows of ``<name>.csv``."""

    name: str
    title: str
    section: str
    verdict: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()


def findings(data: RunData) -> list[Finding]:
    """The base policy and the three findings, on the first behaviour."""
    pairs = need_pairs(data)
    return [base_policy(data), gaps(data, pairs), pathways(data, pairs), interferences(pairs, interfering(data, pairs))]


def base_policy(data: RunData) -> Finding:
    """How far the policy of the fixed model may be believed."""
    policy, quality = data.policy, data.policy.quality[0]
    numbers = {"r2_loo": quality.r2_loo, "r2": quality.r2, "r2_cv": quality.r2_cv, "edf": policy.edf}
    verdict = (
        f"R² is {fixed(quality.r2_loo)} leave-one-out, {fixed(quality.r2)} in sample and {fixed(quality.r2_cv)} with "
        f"every choice made in each fold: {len(policy.features)} features, {number(policy.edf)} effective degrees of "
        f"freedom, {len(data.probes)} probes. {sae_sentence(data)}"
    )
    if quality.r2_loo < 0.5:
        verdict += " The policy misses most of how probes differ: what follows on features stands on little."
    rows = [{"category": name, "expected": data.expected[name], **each} for name, each in quality.by_category.items()]
    return Finding("policy", "Base policy", "formula", verdict, numbers, rows)


def gaps(data: RunData, pairs: PairData) -> Finding:
    """Finding 1: categories that the base policy leaves weak, and the pairs that would close or widen each."""
    rows = [gap_row(data, pairs, gap) for gap in data.store.gaps_start]
    weak, known = [row for row in rows if row["is_gap"]], int(pairs.table.known.sum())
    chance = BY_CHANCE * known
    listed = [
        f"{row['category']} ({row['reason']}), {mostly(row, 'closing')} close it, {mostly(row, 'widening')} widen it"
        + ("" if row["closing"] + row["widening"] > chance else ", no more than chance")
        for row in weak
    ]
    verdict = f"{len(weak)} of {count(len(rows), 'category', 'categories')} are gaps."
    if weak:
        verdict += (
            f" Pairs of {known} beyond {TIMES:g} times their noise floor, where normally distributed noise would have "
            f"some {chance:.0f}: {'; '.join(listed)}."
        )
    numbers = {"categories": len(rows), "gaps": len(weak), "pairs": known, "beyond_by_chance": chance}
    return Finding("gaps", "Finding 1: gaps", "gaps", verdict, numbers, rows)


def gap_row(data: RunData, pairs: PairData, gap: Mapping[str, Any]) -> dict[str, Any]:
    """A category with its pairs above noise: how many close and widen it, and the first few of each."""
    place = pairs.category(0, str(gap["category"]))
    sides = closers(data, pairs, str(gap["category"]), refuse=gap["expected"] == "refuse")
    row = {name: gap[name] for name in ("category", "expected", "n_probes", "mean", "predicted", "is_gap", "reason")}
    row["pulling"] = [list(each) for each in gap["pulling"]]
    for name, found in zip(("closing", "widening"), sides, strict=True):
        firsts = [named(pairs, each) | {"effect": float(pairs.table.effect[each, place])} for each in found[:NAMED]]
        kinds = Counter(named(pairs, each)["kind"] for each in found)
        row |= {name: len(found), f"{name}_kinds": dict(kinds.most_common()), f"most_{name}": firsts}
    return row


def mostly(row: Mapping[str, Any], side: str) -> str:
    """How many pairs, and how many of them of the most frequent kind."""
    kind, most = next(iter(row[f"{side}_kinds"].items()), ("", 0))
    return f"{row[side]} ({most} of them {kind})" if most else "none"


def named(pairs: PairData, row: int) -> dict[str, Any]:
    return {"pair": pair_name(pairs.table.pairs[row]), "kind": pairs.table.pairs[row].columns.get("kind", "")}


def pathways(data: RunData, pairs: PairData) -> Finding:
    """Finding 2: what each kind of pair does to every coefficient through ΔX and ΔY, and whether the kinds differ."""
    found, title = group_shifts(pairs, 0), "Finding 2: pathways by kind of pair"
    if found is None or found.floor is None:
        return Finding("pathways", title, "groups", "Not tested: the pairs that could be measured make no groups.")
    rows, different, loud = [], dict.fromkeys(found.mean, 0), 0
    for part in found.mean:
        for j, feature in enumerate(found.features.tolist()):
            row: dict[str, Any] = {"feature": feature, "name": feature_name(data, feature), "pathway": part}
            for g, kind in enumerate(found.groups.names):
                row |= {f"mean_{kind}": found.mean[part][g, j].item(), f"floor_{kind}": found.floor[part][g, j].item()}
            rows.append(row | {"p": found.p(part)[j].item(), "p_corrected": found.p_holm(part)[j].item()})
            differs = rows[-1]["p_corrected"] < LEVEL
            different[part] += differs
            loud += bool(differs and found.above(part)[:, j].any())
    whole, tests = sum(different.values()), found.tests
    numbers = {"tests": len(tests.p), "pairs": tests.pairs, **{f"different_{part}": n for part, n in different.items()}}
    numbers |= {"different": whole, "different_above_noise": loud}
    parts = ", ".join(f"{n} in {PART_NAMES[part]}" for part, n in different.items())
    outcome = f"not significant, no p is below {LEVEL:g}: the kinds cannot be told apart by their pathways."
    if whole:
        above = f"in {loud} of them some kind's mean is above {TIMES:g} times its noise floor"
        outcome = f"the kinds differ in {whole} (p < {LEVEL:g}): {parts}; {above}."
    verdict = (
        f"{len(tests.p)} permutation tests ({len(found.features)} features × {len(found.mean)} pathways) on "
        f"{tests.pairs} pairs of {len(found.groups.names)} kinds, p corrected by Holm: {outcome}"
    )
    return Finding("pathways", title, "groups", verdict, numbers, rows)


def interferences(pairs: PairData, found: Interfering | None) -> Finding:
    """Finding 3: how much of what pairs do falls on features that their prompts do not call for."""
    names, part, flagged = ("interference", "Finding 3: interference"), pairs.table.interference, pairs.table.flagged
    judged = np.flatnonzero(~np.isnan(part))
    if found is None or not len(judged):
        return Finding(*names, "interference", "Not judged: of no pair it is known what it intends.")
    loud = judged[found.above[judged]]
    matrix = [[float(x) if isfinite(x) else None for x in row] for row in matrix_of(found)[0]]
    numbers = {"judged": len(judged), "above_noise": len(loud), "flagged": int(flagged.sum()), "matrix": matrix}
    verdict = f"{len(loud)} of {len(judged)} pairs have a largest effect above noise, {flagged.sum()} are flagged."
    chance = against_swaps(found.shift[loud], found.intended[loud])
    if chance is None:
        verdict += " Interference is below the noise floor and cannot be judged."
    else:
        numbers |= {"median": chance.median, "median_swapped": chance.swapped, "p_swapped": chance.p}
        outcome = "less than chance" if chance.p < LEVEL else "not significant: nothing shows that intention matters"
        verdict += (
            f" Of the former, {percent(chance.median)} of the effect is on unintended features in the median, and "
            f"{percent(chance.swapped)} if they swap intentions (1 permutation test, p = {number(chance.p, 2)}): "
            f"{outcome}."
        )
    order = sorted(judged.tolist(), key=lambda row: (not flagged[row], not found.above[row], -part[row]))
    rows = [interference_row(pairs, found, row) for row in order]
    return Finding(*names, "interference", verdict, numbers, rows)


def interference_row(pairs: PairData, found: Interfering, row: int) -> dict[str, Any]:
    """A pair with what it intends and what it moves most; ``effect`` and ``above_noise`` are of the latter."""
    at, intended = int(found.largest[row]), found.intended[row][found.intended[row] >= 0]
    return named(pairs, row) | {
        "intended": pairs.table.features[intended].tolist(),
        "largest": int(pairs.table.features[at]),
        "effect": float(found.shift[row, at]),
        "above_noise": bool(found.above[row]),
        "interference": float(pairs.table.interference[row]),
        "flagged": bool(pairs.table.flagged[row]),
    }


# What is written ------------------------------------------------------------------------------------------------------


def scope(data: RunData) -> str:
    """What the numbers are of."""
    text = (
        f"Model {data.store.manifest['config']['model']['id']}. The paper's numbers are of Llama-3.2-3B-Instruct with "
        "an SAE, probes and pairs of its own; they are not to be expected from another model."
    )
    toy = " This one is a toy: it shows that the path works, and nothing of large models."
    return text + toy if BUILTIN in text else text


def write(folder: Path, data: RunData, found: Sequence[Finding]) -> None:
    """The report with the findings on top, all numbers as JSON, and a CSV per finding."""
    start, main, rest = render(data).partition("<main>")
    (folder / "paper.html").write_text(f"{start}{main}{as_html(scope(data), found)}{rest}", "utf-8", "replace")
    content = {each.name: {"verdict": each.verdict, **each.numbers, "rows": each.rows} for each in found}
    text = json.dumps({"scope": scope(data), **content}, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "paper.json").write_text(text, "utf-8", "replace")
    for each in found:
        cells = [{k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()} for row in each.rows]
        with (folder / f"{each.name}.csv").open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.DictWriter(file, list(cells[0]) if cells else [])
            writer.writeheader()
            writer.writerows(cells)


def as_html(scope: str, found: Sequence[Finding]) -> Html:
    """The findings as the first section of the page."""
    rows = [
        element("tr", element("th", element("a", each.title, href=f"#{each.section}")), element("td", each.verdict))
        for each in found
    ]
    heading = element("h2", "What the paper asks, of this model")
    content = table(["finding", "what came of it"], rows)
    return element("section", heading, element("p", scope, class_="say"), content, id="paper")


if __name__ == "__main__":
    main()
