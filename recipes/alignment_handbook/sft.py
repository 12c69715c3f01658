"""Supervised fine-tuning as in the alignment handbook: everything is said in a YAML file, and nothing here is watched.

    SMDA=1 python recipes/alignment_handbook/sft.py --config recipes/alignment_handbook/quickstart.yaml
    SMDA=1 accelerate launch recipes/alignment_handbook/sft.py --config recipes/alignment_handbook/config_lora.yaml
    SMDA=1 accelerate launch recipes/alignment_handbook/sft.py --config recipes/alignment_handbook/config_qlora.yaml

SMDA=1 makes ``smda``, in ``report_to`` of the YAML files, a name that transformers knows; ``env: {SMDA_CONFIG: ...}``
there says how to watch. Arguments after the file go before what it says. The handbook's own script asks for functions
that TRL no longer has; this one follows it with those of today.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)


def require_bitsandbytes(model_args: ModelConfig) -> None:
    """QLoRA's base model is held in 4 bits by bitsandbytes, which is not among the dependencies."""
    if (model_args.load_in_4bit or model_args.load_in_8bit) and find_spec("bitsandbytes") is None:
        sys.exit(
            "load_in_4bit needs bitsandbytes, which is not installed. Next step: pip install bitsandbytes, or LoRA."
        )


def main() -> None:
    """Load, train, save, evaluate."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    script_args, training_args, model_args, mixture = parser.parse_args_and_config()
    require_bitsandbytes(model_args)
    set_seed(training_args.seed)
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    data = get_dataset(mixture)
    evaluated = training_args.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        eval_dataset=data[script_args.dataset_test_split] if evaluated else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    result = trainer.train(resume_from_checkpoint=last_checkpoint(training_args))
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    if evaluated:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


def last_checkpoint(training_args: SFTConfig) -> str | None:
    """As in the handbook: go on from the last checkpoint in the output folder, if there is one."""
    found: str | None = training_args.resume_from_checkpoint or get_last_checkpoint(training_args.output_dir)
    return found


if __name__ == "__main__":
    main()
