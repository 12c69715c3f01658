"""Which engine attributes the pairs of a run: what was asked for, or the cheapest that is right, or none, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from smda_callbacks.observe.activations import HookSite, decoder_layers
from smda_callbacks.observe.divided import is_divided
from smda_callbacks.observe.lora import AttributionError, lora_sites
from smda_callbacks.observe.preference import scores_texts
from smda_callbacks.observe.probe_gradients import check_differentiable
from smda_callbacks.observe.updates import check_optimizer

EngineName = Literal["auto", "ghost", "exact", "off"]
ENGINES: tuple[EngineName, ...] = ("auto", "ghost", "exact", "off")


@dataclass(frozen=True)
class AttributionOptions:
    """How training pairs are attributed.

    ``engine``: ``ghost`` (first order, through gradients), ``exact`` (every pair's update applied and measured),
    ``off``, or ``auto``: the cheaper one, off where neither can be right. ``every``: attribute every so many windows.
    ``features``: how many of the policy's features to attribute, the largest coefficients first, or which ones (SAE
    indices); None: all. ``renew``: of how many the gradients through pre-activations are taken anew at every reading,
    in turn; None: of all.
    ``momentum``: ``carry`` books what a gradient does through the momentum in later steps to its pair, as far as memory
    allows; ``line`` leaves it in a line of its own. ``memory_gib``: most memory for gradients of pairs, of a step and
    of those carried, each. ``intended``: how many features a pair is said to be about. ``text``: keep the pairs' text
    in the store. ``id_column``: a column of the data set that names its pairs.
    """

    engine: EngineName = "auto"
    every: int = 1
    features: int | tuple[int, ...] | None = 8
    renew: int | None = 1
    momentum: Literal["carry", "line"] = "carry"
    memory_gib: float = 4.0
    intended: int = 4
    text: bool = True
    id_column: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"attribution.engine is {self.engine!r}. Allowed: {', '.join(ENGINES)}.")
        for name in ("every", "intended"):
            if getattr(self, name) < 1:
                raise ValueError(f"attribution.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("features", "renew"):
            if isinstance(getattr(self, name), int) and getattr(self, name) < 1:
                raise ValueError(f"attribution.{name} must be at least 1, or null for all, got {getattr(self, name)}.")
        if not self.memory_gib > 0:
            raise ValueError(f"attribution.memory_gib must be above 0, got {self.memory_gib}.")

    @property
    def limit(self) -> int:
        """Most bytes of gradients to hold."""
        return int(self.memory_gib * 2**30)


@dataclass(frozen=True)
class Choice:
    """The engine of a run. ``why`` is for the log and the manifest."""

    engine: Literal["ghost", "exact", "off"]
    why: str


def choose_engine(
    options: AttributionOptions,
    model: nn.Module,
    optimizer: Any,
    args: Any,
    columns: Any,
    site: HookSite,
    every: int = 1,
) -> Choice:
    """Choose the engine before training.

    Args:
        columns: names of the prepared data set's columns, None for a stream.
        every: optimizer steps per window.

    Raises:
        AttributionError: the engine that was asked for by name cannot be right here; says why.
    """
    if options.engine == "off":
        return Choice("off", "attribution.engine is off")
    several = args.world_size > 1
    try:
        check_training(args, columns)
        check_model(model)
        if several and options.engine == "exact":
            raise AttributionError(
                "engine exact reads the probes with weights that other processes do not have. Allowed here: ghost."
                " Next step: set attribution.engine: ghost."
            )
        check_optimizer(optimizer, lora_sites(model))
        if several or options.engine == "ghost":
            check_differentiable(model)
    except AttributionError as error:
        if options.engine != "auto":
            raise
        return Choice("off", str(error))
    if options.engine != "auto":
        return Choice(options.engine, f"attribution.engine is {options.engine}")
    if several:
        return Choice("ghost", "training runs on several processes, where only ghost attributes")
    return _cheaper(options, model, args, site, every)


def check_training(args: Any, columns: Any) -> None:
    """Refuse trainings in which a step's pairs cannot be told apart, or hooks would change the training.

    Raises:
        AttributionError: names what.
    """
    faults: dict[str, Callable[[], bool]] = {
        "torch.compile would compile another graph around hooks, and training would change": lambda: bool(
            getattr(args, "torch_compile", False)
        ),
        "fp16 scales losses by a factor that is not known here": lambda: bool(args.fp16),
        "several devices in one process (DataParallel) split a batch behind our back": lambda: (
            getattr(args, "n_gpu", 1) > 1
        ),
        # accelerate's own configuration is in the second alone
        "DeepSpeed steps inside the backward pass": lambda: any(
            getattr(args, name, None) for name in ("deepspeed", "deepspeed_plugin")
        ),
        f"the data set has the columns {columns}{_kind(columns)} and no input_ids, so a step's pairs cannot be "
        "recognised": lambda: columns is not None and "input_ids" not in columns,
    }
    for text, holds in faults.items():
        if holds():
            raise AttributionError(f"{text}. Next step: change that, or set attribution.engine: off.")


def check_model(model: nn.Module) -> None:
    """Refuse a reward model, whatever its data look like: an example of preference is two texts, a pair of pairs.
    And one whose weights are divided over processes: no process has whole gradients.

    Raises:
        AttributionError: says why.
    """
    if is_divided(model):
        raise AttributionError(
            "the model's weights are divided over processes, and no process has the whole gradient of a pair. Allowed "
            "on several processes: DDP. Next step: use it, or set attribution.engine: off."
        )
    if scores_texts(model):
        raise AttributionError(
            "this is a reward model: it learns from two answers at once, whose parts in a step are not told apart. "
            "Next step: set attribution.engine: off."
        )


#: Columns of prepared data sets that tell what trains on them; the first that fit.
KINDS = (
    ({"prompt_ids", "chosen_ids", "rejected_ids"}, "preference training as DPO's, where a pair is two answers"),
    ({"chosen_ids", "rejected_ids"}, "a reward model's training, where a pair is two answers"),
    ({"prompt_ids", "completion_ids", "label"}, "KTO's training, where an answer is liked or not"),
    ({"prompt"}, "online training as GRPO's, where answers are made during training"),
)


def _kind(columns: Any) -> str:
    """What sort of training these columns are of, as part of a sentence; empty where they do not tell."""
    return next((f" of {text}," for wanted, text in KINDS if wanted <= set(columns or ())), "")


def _cheaper(options: AttributionOptions, model: nn.Module, args: Any, site: HookSite, every: int) -> Choice:
    """By the number of probe readings that each engine costs per window; a backward pass counts as two."""
    pairs = int(args.per_device_train_batch_size) * int(args.gradient_accumulation_steps) * every
    depth = (site.layer + 1) / len(decoder_layers(model))
    chosen = len(options.features) if isinstance(options.features, tuple) else options.features
    ghost = 3 + 2 * depth * min(each for each in (chosen, options.renew, 16) if each is not None)
    exact = 3 * pairs + 4
    said = f"about {ghost:.0f} probe readings per attributed window, exact about {exact:.0f}"
    try:
        check_differentiable(model)
    except AttributionError as error:
        return Choice("exact", f"gradients through the probes are not possible here ({error}); {said}")
    return Choice("ghost", f"ghost costs {said}") if ghost <= exact else Choice("exact", f"ghost would cost {said}")
