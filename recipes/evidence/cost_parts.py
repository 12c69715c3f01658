"""The parts of the callback as costs of recipes/evidence/cost_model.py: what each computes, once per measured step."""

from __future__ import annotations

from dataclasses import replace

from recipes.evidence.cost_model import PASS, Cost, Tokens, Work, backward, forward, mlp, total

#: Ridge systems that the books of a window solve: refit, pathways, first order, account, halves of the probes.
FITS = 14

#: Passes over a dictionary-wide array by the SAE's health; over the pairs' gradients by their capture, by the step's
#: own shares and effects, and by one earlier step whose momentum is followed (14 calls, some of them in place).
HEALTH_PASSES, CAPTURE_PASSES, OWN_PASSES, LATER_PASSES = 12, 3, 16, 12

#: Calls per LoRA matrix of the same, and of clipping and AdamW.
CAPTURE_CALLS, OWN_CALLS, LATER_CALLS, STEP_CALLS = 20, 30, 18, 15


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
        "refit": Cost(_fit(work)),
    }


def train(work: Work) -> Cost:
    """Forward and backward of the training batch; AdamW is a few passes over the adapters."""
    passes = [forward(work.shape, work.lora, each) + backward(work.shape, work.lora, each) for each in work.train]
    again = sum(each.predicted for each in work.train) * 2 * work.shape.hidden * work.shape.vocabulary * (work.head - 2)
    return total(passes) + Cost(again, 6 * PASS * work.lora.weights(work.shape), STEP_CALLS * _sites(work))


def bare(work: Work) -> Cost:
    """A forward pass over all places of the probes, with nothing kept and no start shared."""
    return total([forward(work.shape, work.lora, each) for each in work.probes])


def reading(work: Work) -> Cost:
    """A pass over the probes as the instrument makes it, and the policy's features at the last prompt token."""
    rows = sum(each.rows for each in work.probes)
    layers = (work.kept, work.shape.layers)
    passes = [forward(work.shape, work.lora, _read(work, each), layers, trim=work.trim) for each in work.probes]
    return total(passes) + Cost(2 * rows * work.shape.hidden * work.support)


def measure(work: Work) -> Cost:
    """A reading, the SAE's health (encoded, decoded, and its change decoded twice), the books."""
    rows = sum(each.rows for each in work.probes)
    health = Cost(8 * rows * work.shape.hidden * work.features, HEALTH_PASSES * PASS * rows * work.features)
    return reading(work) + health + Cost(FITS * _fit(work))


def capture(work: Work) -> Cost:
    """Gradients of single pairs: those of the LoRA matrices once more, row by row, and what the step did with them."""
    weights = work.lora.weights(work.shape)
    tokens = sum(each.count for each in work.train)
    passes = PASS * (CAPTURE_PASSES * work.pairs + 12) * weights
    return Cost(2 * tokens * weights, passes, _sites(work) * CAPTURE_CALLS)


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
    added = Cost(2 * (tokens + rows * work.basis) * weights, 0.0, 4 * _sites(work) * len(work.probes))
    return total(back) + added + Cost(2 * work.functionals * work.basis * weights, PASS * work.functionals * weights)


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
    return there + back + Cost(-spared * sum(each.count - each.rows for each in prompts))


def book(work: Work) -> Cost:
    """Shares and effects of one step's pairs, and of earlier steps' through the momentum."""
    weights, steps = work.lora.weights(work.shape), 1 + work.carried
    dots = 2 * 2 * steps * work.pairs * weights * work.functionals
    passes = PASS * work.pairs * weights * (OWN_PASSES + LATER_PASSES * work.carried)
    return Cost(dots, passes, _sites(work) * (OWN_CALLS + LATER_CALLS * work.carried))


def exact(work: Work) -> Cost:
    """Three readings per pair and two for the momentum; weights are put back as often."""
    readings = 3 * work.pairs + 2
    return (reading(work) + Cost(FITS / 2 * _fit(work), 4 * PASS * work.lora.weights(work.shape))) * readings


def _read(work: Work, batch: Tokens) -> Tokens:
    """What a reading computes of a batch: its start, where that is shared, is another row's."""
    return replace(batch, columns=batch.columns - work.prefix)


def _fit(work: Work) -> float:
    """A ridge system in double precision, which takes twice as long."""
    rows = sum(each.rows for each in work.probes)
    small, large = sorted((rows, work.support))
    return 2 * (2 * small * small * large + 2 / 3 * small**3)


def _sites(work: Work) -> int:
    return 14 * work.lora.layers
