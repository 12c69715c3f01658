"""What the cost model says of LoRA runs of 3B, 8B and 70B on 8 to 64 GPUs. Predicted, not measured; assumptions are
stated.

DDP: probes are shared over ranks batch by batch, with gradients (engine ghost) too, which are then added up on the main
process. FSDP2: step level only; in every round of batches all ranks gather every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from recipes.evidence.cost_machine import DATACENTRE_GPU, Machine
from recipes.evidence.cost_model import Lora, Shape, Tokens, Work
from recipes.evidence.cost_parts import book, capture, functional_gradients, measure, reading, train

GIB = 2**30

#: Sizes of the published configurations.
SHAPES = {
    "Llama-3.2-3B": Shape(28, 3072, 8192, 24, 8, 128, 128_256),
    "Llama-3.1-8B": Shape(32, 4096, 14_336, 32, 8, 128, 128_256),
    "Llama-3.1-70B": Shape(80, 8192, 28_672, 64, 8, 128, 128_256),
}

#: Those whose weights, in two bytes each, leave room on one GPU of 80 GB.
ON_ONE_GPU = ("Llama-3.2-3B", "Llama-3.1-8B")


@dataclass(frozen=True)
class Assumptions:
    """Of a run, whose ghost leaves momentum in its own line (carrying it takes memory). ``mfu``: share of the peak that
    training reaches, and reading too. ``gather``: bytes per second and GPU at which FSDP2 gathers weights and gradients
    are added up, within a node of eight and beyond. ``answer``: tokens of a row that are predicted.
    """

    peak: float = 989e12  # H100 SXM, bf16, dense
    mfu: float = 0.4
    gather: tuple[float, float] = (200e9, 40e9)
    rows: int = 4
    tokens: int = 1024
    answer: int = 512
    rank: int = 16
    probes: int = 426
    batch: int = 64
    columns: int = 70  # of a probe, its chat template and the openings' tree included
    nodes: int = 14
    features: int = 65_536
    support: int = 16
    functionals: int = 60

    @property
    def machine(self) -> Machine:
        """One GPU."""
        return Machine(self.peak * self.mfu, DATACENTRE_GPU)


def work_of(shape: Shape, given: Assumptions) -> Work:
    """One rank's training batch, all probes."""
    sizes = [min(given.batch, given.probes - at) for at in range(0, given.probes, given.batch)]
    return Work(
        shape=shape,
        lora=Lora(given.rank, shape.layers),
        train=(Tokens(given.rows, given.tokens, given.rows * given.answer),),
        pairs=given.rows,
        probes=tuple(Tokens(rows, given.columns, rows * given.nodes) for rows in sizes),
        nodes=given.nodes,
        hook=shape.layers // 2,
        features=given.features,
        support=given.support,
        basis=given.functionals,
        functionals=given.functionals,
        renewed=1,
        carried=0,
        trim=True,
        head=3,
    )


def ddp(shape: Shape, gpus: int, given: Assumptions) -> dict[str, Any]:
    """Seconds of a step and of the callback's parts. The slowest rank's share of the probes counts.

    What the gradients are added up of: the basis of the functionals, and those of the features that are renewed.
    """
    work, at = work_of(shape, given), given.machine.seconds
    rounds = -(-len(work.probes) // gpus)
    longest = replace(work, probes=work.probes[:rounds])
    books = measure(work) + reading(work) * -1.0
    everybody = replace(work, pairs=work.pairs * gpus)
    weights = 4 * work.lora.weights(shape)
    sums = (work.basis + work.renewed) * weights / given.gather[0 if gpus <= 8 else 1] if gpus > 1 else 0.0
    return {
        "train": at(train(work)),
        "measure": at(reading(longest)) + at(books),
        "capture": at(capture(work)),
        "ghost": at(functional_gradients(longest)) + sums,
        "book": at(book(everybody)),
        # gradients of functionals before and after the window, their mean, and the basis; pairs of each of its steps
        "ghost_gib": (3 * work.functionals + work.basis) * weights / GIB,
        "pairs_gib": everybody.pairs * weights / GIB,
    }


def fsdp(shape: Shape, gpus: int, given: Assumptions) -> dict[str, Any]:
    """The same where weights are divided; a pass waits for them where they arrive later than they are used."""
    work, at = work_of(shape, given), given.machine.seconds
    arrive = 2 * shape.parameters / given.gather[0 if gpus <= 8 else 1]
    rounds = -(-len(work.probes) // gpus)
    one = replace(work, probes=work.probes[:1])
    books = measure(work) + reading(work) * -1.0
    return {
        "train": max(at(train(work)), 2 * arrive),
        "measure": rounds * max(at(reading(one)), arrive) + at(books),
    }


def predict(given: Assumptions | None = None, gpus: Sequence[int] = (8, 16, 32, 64)) -> dict[str, Any]:
    """All runs: seconds, and time watched over time not watched when measuring at every step, tenth and fiftieth."""
    given = given or Assumptions()
    runs = []
    for name, shape in SHAPES.items():
        for how in ("DDP", "FSDP2") if name in ON_ONE_GPU else ("FSDP2",):
            for count in gpus:
                found = (ddp if how == "DDP" else fsdp)(shape, count, given)
                runs.append({"model": name, "how": how, "gpus": count, **found, "ratios": _ratios(found)})
    return {"assumptions": asdict(given), "stated": DATACENTRE_GPU._asdict(), "runs": runs}


def _ratios(found: dict[str, float]) -> dict[str, float]:
    ratios = {}
    for every in (1, 10, 50):
        ratios[f"step every {every}"] = 1 + found["measure"] / found["train"] / every
        if "ghost" in found:
            extra = found["capture"] + found["book"] + (found["measure"] + found["ghost"]) / every
            ratios[f"ghost every {every}"] = 1 + extra / found["train"]
    return ratios


def lines(predicted: dict[str, Any]) -> list[str]:
    """The predictions as a table of text."""
    columns = [f"{engine} every {every}" for engine in ("step", "ghost") for every in (1, 10, 50)]
    found = [f"{'predicted':<15}{'':<6}{'GPUs':>5}{'train s':>9}{'measure':>9}" + "".join(f"{c:>16}" for c in columns)]
    for run in predicted["runs"]:
        ratios = [run["ratios"].get(column) for column in columns]
        text = "".join(f"{'-' if each is None else f'{each:.3f}':>16}" for each in ratios)
        head = f"{run['model']:<15}{run['how']:<6}{run['gpus']:>5}{run['train']:>9.3f}{run['measure']:>9.3f}"
        held = (
            ""
            if "ghost_gib" not in run
            else f"  ghost holds {run['ghost_gib']:.0f} GiB, pairs of a step {run['pairs_gib']:.1f}"
        )
        found.append(head + text + held)
    return found
