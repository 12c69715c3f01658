"""What limits how well the policy explains a step? A ladder from the model down to the policy's straight line.

Of every pair's step less and less is carried over into the model before it: the stream at the SAE's hook at all prompt
tokens, at the last one only; what the SAE expresses of it; what the policy's features do; and then the policy's line in
the model's place. Where the agreement with the measured change falls is what limits it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from recipes.evidence.explained import Bench, Readings, Setting, agreement, choose_policy, predicted, scores_of
from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.ridge import fit_ridge, lambda_grid, loo_path
from smda_callbacks.observe.features import decode, encoder
from smda_callbacks.observe.health import sae_health
from smda_callbacks.observe.instrument import Instrument
from smda_callbacks.observe.intervention import Recording, read_edited
from smda_callbacks.observe.reading import Reading

Array = NDArray[np.float64]
Index = NDArray[np.int64]

#: From the model to the policy: what of the step is carried over.
LADDER = {
    "stream, all prompt tokens": "the stream at the hook at every prompt token, put into the model before the step",
    "stream, last prompt token": "the same at the last prompt token only",
    "SAE": "only what the SAE expresses of that, at fixed gates",
    "policy's features": "only the policy's features of that",
    "policy": "ΔX·β: the straight line of the policy instead of the model",
    "line on the stream": "Δh·w: ridge from the whole stream instead of the SAE's features",
}


def ladder(bench: Bench, readings: Readings, setting: Setting) -> dict[str, dict[str, float]]:
    """Rung of LADDER -> agreement with the measured change, on all pairs of the bench, in probabilities."""
    whole = _whole_stream(bench)
    stream = readings.hidden[0]
    chosen, *_ = choose_policy(readings.states["last"][0].x, readings.y["probability"][0], setting)
    features = readings.columns["last"][chosen]
    carried = {"stream, all prompt tokens": whole}
    rungs = {
        "stream, last prompt token": lambda after: after - stream,
        "SAE": lambda after: expressed(bench.instrument, stream, after, None),
        "policy's features": lambda after: expressed(bench.instrument, stream, after, features),
    }
    model = bench.start()
    for name, part in rungs.items():
        bar = tqdm(readings.hidden[1:], f"{bench.setup.name}: {name}", unit="pair")
        carried[name] = np.array([_added(bench, model, part(after)) for after in bar])
    y = readings.y["probability"][0]
    carried = {
        name: np.array([mean_by_group(row - y[:, 0], readings.groups) for row in rows])
        for name, rows in carried.items()
    }
    carried["policy"] = predicted(readings, setting)[0]
    carried["line on the stream"] = _line(readings)
    measured = readings.change("probability")
    return {name: agreement(carried[name], measured) for name in LADDER}


def _whole_stream(bench: Bench) -> Array:
    """Refusal ``[pair, probe]`` of the model before the step with the moved model's stream at all prompt tokens."""
    found = []
    for number in tqdm(range(len(bench.pairs)), f"{bench.setup.name}: whole stream", unit="pair"):
        kept = Recording()
        read_edited(bench.moved(number), bench.instrument, kept.keep, "all")
        found.append(_refusal(bench, read_edited(bench.start(), bench.instrument, kept.put, "all")))
    return np.array(found)


def _added(bench: Bench, model: Any, difference: Tensor) -> Array:
    """Refusal ``[probe]`` with ``difference [probe, d_model]`` added at the last prompt token."""
    edit = read_edited(model, bench.instrument, lambda hidden, probes: difference[probes].unsqueeze(1))
    return _refusal(bench, edit)


def _refusal(bench: Bench, reading: Reading) -> Array:
    column: Array = scores_of(bench.instrument, reading, "probability")[:, 0]
    return column


def expressed(instrument: Instrument, before: Tensor, after: Tensor, features: Index | None) -> Tensor:
    """What the SAE expresses of ``after - before [probe, d_model]`` at the gates before; ``features`` None: all."""
    handle = instrument.handle
    encode = encoder(handle)
    with torch.no_grad():
        moved = encode(after)[0]
        pre, gate = encode(before)
        kept = torch.zeros(handle.d_sae)
        kept[slice(None) if features is None else torch.from_numpy(features)] = 1.0
        return decode(handle, gate * (pre + kept * (moved - pre))) - decode(handle, gate * pre)


def _line(readings: Readings) -> Array:
    """Δh·w ``[pair, category]`` of a ridge from the whole stream, its penalty by leave-one-out."""
    before, *afters = (each.double().numpy() for each in readings.hidden)
    y = readings.y["probability"][0]
    scale = np.full(before.shape[1], before.std(axis=0).mean())
    path = loo_path(before, y, lambda_grid(), scale=scale)
    fit = fit_ridge(before, y, path.best, scale=scale)
    return np.array([mean_by_group((after - before) / scale @ fit.coef[:, 0], readings.groups) for after in afters])


def delta_fvu(bench: Bench, readings: Readings) -> dict[str, float]:
    """Median over pairs of what the SAE misses of a step's change, plainly and at fixed gates."""
    before, *afters = readings.hidden
    health = [sae_health(bench.instrument.handle, after, start=before, before=before) for after in afters]
    return {
        "plain": float(np.median([each.delta_fvu or 0.0 for each in health])),
        "fixed_gates": float(np.median([each.delta_fvu_magnitude or 0.0 for each in health])),
    }
