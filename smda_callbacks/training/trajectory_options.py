"""What the user says about keeping a run's steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrajectoryOptions:
    """Whether the run's steps are kept, for ``smda rescore``.

    ``keep``: record them in the run store. ``every``: the weights and the optimizer's state after every so many steps;
    those in between are computed again later. ``max_gib``: refuse a run that would take more room.
    """

    keep: bool = False
    every: int = 1
    max_gib: float = 20.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"trajectory.every must be at least 1, got {self.every}.")
        if not self.max_gib > 0:
            raise ValueError(f"trajectory.max_gib must be above 0, got {self.max_gib}.")
