"""How far may one training step's ΔX be believed, and which policy settings make it most believable? Measure it.

    python recipes/evidence_pathways.py --model my-model --pairs pairs.jsonl --chats chats.jsonl --sae-out saes \\
        --probes harmful.csv:jailbreakbench --probes borderline.csv:xstest:6 --probes benign.json:instructions:100 \\
        --json evidence.json

The defaults of ``policy.support``, ``policy.min_active`` and ``policy.lam_tolerance`` come from this script. From top
to bottom:

1. Train SAEs of three kinds with recipes/train_sae.py (kept in ``--sae-out`` and reused from there).
2. From one and the same start, take one LoRA step on each of a few pairs, at two step sizes, and read all probes.
   B starts at zero, so that a first AdamW step moves each of its entries by the learning rate.
3. Table: the plain ΔX of a step against its magnitude part: delta-FVU, reliability, r (see recipes/evidence_maths.py).
4. Sweep: support, penalty and selection of features, on the readings of step 2; a setting by a stated rule. Confirm it
   on other pairs and SAEs (``--skip``, ``--seed`` and another ``--sae-out``): it was chosen on these.

``--quick``: 6 pairs, a coarse sweep and short SAE trainings, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, too

from recipes.evidence_maths import Choice, Figures, choose, figures, fit_quality, recommend, table
from recipes.train_sae import SAEOptions, default_layer, make_sae, messages_of, read_rows, tokenize_chats
from smda_callbacks.maths.pathways import State
from smda_callbacks.maths.ridge import lambda_grid
from smda_callbacks.observe.features import encoder
from smda_callbacks.observe.guard import weights_restored
from smda_callbacks.observe.health import sae_health
from smda_callbacks.observe.instrument import Instrument, build_instrument
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.observe.probes import ProbeSet, check_probes, load_rows, sample_per_category
from smda_callbacks.observe.sae import SAEHandle, load_sae
from smda_callbacks.records import Array

STEP_SIZES = (2e-4, 1e-3)
SUPPORTS = (16, 32, 64, 128, 256)
LAMS = tuple(lambda_grid()[6:12].tolist())  # 10 to 3000
TOLERANCES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHARES = (0.05, 0.1, 0.2, 0.3)
ACTIVE = (4, 8, 16, 32)
DESIGNED = Choice(support=64, lam=1000.0)
PROPOSED = Choice(support=16, tolerance=0.2, rule="r2")

#: Name in the tables -> architecture of recipes/train_sae.py. BatchTopK is saved as JumpReLU.
KINDS = {"ReLU (standard)": "standard", "JumpReLU (from BatchTopK)": "batchtopk", "TopK": "topk"}


@dataclass(frozen=True)
class Seen:
    """What every SAE needs of a reading: residual stream ``[probe, d_in]`` and scores ``[probe, behaviour]``."""

    hidden: Tensor
    y: Array

    def state(self, handle: SAEHandle) -> State:
        """The whole dictionary of an SAE."""
        with torch.no_grad():
            pre, gate = encoder(handle)(self.hidden)
        return State(pre.double().cpu().numpy(), gate.double().cpu().numpy(), self.y)


# 1. SAEs --------------------------------------------------------------------------------------------------------------


def sae_of_kind(kind: str, model: Any, tokenizer: Any, args: argparse.Namespace) -> SAEHandle:
    """The SAE of this kind in ``args.sae_out``, trained now unless it is there."""
    architecture = KINDS[kind]
    folder = Path(args.sae_out) / architecture
    if not (folder / "cfg.json").is_file():
        ids = tokenize_chats(tokenizer, [messages_of(row) for row in read_rows(args.chats or args.pairs)], args.context)
        options = SAEOptions(
            architecture=architecture,
            d_sae=args.d_sae,
            k=args.k,
            l1=args.l1,
            tokens=args.tokens,
            lr=2e-3,
            seed=args.seed,
            device=args.device,
        )
        layer = default_layer(model) if args.layer is None else args.layer
        names = {"model_name": args.model, "tokenizer": tokenizer, "context": args.context}
        print(f"{kind}: {make_sae(model, ids, options, folder, layer=layer, **names)}")
    return load_sae(folder, device=args.device)


# 2. One step per pair -------------------------------------------------------------------------------------------------


def with_lora(model: Any, *, rank: int = 8, seed: int = 0) -> Any:
    """The model with LoRA on all linear layers, B at zero."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def pair_loss(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> Tensor:
    """Mean cross-entropy of the last message given those before it."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template changes the prompt when an answer follows; this recipe cannot mask it.")
    ids, start = (tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in (whole, prompt))
    labels = ids.clone()
    labels[:, : start.shape[1]] = -100
    device = next(model.parameters()).device
    loss: Tensor = model(input_ids=ids.to(device), labels=labels.to(device)).loss
    return loss


def after_each_pair(
    instrument: Instrument, model: Any, tokenizer: Any, chats: Sequence[list[dict[str, str]]], lr: float
) -> Iterator[Seen]:
    """What the probes show after one AdamW step on each pair alone, always from the same weights."""
    parameters = trained_parameters(model)
    for messages in chats:
        with weights_restored(parameters):
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
            pair_loss(model, tokenizer, messages).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield see(instrument, model)


def see(instrument: Instrument, model: Any) -> Seen:
    """Read the probes."""
    reading = instrument.read(model)
    return Seen(reading.hidden, instrument.scores(reading))


# 3. and 4. Figures ----------------------------------------------------------------------------------------------------


def delta_fvu(handle: SAEHandle, before: Seen, afters: Sequence[Seen]) -> tuple[float, float]:
    """Mean over steps of delta-FVU: (plain, at fixed gates)."""
    health = [sae_health(handle, s.hidden, start=before.hidden, before=before.hidden) for s in afters]
    plain, magnitude = np.mean([(h.delta_fvu or 0.0, h.delta_fvu_magnitude or 0.0) for h in health], axis=0)
    return float(plain), float(magnitude)


def settings_of(quick: bool) -> list[Choice]:
    """The sweep: support × penalty; around the defaults also min_active and the selection of features."""
    supports, fixed = ((16, 64), LAMS[4:5]) if quick else (SUPPORTS, LAMS)
    penalties = [{"lam": lam} for lam in fixed]
    penalties += [{"rule": "error", "tolerance": t} for t in TOLERANCES]
    penalties += [{"rule": "r2", "tolerance": t} for t in SHARES]
    sweep = [Choice(support=support, **penalty) for support in supports for penalty in penalties]
    near = [Choice(support=support, lam=LAMS[4]) for support in supports[:3]]
    sweep += [replace(one, min_active=least) for one in near for least in ACTIVE]
    return sweep + [replace(one, selection="variance") for one in near]


def judge(
    kind: str,
    handle: SAEHandle,
    before: Seen,
    afters: dict[float, list[Seen]],
    groups: np.ndarray,
    choices: Sequence[Choice],
) -> list[dict[str, Any]]:
    """One row per choice and step size, with all figures."""
    start = before.state(handle)
    quality = {choice: fit_quality(start.x, start.y, choice, groups) for choice in tqdm(choices, f"{kind}: fits")}
    rows = []
    for lr, seen in afters.items():
        ends = [each.state(handle) for each in seen]
        fvu = dict(zip(("delta_fvu_plain", "delta_fvu"), delta_fvu(handle, before, seen), strict=True))
        known: dict[Choice, Figures] = {}  # several rules end at the same λ
        for choice in tqdm(choices, f"{kind}: steps of {lr:g}"):
            policy = choose(start.x, start.y, choice)
            same = replace(choice, lam=round(policy.lam, 6), tolerance=0.0, rule="error")
            if same not in known:
                known[same] = figures(start, ends, policy, groups, seeds=range(4))
            r2 = dict(zip(("r2_loo", "r2_cv"), quality[choice], strict=True))
            row = {"sae": kind, "step_size": lr, "features": len(policy.features), "chosen_lam": policy.lam}
            rows.append(row | asdict(choice) | fvu | r2 | asdict(known[same]))
    return rows


# Command line ---------------------------------------------------------------------------------------------------------


def read_probes(sources: Sequence[str]) -> ProbeSet:
    """Probes of ``FILE:FORMAT`` or ``FILE:FORMAT:MOST``, at most MOST of each category."""
    probes = []
    for source in sources:
        name, layout, *most = source.split(":")
        rows = load_rows(name, format=layout)
        probes += sample_per_category(rows, int(most[0])) if most else rows
    return check_probes(probes)


def report(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the tables and the recommended setting, write everything."""
    names = ("support", "min_active", "lam", "rule", "tolerance", "selection")
    best = recommend([row for row in rows if row["lam"] is None], names)
    out.write_text(json.dumps({"rows": list(rows), "recommended": best}, indent=1), encoding="utf-8")
    shown = {"Fixed: support 64, λ 1000": asdict(DESIGNED), "Proposed defaults": asdict(PROPOSED)}
    for title, choice in (shown | ({f"Recommended here: {best}": best} if best else {})).items():
        print(f"\n{title}\n\n{table([row for row in rows if all(row[name] == choice[name] for name in names)])}")
    if best is None:
        print("\nNo automatic setting of the sweep meets both targets for every SAE and step size on these pairs.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model id or folder")
    parser.add_argument(
        "--pairs", required=True, help="JSONL with prompt and completion, or messages: one step on each"
    )
    parser.add_argument("--probes", required=True, action="append", metavar="FILE:FORMAT[:MOST]", help="repeatable")
    parser.add_argument("--chats", help="chats to train the SAEs on; default: the pairs")
    parser.add_argument("--sae-out", required=True, help="folder of the SAEs; those that are there are used")
    parser.add_argument("--json", required=True, help="file to write every figure to")
    parser.add_argument("--take", type=int, default=24, help="number of pairs")
    parser.add_argument("--skip", type=int, default=0, help="pairs to pass over first")
    parser.add_argument("--layer", type=int, help="decoder layer, from 0; default: at 60%% of the depth")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=24, help="active features (topk, batchtopk)")
    parser.add_argument("--l1", type=float, default=3.0, help="higher: sparser (standard); aim at an L0 near --k")
    parser.add_argument("--tokens", type=int, default=400_000, help="activations to train an SAE on")
    parser.add_argument("--context", type=int, default=512, help="longest chat in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the SAEs and of LoRA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    return parser.parse_args()


def main() -> None:
    """Read the arguments, measure, print, write."""
    args = arguments()
    if args.quick:
        args.take, args.tokens = min(args.take, 6), min(args.tokens, 50_000)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    handles = {kind: sae_of_kind(kind, model, tokenizer, args) for kind in KINDS}
    probes = read_probes(args.probes)
    model = with_lora(model, seed=args.seed)
    instrument = build_instrument(model, tokenizer, handles["TopK"], probes)
    chats = [messages_of(row) for row in read_rows(args.pairs)][args.skip : args.skip + args.take]
    before = see(instrument, model)
    afters = {}
    for lr in STEP_SIZES:
        steps = after_each_pair(instrument, model, tokenizer, chats, lr)
        afters[lr] = list(tqdm(steps, f"steps of {lr:g}", total=len(chats)))
    choices = list(dict.fromkeys([DESIGNED, *settings_of(args.quick)]))
    rows = [row for kind in KINDS for row in judge(kind, handles[kind], before, afters, probes.groups, choices)]
    print(f"{len(probes)} probes in {len(probes.categories)} categories, {len(chats)} pairs")
    report(rows, Path(args.json))


if __name__ == "__main__":
    main()
