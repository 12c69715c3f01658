"""What watching a run costs: ratios of times taken in turns on one machine, never absolute times.

    python recipes/benchmark_overhead.py --json overhead.json
    python recipes/benchmark_overhead.py --json overhead.json --model my-org/my-chat-model --sae my-sae --device cuda

* ``callback_over_probe_forward`` and its variants, one per saving: see recipes/benchmark_savings.py.
* ``train_with_over_without``: a whole training run (TRL, LoRA) with the callback over the same run without it, by the
  trainer's own ``train_runtime``, the start of the watch and the run store included. It measures after every step;
  ``..._every_10`` after every tenth, ``..._no_pairs`` attributes nothing to pairs. A small model on short pairs pays
  most: its training steps are cheap.
* ``capture_over_train_step``, ``ghost_over_probe_backward``: see recipes/benchmark_pairs.py.
* ``extra_peak_memory``, ``..._no_pairs``: MiB, see recipes/benchmark_memory.py.
* ``refit_speedup_16k``, ``..._131k``: scikit-learn's Ridge on the dense matrix over the library's refit on its
  non-zeros, at 400 probes (``..._n200``: 200), in processor time. ``refit_max_abs_diff``: how far they are apart.

Every figure is the median over repetitions (a difference: the largest), with its range. Set OMP_NUM_THREADS for more
threads than one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file, too

from recipes.benchmark_maths import HEADER, Figure, refit
from recipes.benchmark_memory import extra_peaks
from recipes.benchmark_pairs import Step, capture, ghost
from recipes.benchmark_savings import measurements
from recipes.benchmark_training import (
    NO_PAIRS,
    Options,
    be_silent,
    load,
    lora,
    read_pairs,
    settings,
    train,
    train_runtime,
    training,
    training_arguments,
)
from smda_callbacks import __version__
from smda_callbacks.config.build import build_plan
from smda_callbacks.observe.noise import trained_parameters
from smda_callbacks.sinks.memory import MemorySink
from smda_callbacks.training.attribution_start import Trainer
from smda_callbacks.training.engine import AttributionOptions
from smda_callbacks.training.monitor import Monitor

PACKAGES = ("torch", "transformers", "trl", "peft", "sae-lens", "numpy", "scikit-learn")


# 1. Attribution to pairs ----------------------------------------------------------------------------------------------


def pairs(options: Options) -> Iterator[Figure]:
    """Capturing gradients of single pairs, and engine ghost."""
    model, tokenizer = load(options)
    adapted: Any = get_peft_model(model, lora())
    args = training_arguments(options, "unused")
    batch, dataset = first_batch(options, tokenizer)
    plan = replace(build_plan(settings(options)), make_sinks=lambda _: (MemorySink(),), noise_draws=0, on_error="raise")
    optimizer = torch.optim.AdamW(trained_parameters(adapted), lr=1e-5)
    loader = torch.utils.data.DataLoader(dataset)
    monitor = Monitor(plan, adapted.eval(), Trainer(args, optimizer, loader, tokenizer), 0, 1e-3)
    off = replace(plan, attribution=AttributionOptions(engine="off"))
    plain = Monitor(off, adapted, Trainer(args, optimizer, loader, tokenizer), 0, 1e-3)
    instrument = monitor.instrument
    seen = {"site": instrument.handle.site, "readout": instrument.readout, "limit": 2**32}
    yield from capture(partial(train, options), seen, options.repeats, options.device)
    yield from ghost(adapted, monitor, plain, Step(adapted, batch), options.repeats, options.device)


def first_batch(options: Options, tokenizer: Any, pairs: int = 8) -> tuple[dict[str, Any], Dataset]:
    """The first pairs as the trainer would batch them, and the data set as it would be prepared."""
    rows = []
    for pair in read_pairs(options.pairs).select(range(pairs)):
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*pair["prompt"], *pair["completion"]], return_dict=False)
        rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    width = max(len(row["input_ids"]) for row in rows)
    padded = {
        "input_ids": [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows],
        "labels": [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows],
    }
    batch = {name: torch.tensor(values, device=options.device) for name, values in padded.items()}
    return batch, Dataset.from_list(rows)


# 2. Memory -----------------------------------------------------------------------------------------------------------


def memory(options: Options) -> Iterator[Figure]:
    """Training's memory, watched over unwatched: the peak is reached when momentum is followed as far as it ever is."""
    watched: dict[str, dict[str, Any]] = {"extra_peak_memory": {}, "extra_peak_memory_no_pairs": NO_PAIRS}
    yield from extra_peaks(partial(train_runtime, options), watched, min(options.repeats, 3))


# Command line ---------------------------------------------------------------------------------------------------------


def environment(options: Options) -> dict[str, Any]:
    """What the figures were measured with."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "smda-callbacks": __version__,
        **{name: metadata.version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "device": options.device if options.device == "cpu" else torch.cuda.get_device_name(),
        **{key: value for key, value in vars(options).items() if key != "device"},
    }


def as_json(figures: Sequence[Figure], options: Options) -> dict[str, Any]:
    """The file: figure by name, and the environment."""
    return {**{figure.name: figure.as_json() for figure in figures}, "environment": environment(options)}


#: What is measured, in order.
PARTS: dict[str, Callable[[Options], Iterable[Figure]]] = {
    "readings": measurements,
    "pairs": pairs,
    "training": training,
    "memory": memory,
    "refit": lambda options: refit(options.repeats),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--repeats", type=int, default=10, help="repetitions; of training runs three at most")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    parser.add_argument("--quick", action="store_true", help="two repetitions and four training steps: does it run?")
    parser.add_argument("--model", default="builtin:quickstart/quickstart-chat", help="a chat model: id or folder")
    parser.add_argument("--sae", default="builtin:quickstart/sae", help="an SAE of that model: folder or id")
    parser.add_argument("--pairs", default="builtin:quickstart/sft_pairs.jsonl", help="JSONL: prompt and completion")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write the file."""
    args = arguments()
    be_silent()
    repeats, steps = (2, 4) if args.quick else (args.repeats, -1)
    options = Options(args.model, args.sae, args.pairs, args.device, repeats, steps)
    print(HEADER)
    figures = []
    for figure in chain(*(PARTS[name](options) for name in args.only or PARTS)):
        figures.append(figure)
        print(figure, flush=True)
    args.json.write_text(json.dumps(as_json(figures, options), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
