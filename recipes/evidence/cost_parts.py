"""The parts of the callback as costs of recipes/evidence/cost_model.py: what each computes, once per measured step."""

from __future__ import annotations

from dataclasses import replace

from recipes.evidence.cost_machine import Cost, fresh, total
from recipes.evidence.cost_model import PASS, Tokens, Work, backward, forward, mlp

#: Ridge systems that the books of a window solve: refit, pathways, first order, account, halves of the probes.
FITS = 14

#: Arrays as large as the logits that a training step makes: these, their log-softmax, and the gradients of both.
LOGITS = 4

#: Calls of one of them: 120 that Python's profiler sees, and 25 operations of numpy, each of which takes about as long
#: as five.
FIT_CALLS = Cost(python=120 + 25 * 5)

#: A walk over the modules of a model: around them, per layer, per layer of adapters. Such a walk makes, for example,
#: ``model.eval()``.
WALK, LAYER_WALK, ADAPTER_WALK = 200, 270, 1470

#: Walks of a reading, which keeps and puts back the state of every module, and of the pass for features' gradients.
READING_WALKS, FEATURE_WALKS = 7, 6

#: Calls of a reading per batch, per lower layer that is kept (is it still what it was?), of the rest of a measurement.
BATCH_CALLS, KEPT_CALLS, BOOK_CALLS = Cost(calls=58, python=630), Cost(calls=50), Cost(calls=73, python=4100)

#: Passes over a dictionary-wide array by the SAE's health. Over the pairs' gradients, and over arrays as large as the
#: weights, by their capture, by the step's own shares and effects, and by one earlier step whose momentum is followed.
#: Over the weights by engine exact, for one pair in one step and for one reading.
HEALTH_PASSES, CAPTURE_PASSES, OWN_PASSES, LATER_PASSES = 12, (3, 12), (16, 100), (13, 0)
PAIR_PASSES, MOVE_PASSES = (0, 25), (0, 5)

#: Calls per LoRA matrix of clipping and AdamW, of the books of a measurement, of a capture, of the step's own shares
#: and effects, of an earlier step's; of engine exact for one pair in one step, and for one reading.
STEP_CALLS, SITE_CALLS = Cost(calls=12, python=130), Cost(calls=9, python=19)
CAPTURE_CALLS, OWN_CALLS = Cost(calls=25, python=123), Cost(calls=143, python=170)
LATER_CALLS, PAIR_CALLS = Cost(calls=29, python=44), Cost(calls=60, python=120)
MOVE_CALLS = Cost(calls=10, python=20)

#: Calls per LoRA matrix of a batch's gradients by all functionals, and of those of all batches together.
BASIS_CALLS, MIX_CALLS = 9, 5


def parts(work: Work) -> dict[str, Cost]:
    """Cost of every part by name; what is extra to another says so.

    * ``train``: a plain step. ``forward``: a bare pass over the probes' tokens.
    * ``measure``: one measurement that attributes nothing.
    * ``capture``: extra to ``train``. ``ghost``: extra to ``measure``, without ``capture``. ``exact``: the same.
    * ``refit``: the policy alone.
    """
    return {
        "train": train(work),
        "forward": bare(work),
        "measure": measure(work),
        "capture": capture(work),
        "ghost": ghost(work),
        "exact": exact(work),
        "refit": fit(work),
    }


def train(work: Work) -> Cost:
    """Forward and backward of the training batch; AdamW is a few passes over the adapters."""
    passes = [forward(work.shape, work.lora, each) + backward(work.shape, work.lora, each) for each in work.train]
    again = sum(each.predicted for each in work.train) * 2 * work.shape.hidden * work.shape.vocabulary * (work.head - 2)
    optimizer = Cost(again, cached=6 * PASS * work.lora.weights(work.shape)) + STEP_CALLS * _sites(work)
    logits = [fresh(4 * each.predicted * work.shape.vocabulary, LOGITS) for each in work.train]
    return total([*passes, *logits]) + optimizer + walks(work, 1)


def bare(work: Work) -> Cost:
    """A forward pass over all places of the probes, with nothing kept and no start shared."""
    return total([forward(work.shape, work.lora, each) for each in work.probes]) + walks(work, 1)


def reading(work: Work) -> Cost:
    """A pass over the probes as the instrument makes it, and the policy's features at the last prompt token."""
    rows = sum(each.rows for each in work.probes)
    layers = (work.kept, work.shape.layers)
    passes = [forward(work.shape, work.lora, _read(work, each), layers, trim=work.trim) for each in work.probes]
    around = BATCH_CALLS * len(work.probes) + KEPT_CALLS * work.kept + walks(work, READING_WALKS)
    return total(passes) + Cost(2 * rows * work.shape.hidden * work.support) + around


def walks(work: Work, times: float) -> Cost:
    """Walks over the modules of the model."""
    return Cost(python=times * (WALK + LAYER_WALK * work.shape.layers + ADAPTER_WALK * work.lora.layers))


def measure(work: Work) -> Cost:
    """A reading, the SAE's health (encoded, decoded, and its change decoded twice), the books."""
    rows = sum(each.rows for each in work.probes)
    health = Cost(8 * rows * work.shape.hidden * work.features, HEALTH_PASSES * PASS * rows * work.features)
    health += fresh(4 * rows * work.features, HEALTH_PASSES)
    return reading(work) + health + fit(work) * FITS + BOOK_CALLS + SITE_CALLS * _sites(work)


def capture(work: Work) -> Cost:
    """Gradients of single pairs: those of the LoRA matrices once more, row by row, and what the step did with them."""
    weights = work.lora.weights(work.shape)
    tokens = sum(each.count for each in work.train)
    return _per_row(2 * tokens * weights) + Cost(cached=_passes(work, CAPTURE_PASSES)) + CAPTURE_CALLS * _sites(work)


def ghost(work: Work) -> Cost:
    """Gradients of all functionals through the probes, and their products with those of the pairs."""
    return functional_gradients(work) + book(work)


def functional_gradients(work: Work) -> Cost:
    """Once per window, however many steps it has. The reading itself is dearer: it shares no start."""
    alone = replace(work, prefix=0)
    return _output_gradients(alone) + _feature_gradients(alone) + reading(alone) + reading(work) * -1.0


def _output_gradients(work: Work) -> Cost:
    """One backward pass: per site and probe a gradient, which is added to the basis; then functionals of the basis."""
    weights = work.lora.weights(work.shape)
    back = [backward(work.shape, work.lora, each, weights=False, trim=work.trim) for each in work.probes]
    tokens, rows = (sum(getattr(each, name) for each in work.probes) for name in ("count", "rows"))
    added = _single(2 * rows * work.basis * weights) + _per_row(2 * tokens * weights)
    mixed = _single(2 * work.functionals * work.basis * weights) + Cost(bytes=PASS * work.functionals * weights)
    calls = BASIS_CALLS * len(work.probes) + MIX_CALLS
    return total(back) + added + mixed + Cost(calls=calls * _sites(work))


def _feature_gradients(work: Work) -> Cost:
    """A pass over the prompts up to the hook, and a backward pass from there per renewed feature.

    The hook's layer computes its MLP for the last token alone.
    """
    if not work.renewed or work.kept > work.hook:  # what is kept holds the hook's stream
        return Cost()
    layers, adapted = (work.kept, work.hook + 1), work.hook >= work.shape.layers - work.lora.layers
    prompts = [replace(each, columns=each.columns - work.nodes + 1, predicted=0) for each in work.probes]
    there = total([forward(work.shape, work.lora, each, layers) for each in prompts])
    back = total([backward(work.shape, work.lora, each, layers) for each in prompts]) * work.renewed
    spared = mlp(work.shape, work.lora, adapters=adapted)
    spared += work.renewed * mlp(work.shape, work.lora, adapters=2) if adapted else 0
    spared *= sum(each.count - each.rows for each in prompts)
    return there + back + walks(work, FEATURE_WALKS) + Cost(-spared)


def book(work: Work) -> Cost:
    """Shares and effects of one step's pairs, and of earlier steps' through the momentum."""
    weights, steps = work.lora.weights(work.shape), 1 + work.carried
    dots = 2 * 2 * steps * work.pairs * weights * work.functionals
    passes = _passes(work, OWN_PASSES) + _passes(work, LATER_PASSES) * work.carried
    return _single(dots) + Cost(cached=passes) + (OWN_CALLS + LATER_CALLS * work.carried) * _sites(work)


def exact(work: Work, *, pairs: int | None = None, steps: int = 1) -> Cost:
    """Three readings per pair and two for the momentum, at weights that are put in and back.

    ``pairs``: of the window (None: those of one step); ``steps``: of the window, in each of which a pair's part is
    computed, whether it was in it or not.
    """
    pairs = work.pairs if pairs is None else pairs
    part = Cost(cached=_passes(work, PAIR_PASSES)) + PAIR_CALLS * _sites(work)
    moved = Cost(cached=_passes(work, MOVE_PASSES)) + MOVE_CALLS * _sites(work)
    return part * (pairs * steps) + (reading(work) + fit(work) * (FITS / 2) + moved) * (3 * pairs + 2)


def _read(work: Work, batch: Tokens) -> Tokens:
    """What a reading computes of a batch: its start, where that is shared, is another row's."""
    return replace(batch, columns=batch.columns - work.prefix)


def fit(work: Work) -> Cost:
    """A ridge system in double precision, which takes twice as long."""
    rows = sum(each.rows for each in work.probes)
    small, large = sorted((rows, work.support))
    return Cost(2 * (2 * small * small * large + 2 / 3 * small**3)) + FIT_CALLS


def _single(flops: float) -> Cost:
    """Products in single precision."""
    return Cost(flops, single=flops)


def _per_row(flops: float) -> Cost:
    """Gradients of LoRA matrices row by row, one of whose two sizes is the rank."""
    return Cost(flops, single=flops, thin=flops)


def _passes(work: Work, passes: tuple[float, float]) -> float:
    """Bytes of passes over the pairs' gradients, and over arrays as large as the weights."""
    return PASS * (passes[0] * work.pairs + passes[1]) * work.lora.weights(work.shape)


def _sites(work: Work) -> int:
    return 14 * work.lora.layers
