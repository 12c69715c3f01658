"""LoRA fine-tuning with TRL, watched: what does this run do to refusals, and through which features?

    python recipes/sft_lora_refusal.py --config configs/quickstart.yaml --data builtin:quickstart/sft_pairs.jsonl
    python recipes/sft_lora_refusal.py --config configs/llama31_8b_instruct.yaml --data chats.jsonl --output runs/a

Copy it and make it yours. All of it is plain TRL but for the callback; training with it gives the same weights, bit for
bit, as training without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from smda_callbacks import SMDACallback, load_config
from smda_callbacks.config.build import builtin_path


def read_pairs(source: str) -> Dataset:
    """Prompt and completion, as messages, of a JSONL file or a data set (``owner/name`` or ``owner/name:split``)."""
    if source.endswith(".jsonl"):
        lines = Path(builtin_path(source)).read_text(encoding="utf-8").splitlines()
        rows: Any = [json.loads(line) for line in lines if line.strip()]
    else:
        name, _, split = source.partition(":")
        rows = load_dataset(name, split=split or "train")
    return Dataset.from_list([as_chat(row) for row in rows])


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """TRL applies the chat template to messages only: with plain strings it would train on text without a chat."""
    if "messages" in row:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if not isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": row["completion"]}
    return {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of the callback; its model.id is the default model")
    parser.add_argument("--data", required=True, help="JSONL with prompt/completion or messages, or a data set id")
    parser.add_argument("--model", help="model id or folder; default: model.id of the configuration")
    parser.add_argument("--output", default="runs/sft", help="folder for the adapter, the run store and the report")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; goes before --epochs")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=4, help="pairs per forward pass")
    parser.add_argument("--accumulation", type=int, default=4, help="forward passes per optimizer step")
    parser.add_argument("--max-length", type=int, default=1024, help="longer pairs are cut, in tokens")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    parser.add_argument("--lora-targets", default="all-linear", help="modules to adapt: all-linear, or a regex")
    parser.add_argument("--report-to", default="none", help="none or wandb")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Load, train, report."""
    args = arguments()
    config = load_config(args.config)
    source = builtin_path(args.model or config.model.id or "")
    if not source:
        raise SystemExit(f"{args.config} names no model. Next step: give --model, or set model.id.")

    set_seed(args.seed)  # before the model: the adapter's weights are drawn when the trainer is made
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=config.model.dtype)
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    callback = SMDACallback.from_config(config)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=read_pairs(args.data),
        args=SFTConfig(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,  # below 1: a share of all steps
            optim="adamw_torch",
            weight_decay=0.0,
            max_grad_norm=1.0,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulation,
            max_length=args.max_length,
            completion_only_loss=True,
            bf16=bf16,
            activation_checkpointing=bf16,  # less memory for more time; on a CPU memory is not what is short
            logging_steps=1,
            save_strategy="no",  # the adapter is saved at the end
            report_to=args.report_to,
            seed=args.seed,
            data_seed=args.seed,
        ),
        peft_config=LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules=args.lora_targets, task_type="CAUSAL_LM"
        ),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(args.output)

    from smda_callbacks import write_report

    if callback.run_folder is not None:  # only the main process of several has one
        print(f"report: {write_report(callback.run_folder)}")
        print(f"to recompute every number of it: smda verify {callback.run_folder}")


if __name__ == "__main__":
    main()
