"""What a rescore has found so far, kept in the run store so that it can go on after a stop."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from smda_callbacks.observe.metagradient import Adjoint
from smda_callbacks.observe.optimizer_rules import Moments
from smda_callbacks.records import Array
from smda_callbacks.sinks import files
from smda_callbacks.sinks.rescored import FOLDER, PARTIAL
from smda_callbacks.sinks.trajectory import TrajectoryFolder, state_file

logger = logging.getLogger("smda_callbacks")

_PARTS = ("weight", "first", "second")


@dataclass(frozen=True)
class Partial:
    """``chunk`` of targets has come back to the state after ``step`` steps; ``influence [pair, target]`` so far.

    ``adjoint``: None where the chunk has not begun.
    """

    chunk: int
    step: int
    influence: Array
    seconds: float
    adjoint: Adjoint | None


def identity_of(folder: TrajectoryFolder, *settings: Any) -> str:
    """A hash of the trajectory, its last state among it, and of all that what is found depends on."""
    end = hashlib.sha256(state_file(folder.path, folder.last).read_bytes()).hexdigest()
    said = [files.read_json(folder.path / "meta.json"), folder.states, end, settings]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def write_partial(run: Path, identity: str, state: Partial) -> None:
    """Write what is found so far, whole or not at all."""
    (run / FOLDER).mkdir(exist_ok=True)
    tensors = {"influence": torch.from_numpy(state.influence.copy())}
    for number, site in enumerate(state.adjoint.sites if state.adjoint else ()):
        for part in _PARTS:
            value: Tensor | None = getattr(site, part)
            if value is not None:
                tensors[f"{part}/{number}"] = value.detach().cpu().contiguous()
    text = {"identity": identity, "chunk": state.chunk, "step": state.step, "seconds": state.seconds}
    files.write_atomic(run / FOLDER / PARTIAL, save(tensors, {"partial": json.dumps(text)}))


def read_partial(run: Path, identity: str) -> Partial | None:
    """What an earlier call had found, if it was asked for the same; None otherwise, which the log says."""
    path = run / FOLDER / PARTIAL
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = json.loads((file.metadata() or {})["partial"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise files.damaged(path, error) from error
    if text["identity"] != identity:
        logger.warning("an unfinished rescore in %s was of other targets or settings: it is begun anew", path.parent)
        return None
    logger.info("going on with an unfinished rescore at step %d", text["step"])
    return Partial(text["chunk"], text["step"], _influence(tensors), text["seconds"], _adjoint(text["step"], tensors))


def remove_partial(run: Path) -> None:
    """The result is there: what led to it is of no more use."""
    (run / FOLDER / PARTIAL).unlink(missing_ok=True)


def _influence(tensors: dict[str, Tensor]) -> Array:
    found: Array = tensors["influence"].numpy().astype(np.float64)
    return found


def _adjoint(step: int, tensors: dict[str, Tensor]) -> Adjoint | None:
    count = sum(name.startswith("weight/") for name in tensors)
    sites = tuple(
        Moments(tensors[f"weight/{k}"], *(tensors.get(f"{part}/{k}") for part in _PARTS[1:])) for k in range(count)
    )
    return Adjoint(step, sites) if sites else None
