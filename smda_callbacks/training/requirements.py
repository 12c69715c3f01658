"""What a model has to be for its run to be watched; anything else is refused before training."""

from __future__ import annotations

from torch import nn

from smda_callbacks.observe.activations import unwrap
from smda_callbacks.observe.divided import division_fault
from smda_callbacks.observe.preference import has_language_head, scores_texts


class AdapterError(ValueError):
    """The model has nothing that a LoRA run would train."""


def require_whole_model(model: nn.Module) -> None:
    """Refuse, on every process, a model that is divided over processes otherwise than FSDP2 and ZeRO-3 do it.

    Raises:
        AdapterError: names the way.
    """
    fault = division_fault(model)
    if fault is not None:
        raise AdapterError(
            f"{fault}; readings are not made for that. Allowed: one process, DDP, FSDP2 (fsdp_config with version: 2), "
            "DeepSpeed ZeRO-1, ZeRO-2, and ZeRO-3 that divides every weight over all processes and keeps the parts in "
            "memory. Next step: use one of these, or train without the callback."
        )


def require_lora(model: nn.Module) -> None:
    """Refuse a model without a LoRA adapter.

    Raises:
        AdapterError: says what was found.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        raise AdapterError(
            f"{type(model).__name__} has no LoRA adapter. This library watches LoRA runs. Next step: pass peft_config "
            "to SFTTrainer, or wrap the model with get_peft_model before training."
        )
    kinds = {name: str(getattr(each.peft_type, "value", each.peft_type)) for name, each in adapters.items()}
    if set(kinds.values()) != {"LORA"}:
        raise AdapterError(f"the adapters are {kinds}. Allowed: LORA (rsLoRA and DoRA are). Next step: use LoraConfig.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError("no parameter of the model requires a gradient. Next step: make the adapter trainable.")


def require_readable(model: nn.Module) -> None:
    """Refuse a model that neither gives probabilities nor one score to an answer.

    Raises:
        AdapterError: says which.
    """
    if has_language_head(model):
        return
    inner = unwrap(model)
    labels = getattr(getattr(inner, "config", None), "num_labels", None)
    if not scores_texts(model) or labels != 1:
        found = f"its head gives {labels} numbers" if scores_texts(model) else "it has no head named score"
        raise AdapterError(
            f"{type(inner).__name__} has no language-model head, so it gives no probability to the openings of an "
            f"answer, which behaviours are scored by, and is no reward model: {found}. Allowed: causal language "
            "models, and reward models on a decoder with num_labels=1 (RewardTrainer). Next step: watch the run that "
            "trains such a model, and train this one without the callback."
        )
