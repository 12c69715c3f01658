"""The examples of a step that several processes train on together (DDP), brought to the one that attributes them.

Every process captures the gradients of its own examples, from its own backward pass; after the optimizer's step they
travel over the team's group. What the optimizer was given is the mean over processes, so each gradient counts for one
part in as many as there are processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from smda_callbacks.observe.lora import AttributionError
from smda_callbacks.observe.pair_gradients import Captured, PairCapture
from smda_callbacks.observe.sharding import Failure, Team, told


class TeamCapture:
    """A :class:`PairCapture` on the main process that takes the examples of all processes.

    ``promised``: the others were told that their examples are wanted, until they are told otherwise. They send after
    every step, so the main process receives after every step, whatever else goes wrong: see ``settle``.
    """

    def __init__(self, own: PairCapture, team: Team) -> None:
        self._own, self._team = own, team
        self.promised = self._received = False

    def attach(self) -> None:
        self._own.attach()

    def stop(self) -> None:
        self._own.stop()

    def detach(self) -> None:
        self._own.detach()

    def release(self) -> None:
        self._own.release()

    def take(self) -> Captured:
        """The step's examples on all processes, in the order of their ranks.

        Raises:
            AttributionError: some process could not capture its own; says which.
        """
        own = captured_or_why(self._own)
        found = [own, *self._receive()]
        failures = [f"process {rank}: {each.text}" for rank, each in enumerate(found) if isinstance(each, Failure)]
        if failures:
            raise AttributionError("; ".join(failures))
        return _together([each for each in found if isinstance(each, Captured)])

    def settle(self) -> None:
        """The step is over: receive what was promised and not taken."""
        if self.promised and not self._received:
            self._receive()
        self._received = False

    def _receive(self) -> list[Captured | Failure]:
        self._received = True
        return self._team.gather(None)[1:]


class PairSender:
    """What another process does for it: the events of a step, as the attributor of the main process has them.

    ``make`` makes its capture. Whatever fails is sent in place of the examples: the main process waits for one of them.
    """

    def __init__(self, make: Callable[[], PairCapture], team: Team) -> None:
        self._make, self._team = make, team
        self._capture: PairCapture | None = None
        self._fault: Failure | None = None

    def begin_step(self) -> None:
        try:
            self._capture = self._capture or self._make()
            self._capture.attach()
        except Exception as error:
            self._fault = Failure(told(error))

    def before_step(self) -> None:
        if self._capture is not None:
            self._capture.stop()

    def after_step(self) -> None:
        """Send this process's examples, or why there are none."""
        if self._fault is not None or self._capture is None:
            found: Captured | Failure = self._fault or Failure("the step's beginning was not seen")
        else:
            found = captured_or_why(self._capture, torch.device("cpu"))
        self._fault = None
        self._team.gather(found)
        if self._capture is not None:
            self._capture.release()

    def end(self) -> None:
        """The examples are no longer wanted."""
        if self._capture is not None:
            self._capture.detach()


def captured_or_why(capture: PairCapture, device: torch.device | None = None) -> Captured | Failure:
    """What a process captured, on ``device`` if one is given; an error would leave the others waiting."""
    try:
        found = capture.take()
        return found if device is None else found.to(device)
    except AttributionError as error:
        return Failure(str(error))
    except Exception as error:
        return Failure(told(error))


def _together(found: list[Captured]) -> Captured:
    device, size = found[0].gradients[0].device, len(found)
    moved = [each.to(device) for each in found]
    return replace(
        moved[0],
        examples=tuple(example for each in moved for example in each.examples),
        gradients=tuple(torch.cat(rows).div_(size) for rows in zip(*(each.gradients for each in moved), strict=True)),
        prompts=tuple(prompt for each in moved for prompt in each.prompts),
    )
