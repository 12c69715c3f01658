"""Gradients of single training examples, taken from the trainer's own forward and backward passes.

Nothing is computed twice: the hooks see what every LoRA matrix gets in and which gradient comes back, and sum that per
example instead of over the batch. Also kept is the residual stream at the SAE's hook where the example's prompt ends:
it tells which features the example was about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smda_callbacks.observe.activations import HookSite, find_module, unwrap
from smda_callbacks.observe.features import Readout
from smda_callbacks.observe.lora import AttributionError, LoraSite, Tap, per_row
from smda_callbacks.observe.sequences import BatchWatch, Sequence, find_prompt_end


@dataclass(frozen=True)
class Captured:
    """The examples of one optimizer step, in the order in which they went through the model.

    ``gradients``: per site ``[example, out * in]``, as they came: before clipping, divided by whatever the loss divides
    by. ``prompts``: per example the residual stream over its read-out span ``[token, d_model]``, None where the prompt
    is not known.
    """

    examples: tuple[Sequence, ...]
    gradients: tuple[Tensor, ...]
    prompts: tuple[Tensor | None, ...]

    @property
    def bytes(self) -> int:
        """Memory of the gradients."""
        return sum(each.element_size() * each.numel() for each in self.gradients)

    def to(self, device: torch.device) -> Captured:
        """The same on another device."""
        gradients = tuple(each.to(device) for each in self.gradients)
        prompts = tuple(None if each is None else each.to(device) for each in self.prompts)
        return Captured(self.examples, gradients, prompts)


class PairCapture:
    """Captures the training examples of a step. Attach it before the step's first forward pass, stop it before the
    optimizer's step, ask it afterwards. Nothing is captured outside of a step.

    A training that breaks off tells nobody. The hooks that it leaves on the model take themselves off at the model's
    next forward pass.

    Args:
        training: whether the training that is watched still runs, asked before every forward pass of the model.
        limit: most bytes of gradients to hold; a step that needs more is given up (``take`` raises), training is not.
        site: where the SAE reads.
        marker: tokens that stand where an answer begins, for data whose labels do not tell.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: tuple[LoraSite, ...],
        *,
        site: HookSite,
        readout: Readout,
        limit: int,
        marker: tuple[int, ...] | None = None,
        training: Callable[[], bool] = lambda: True,
    ) -> None:
        self.sites, self.readout, self.limit, self.marker = sites, readout, limit, marker
        self._training, self._in_step = training, False
        self._watch = BatchWatch(model, self._begin, self._is_wanted)
        self._tap = Tap(sites, self._consume, listening=self._is_listening, recomputed=_checkpoints(model))
        self._layer, self._kind = find_module(model, site), site.kind
        self._layer_hook: Any = None
        self._expected: list[Sequence] | None = None  # examples of the micro-batch that is going through
        self._shape: tuple[int, ...] = ()
        self._row_each = False  # whether every example has a batch row of its own
        self._error: str | None = None
        self._parts: list[list[Tensor]] = []  # per site, a tensor per micro-batch
        self._clear()

    def attach(self) -> None:
        """Hook the model, and start a step: forget the last one. The hooks stay on until ``detach``."""
        self._clear()
        self._in_step = True
        self._watch.attach()
        self._tap.attach()
        if self._layer_hook is None:
            layer, before = self._layer, self._kind == "resid_pre"
            register: Any = layer.register_forward_pre_hook if before else layer.register_forward_hook
            self._layer_hook = register(self._before_layer if before else self._after_layer, with_kwargs=True)

    def stop(self) -> None:
        """The step's passes are over: look at nothing until the next ``attach``."""
        self._expected, self._in_step = None, False
        self._tap.forget()

    def detach(self) -> None:
        """Take all hooks off; what was captured stays until the next step."""
        self.stop()
        self._watch.detach()
        self._tap.detach()
        if self._layer_hook is not None:
            self._layer_hook.remove()
            self._layer_hook = None

    def take(self) -> Captured:
        """What was captured since ``attach``.

        Raises:
            AttributionError: nothing, not all, or more than ``limit`` was captured; says which.
        """
        if self._error:
            raise AttributionError(self._error)
        counts = {sum(len(part) for part in parts) for parts in self._parts}
        if counts != {len(self._examples)} or not self._examples:
            raise AttributionError(
                f"{len(self._examples)} training examples went through the model, but gradients came back for "
                f"{sorted(counts)} of them: some LoRA matrix is called otherwise than once per forward pass."
            )
        gradients = tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self._parts)
        return Captured(tuple(self._examples), gradients, tuple(self._prompts))

    def release(self) -> None:
        """Let go of the gradients that ``take`` has given."""
        self._parts = [[] for _ in self.sites]

    def _clear(self) -> None:
        self._expected, self._shape, self._error = None, (), None
        self._examples: list[Sequence] = []
        self._prompts: list[Tensor | None] = []
        self._parts = [[] for _ in self.sites]
        self._held = 0

    def _is_wanted(self) -> bool:
        """Whether a forward pass that begins now belongs to a step; takes the hooks off where training is over."""
        if self._training():
            return self._in_step
        self.detach()
        self._clear()
        return False

    def _begin(self, examples: list[Sequence], shape: tuple[int, ...]) -> None:
        # An exception inside a hook would end the training: it is kept for ``take``.
        try:
            self._expect(examples, shape)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._expected = None
        self._error = f"gradients of pairs could not be captured ({type(error).__name__}: {error})"

    def _expect(self, examples: list[Sequence], shape: tuple[int, ...]) -> None:
        known = [self._with_prompt(each) for each in examples]
        self._expected, self._shape = known, tuple(shape)
        self._row_each = [each.row for each in known] == list(range(shape[0]))
        self._examples += known
        self._prompts += [None] * len(examples)

    def _with_prompt(self, example: Sequence) -> Sequence:
        if example.prompt_end is not None or self.marker is None:
            return example
        end = find_prompt_end(example.tokens, self.marker)
        return example if end is None else replace(example, prompt_end=example.start + end)

    def _is_listening(self) -> bool:
        return self._expected is not None and self._error is None

    def _consume(self, number: int, seen: Tensor, gradient: Tensor) -> None:
        try:
            self._add(number, seen, gradient)
        except Exception as error:
            self._fail(error)

    def _add(self, number: int, seen: Tensor, gradient: Tensor) -> None:
        if self._expected is None or self._error:
            return
        if seen.shape[:2] != self._shape:
            self._error = (
                f"{self.sites[number].name} got an input of shape {list(seen.shape)} for a batch of {list(self._shape)}"
                " tokens; allowed is one row per example, or per packed row."
            )
            return
        rows = self._rows(seen, gradient)
        self._held += rows.element_size() * rows.numel()
        if self._held > self.limit:
            self._error = (
                f"the gradients of this step's pairs need more than the {self.limit / 2**30:.3g} GiB of "
                "attribution.memory_gib. Next step: raise it, train smaller batches, or train fewer LoRA matrices."
            )
            self._parts = [[] for _ in self.sites]
            return
        self._parts[number].append(rows)

    def _rows(self, seen: Tensor, gradient: Tensor) -> Tensor:
        """Gradients of the expected examples, ``[example, out * in]``."""
        assert self._expected is not None
        if self._row_each:
            return per_row(seen, gradient)  # gradients are zero on padding
        places = [(slice(each.row, each.row + 1), slice(each.start, each.stop)) for each in self._expected]
        return torch.cat([per_row(seen[place], gradient[place]) for place in places])

    def _after_layer(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._keep(output)

    def _before_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep(args[0] if args else kwargs.get("hidden_states"))

    def _keep(self, output: Any) -> None:
        try:
            self._keep_prompts(output)
        except Exception as error:
            self._fail(error)

    def _keep_prompts(self, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        if not isinstance(stream, Tensor) or stream.dim() != 3:  # of no model that the SAE can be read from
            return
        if self._expected is None or not torch.is_grad_enabled() or stream.shape[:2] != self._shape:
            return
        first = len(self._examples) - len(self._expected)
        for number, each in enumerate(self._expected):
            if each.prompt_end is not None:
                begin = each.prompt_end if self.readout == "last" else each.start
                self._prompts[first + number] = stream[each.row, begin : each.prompt_end + 1].detach().clone()


def _checkpoints(model: nn.Module) -> bool:
    """Whether the model recomputes its forward pass in the backward pass."""
    inner = unwrap(model)
    name = "is_activation_checkpointing"  # until transformers 5.23 the other one
    return bool(getattr(inner, name if hasattr(type(inner), name) else "is_gradient_checkpointing", False))
