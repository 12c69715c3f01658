"""Readings shared by several processes that hold the same model: each reads its batches, the first puts them together.

The first process leads. Before every reading it tells the others what to read; they answer with what they saw or why
they could not. Nobody waits for a process that failed, and nobody has to know when the next reading is due::

    process 0    tell(read) -> reads batches 0, 2, 4 ... -> gather -> assemble      (again, or) tell(done)
    process 1    hear       -> reads batches 1, 3, 5 ... -> gather -> hear          ... hears done: back to training

All processes make the same batches, so a batch is the same tensor whoever reads it, and a reading is bit for bit that
of one process. Objects travel over a group of processes of their own on the CPU: training's own are left alone.

Gradients are too large for that: each process keeps its sums, and when the first one knows that all have theirs, tells
them to add them up on it, tensor by tensor.

Where FSDP2 or ZeRO-3 divides the model over the processes, forward passes are made in step: before each, every process
says whether it can go on, and all leave the reading where one cannot. Only within a pass nobody can be told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smda_callbacks.maths.functionals import FunctionalSet
from smda_callbacks.observe.divided import BrokenPassError, InStep, LeftError, is_part, put_together, unbroken
from smda_callbacks.observe.reading import Part
from smda_callbacks.records import Array

#: How long to wait for the other processes to join, in seconds: they stand at the same line of the trainer.
JOIN_SECONDS = 300

#: How long a process waits for the first one, in seconds: it distils, and writes the run, on its own.
WAIT_SECONDS = 7200


class ProcessError(RuntimeError):
    """Another process cannot take part, or could not read its probes."""


@dataclass(frozen=True)
class Move:
    """A random update that all trained weights carry during a reading: draw number ``draw`` of ``seed``, ±``size``."""

    size: float
    seed: int
    draw: int


@dataclass(frozen=True, eq=False)
class Command:
    """What the first process tells the others.

    ``read``: read your batches, these SAE features (None: all), with weights moved by ``move``. ``gradients``: and keep
    the gradients that ``functionals``, of features divided by ``scale``, are made of. ``features``: keep those through
    your batches' pre-activations, whose ``slope`` is ``[functional, probe, feature]``. ``sum``: add what you keep up on
    the first process. ``weights``: help to put the weights of these ``names`` together. ``done``: go on with training;
    ``capture``: send what your examples' gradients are after every optimizer step. ``stop``: the first process gives
    up, ``text`` says why.
    """

    what: Literal["read", "gradients", "features", "sum", "weights", "done", "stop"]
    features: tuple[int, ...] | None = None
    move: Move | None = None
    functionals: FunctionalSet | None = None
    scale: Array | None = None
    slope: Array | None = None
    names: tuple[str, ...] = ()
    capture: bool = False
    text: str = ""


@dataclass(frozen=True)
class Failure:
    """Why a process could not do its part."""

    text: str


class Team:
    """The processes of a training, seen from one of them: ``rank`` of ``size``.

    ``devices``: the group over which tensors on devices other than the CPU travel; None: the same.
    """

    def __init__(self, rank: int, size: int, group: Any, devices: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group
        self._devices = group if devices is None else devices

    def tell(self, command: Command) -> None:
        """Send a command to the others; only the first process does."""
        dist.broadcast_object_list([command], src=0, group=self._group)

    def hear(self) -> Command:
        """Wait for the first process's next command."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._group)
        command: Command = heard[0]
        return command

    def share(self, items: Sequence[Any]) -> list[Any]:
        """This process's share of ``items``, dealt in turn."""
        return list(items[self.rank :: self.size])

    def agree(self, left: int) -> bool:
        """Whether all processes have as many batches ``left`` to read, and can; all call it at the same time.

        ``left``: below zero where this process cannot go on.
        """
        ends = torch.tensor([left, -left])
        dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=self._group)
        least, most = int(ends[0]), -int(ends[1])
        return 0 <= least == most

    def in_step(self, batches: int) -> InStep:
        """How to read ``batches`` together where the model is divided over the processes."""
        return InStep(math.ceil(batches / self.size), self.agree)

    def gather(self, found: Any) -> list[Any]:
        """What every process found, by rank, on the first process; nothing on the others."""
        everything: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(found, everything or None, dst=0, group=self._group)
        return everything

    def read(self, command: Command, own: Callable[[], list[Part]], *, divided: bool = False) -> list[Part]:
        """Have all processes read; returns all parts, on the device where this process finds its own.

        Args:
            divided: the model is divided over the processes, and ``own`` reads in step with the others.

        Raises:
            ProcessError: another process could not read. What this process raises comes through as it is.
            BrokenPassError: this process left the others in a forward pass.
        """
        self.tell(command)
        mine = self._own(own, divided)
        everything = self.gather([])  # also after a fault: the others are waiting
        if isinstance(mine, Exception) and not isinstance(mine, LeftError):
            try:
                raise mine
            finally:
                del mine  # or this frame and the error hold each other, and with them all that the pass had allocated
        failures = [f"process {k}: {found.text}" for k, found in enumerate(everything) if isinstance(found, Failure)]
        if failures:
            raise ProcessError(f"not every process could read its probes. {'; '.join(failures)}")
        if isinstance(mine, LeftError):
            raise ProcessError(
                "the processes have different numbers of batches to read. Next step: give every process the same "
                "configuration."
            )
        others = [part for found in everything if not isinstance(found, Failure) for part in found]
        return mine + [part.to(mine[0].hidden.device) for part in others]

    def answer(self, own: Callable[[], list[Part]], *, divided: bool = False) -> None:
        """Take part in a reading that was heard of; what goes wrong is sent, not raised."""
        found: Any = self._own(lambda: [part.to(torch.device("cpu")) for part in own()], divided)
        if isinstance(found, Exception):  # the error itself would hold on to what the pass has allocated
            # Where it left because another could not go on, that one says why.
            found = [] if isinstance(found, LeftError) else Failure(told(found))
        self.gather(found)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Add ``tensors`` of all processes up on the first one, in no certain order; on the others they are used up.

        Raises:
            ProcessError: the processes hold different tensors; nothing was added, and all know.
            BrokenPassError: it failed on this process while the others were in it.
        """
        if not self.agree(sum(each.numel() * each.element_size() for each in tensors)):
            raise ProcessError(
                "the processes hold gradients of different sizes. Next step: give each the same configuration."
            )
        try:
            for each in tensors:
                dist.reduce(each, dst=0, group=self._group if each.device.type == "cpu" else self._devices)
        except Exception as error:
            raise BrokenPassError(
                f"adding up the gradients of {self.size} processes failed on this one ({told(error)}), and the others "
                "wait for it, so training ends. Next step: look at the network, or set attribution.engine: off."
            ) from error

    def _own(self, own: Callable[[], list[Part]], divided: bool) -> list[Part] | Exception:
        """This process's parts, or why there are none; the others are told in time."""
        try:
            found = own()
        except BrokenPassError:
            raise
        except LeftError as error:
            return error
        except Exception as error:  # under no other name: it would hold on to what the pass has allocated
            if divided:
                self.agree(-1)
            return error
        if divided:
            self.agree(0)
        return found


def whole_weights(
    model: nn.Module, wanted: Sequence[Tensor], team: Team | None, keep: Callable[[Tensor], Tensor] = torch.Tensor.clone
) -> list[Tensor]:
    """What ``keep`` keeps of each of these weights of ``model``, put together where they are divided over processes.

    The first process calls it, and the others help. ``keep`` must not return a view: it would hold on to the whole.
    """
    if team is None or not any(map(is_part, wanted)):
        return [keep(put_together(each).detach()) for each in wanted]
    numbers = {id(each): name for name, each in model.named_parameters(remove_duplicate=False)}
    team.tell(Command("weights", names=tuple(numbers[id(each)] for each in wanted)))
    with unbroken("putting weights together"):
        return [keep(put_together(each).detach()) for each in wanted]


def help_with_weights(model: nn.Module, names: Sequence[str]) -> None:
    """What the other processes do at :func:`whole_weights`."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        put_together(weights[name])


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"


def join_team(*, join_seconds: float = JOIN_SECONDS) -> Team | None:
    """The team of this training's processes; None where there is one process. Every process must call it.

    Raises:
        ProcessError: not every process came: the callback was given to some of them only.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    try:
        # The first group only sees whether all are here: a wait as long as the second one's would look like a hang.
        seen = dist.new_group(backend="gloo", timeout=timedelta(seconds=join_seconds))
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WAIT_SECONDS))
        dist.destroy_process_group(seen)  # not before: another process may still be connecting to it
        # Of training's own backend; it connects at its first use.
        devices = None if dist.get_backend() == "gloo" else dist.new_group()
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the {dist.get_world_size()} processes of this training could not join to read the probes together within "
            f"{join_seconds:.0f} s ({told(error)}). Next step: give the callback to the trainer on every process, not "
            "only on the main one; on a machine with several network interfaces set GLOO_SOCKET_IFNAME."
        ) from error
    return Team(dist.get_rank(), dist.get_world_size(), group, devices)
