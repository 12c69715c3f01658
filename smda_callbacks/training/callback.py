"""The callback: the order of events, and nothing else.

What a trainer does, with the points where the callback acts marked ``*``::

    on_train_begin           * check everything, distil or load the policy, measure the noise floor, open the sinks
    for every epoch:
        for every optimizer step:
            on_step_begin          * hooks on: which pairs, and their gradients
            for every micro-batch: forward, backward          (gradient accumulation repeats this)
            clip gradients
            on_pre_optimizer_step  * hooks off, note the learning rate
            optimizer step
            on_optimizer_step      * split the update over the pairs
            scheduler step, zero gradients
            on_step_end      * every k steps: read the probes, book the window; the noise floor anew after 4, 8, 16, ...
            on_log           * note the loss
            on_save          * leave a note of the run in the checkpoint
        on_epoch_end         * stopped early: book what is left
    on_train_end             * book what is left, close the sinks

Where the run's steps are kept (``trajectory.keep``), they are written between those points.

Under several processes each reads its share of the probes when the main one says so; only that one keeps books.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smda_callbacks.observe.divided import reshard
from smda_callbacks.observe.sharding import Team, join_team, told
from smda_callbacks.records import Alert, WindowRecord
from smda_callbacks.training.attribution_start import Trainer
from smda_callbacks.training.budget import Budget
from smda_callbacks.training.lines import (
    attribution_line,
    closing_line,
    group_means,
    opening_line,
    show_log,
    window_line,
)
from smda_callbacks.training.monitor import Monitor
from smda_callbacks.training.participant import Participant, leading
from smda_callbacks.training.plan import Plan
from smda_callbacks.training.requirements import require_lora, require_readable, require_whole_model
from smda_callbacks.training.resume import NotContinuedError, continued_line, find_earlier, tell_new_run, write_note

logger = logging.getLogger("smda_callbacks")

#: Below this mean refusal on the probes to refuse, the list of openings is more likely wrong than the model.
RARE = 0.02


def _together(event: Callable[..., None]) -> Callable[..., None]:
    """An event at which the main process may read the probes, and the others read with it."""

    @functools.wraps(event)
    def run(self: MeasuringCallback, *given: Any, **kwargs: Any) -> None:
        if self._participant is not None:
            self._participant.serve()
            event(self, *given, **kwargs)
            return
        with leading(self._team, self._captures):
            event(self, *given, **kwargs)

    return run


class MeasuringCallback(TrainerCallback):
    """Watches a LoRA run of :class:`~trl.SFTTrainer`, :class:`~transformers.Trainer`, or another trainer made of it
    (DPO, KTO, GRPO, Reward), by a :class:`Plan`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.monitor: Monitor | None = None
        self._team: Team | None = None
        self._participant: Participant | None = None
        self._trainer: dict[str, float] = {}
        self._skipped: list[int] = []
        self._booked = 0
        self._budget = Budget(plan.every, plan.overhead_budget)
        self._raised: Exception | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be measured, and take the baseline."""
        model, tokenizer = kwargs["model"], kwargs.get("processing_class")
        require_whole_model(model)
        reshard(model)  # a training before this one may have left weights gathered
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # the text part of a multimodal processor
        require_lora(model)
        require_readable(model)
        self._team = self._team or join_team()
        if not state.is_world_process_zero:
            if self._team is not None:
                self._participant = Participant(self.plan, model, tokenizer, self._team)
                self._participant.serve()
            return
        if self.monitor is not None and self.monitor.attributor is not None:
            self.monitor.attributor.end()  # a training that broke off: its hooks are still on
        show_log()
        self._trainer, self._skipped, self._booked, self._raised = {}, [], state.global_step, None
        self._budget = Budget(self.plan.every, self.plan.overhead_budget)
        rate = peak_learning_rate(kwargs.get("optimizer"), args)
        trainer = Trainer(args, kwargs.get("optimizer"), kwargs.get("train_dataloader"), tokenizer)
        with leading(self._team, self._captures):
            self.monitor = self._start(model, trainer, state.global_step, rate)
        logger.info(opening_line(self.monitor))
        logger.info(attribution_line(self.monitor))
        if group_means(self.monitor)[0] < RARE and not self.monitor.instrument.by_preference:
            logger.warning(
                "this model refuses almost none of the probes to refuse; smda check shows how it answers them"
            )
        self._budget.begin()

    def _start(self, model: nn.Module, trainer: Trainer, step: int, rate: float) -> Monitor:
        earlier = find_earlier(self.plan, trainer.args, step)
        if earlier is not None:
            try:
                monitor = Monitor(self.plan, model, trainer, step, rate, self._team, earlier)
            except NotContinuedError as error:
                tell_new_run(step, error)
            else:
                logger.info(continued_line(earlier))
                self._booked, self._skipped = earlier.past.booked, list(earlier.skipped)
                self._trainer = dict(earlier.trainer)
                self._budget.go_on(earlier.budget)
                return monitor
        return Monitor(self.plan, model, trainer, step, rate, self._team)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See which pairs go through the model."""
        self._pairs("begin_step")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The learning rate of this step; after it the scheduler has moved on."""
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self._trainer["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        self._pairs("before_step", optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What the step did to the weights, pair by pair."""
        self._pairs("after_step", kwargs.get("optimizer"))

    @_together
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Book a window every ``plan.every`` optimizer steps."""
        if self._raised is not None:
            raise self._raised
        if self.monitor is None:
            return
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self._skipped.append(state.global_step)
        # The last step is booked here: before on_train_end the trainer may load the best checkpoint in its place.
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last:
            self.monitor.recording.event("last_step")
        if last or self._budget.is_due(state.global_step - self._booked):
            record = self._book(self.monitor, kwargs["model"], state)
            if control.should_log:
                logger.info(window_line(self.monitor, record))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the loss and its step; alert when it or the gradient is not a number."""
        logs = kwargs.get("logs") or {}
        if self.monitor is None or "loss" not in logs:
            return
        # By default the trainer logs a loss that is not a number as 0; the norm of its gradient tells.
        bad = {name: logs[name] for name in ("loss", "grad_norm") if not math.isfinite(float(logs.get(name, 0.0)))}
        if bad:
            message = f"the training's {' and '.join(f'{k} is {v}' for k, v in bad.items())}: this run is diverging"
            self.monitor.alert(Alert(state.global_step, "loss_not_finite", message))
        else:
            self._trainer |= {"loss": float(logs["loss"]), "loss_step": float(state.global_step)}

    @_together
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave in the checkpoint which run it belongs to."""
        if self.monitor is None:
            return
        if control.should_training_stop:
            self._book_rest(kwargs["model"], state)
        checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        try:
            write_note(self.monitor, checkpoint, self._booked, self._skipped, self._trainer, self._budget.state())
        except Exception as error:
            if self.plan.on_error == "raise":
                raise
            logger.warning("no note was left in %s, so that a resume from it starts a new run: %s", checkpoint, error)

    @_together
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Book what is left where an evaluation has stopped training: the best checkpoint may be loaded next."""
        if control.should_training_stop:
            if self.monitor is not None:
                self.monitor.recording.event("last_step")
            self._book_rest(kwargs["model"], state)

    @_together
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Book the last, shorter window and close."""
        self._participant = None
        if self.monitor is None:
            return
        if args.load_best_model_at_end and state.global_step > self._booked:
            self.monitor.alert(lost_window(self._booked + 1, state.global_step))
        else:
            self._book_rest(kwargs["model"], state)
        end = self.monitor.finish(state.global_step)
        logger.info(closing_line(self.monitor, end.train_seconds))
        self.monitor = None

    def _pairs(self, event: str, *given: Any) -> None:
        """Tell attributor and recorder of an event; what goes wrong costs the window's pairs, never the training."""
        attributor = self.monitor.attributor if self.monitor is not None else None
        if self._participant is not None:
            getattr(self._participant, event)(*given)
        if self.monitor is not None:
            self.monitor.recording.event(event, *given)
        if attributor is None:
            return
        try:
            getattr(attributor, event)(*given)
        except Exception as error:
            if self.plan.on_error == "raise":
                if self._team is None:
                    raise
                self._raised = self._raised or error  # where the others can be told
            attributor.skip(told(error))

    def _book_rest(self, model: nn.Module, state: TrainerState) -> None:
        if self.monitor is not None and state.global_step > self._booked:
            self._book(self.monitor, model, state)

    def _captures(self) -> bool:
        attributor = self.monitor.attributor if self.monitor is not None else None
        return attributor is not None and attributor.promise()

    def _book(self, monitor: Monitor, model: nn.Module, state: TrainerState) -> WindowRecord:
        trainer = {**self._trainer, "epoch": float(state.epoch or 0.0)}
        record = monitor.measure(model, state.global_step, self._booked + 1, tuple(self._skipped), trainer)
        self._budget.note(record.seconds)
        self._booked, self._skipped = state.global_step, []
        return record


def lost_window(first: int, last: int) -> Alert:
    """An alert that the last steps are not measured, for the model is no longer the one that they led to."""
    text = (
        f"steps {first} to {last} are not measured: an evaluation stopped training, and the trainer loaded its best "
        "checkpoint before anything could be read. Next step: set measure.every: 1, or save_strategy: epoch or steps"
    )
    return Alert(last, "last_window_lost", text)


def peak_learning_rate(optimizer: Any, args: TrainingArguments) -> float:
    """The highest learning rate that the schedule starts from: the optimizer's own, where it is known."""
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return float(args.learning_rate)
    return max(float(group.get("initial_lr", group["lr"])) for group in groups)
