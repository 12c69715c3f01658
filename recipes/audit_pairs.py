"""What would each training pair do alone? One LoRA step per pair from a fixed model, as in SMDA (arXiv 2606.29171).

    python recipes/audit_pairs.py --config configs/quickstart.yaml --pairs builtin:quickstart/sft_pairs.jsonl

Copy it and make it yours: the model may come from anywhere, and the store can be read with a few lines. Run again with
the same --output, it goes on where it was stopped. ``smda audit`` does the same from the command line.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smda_callbacks import RunStore, load_config, write_report
from smda_callbacks.config.audit import carry_out, prepare_audit
from smda_callbacks.config.build import builtin_path
from smda_callbacks.report.ranking import ranked
from smda_callbacks.sinks.pair_table import pair_table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML; its audit section says what the update is")
    parser.add_argument("--pairs", required=True, help="JSONL with prompt/completion or messages")
    parser.add_argument("--model", help="model id or folder; default: model.id of the configuration")
    parser.add_argument("--output", default="runs/audit", help="folder for the store and the report")
    parser.add_argument("--by", default="refusal:harmful", help="what the printed pairs are ranked by")
    return parser.parse_args()


def main() -> None:
    """Load, audit, report."""
    args = arguments()
    config = load_config(args.config)
    source = builtin_path(args.model or config.model.id or "")
    if not source:
        raise SystemExit(f"{args.config} names no model. Next step: give --model, or set model.id.")

    job = prepare_audit(config, args.pairs, args.output)  # refuses before the model is loaded
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=config.model.dtype).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    carry_out(job, model, tokenizer)  # the model is afterwards what it was, bit for bit

    store = RunStore.open(args.output)
    table = pair_table(store.start, store.windows())
    if table is None:
        raise SystemExit("no pair could be measured: every reading failed. Next step: try one pair, on_error: raise.")
    print(f"pairs that move {args.by} most:")
    for row in ranked(table, store.policy, args.by, top=10):
        print(f"  row {row['rows'][0]:>4} {row['effect']:+.6f}  {row.get('kind', '')}")
    print(f"report: {write_report(args.output)}")


if __name__ == "__main__":
    main()
