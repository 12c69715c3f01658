"""Tables of the overhead's results, from numbers that are known."""

from __future__ import annotations

from recipes.evidence.cost_check import check_model
from recipes.evidence.overhead_scaling import NAMES, growth
from recipes.evidence.tables import TABLES
from tests.recipes.test_cost_model import work


def test_tables_of_results_with_known_numbers() -> None:
    environment = {"date": "2026-01-01", "quick": False, "machine": "a processor", "threads": 1, "cores": 2}
    environment |= {"versions": {"torch": "2"}}
    row = {"min": 1.1, "max": 1.4, "milliseconds": 20.0, "same_losses_and_weights": True}
    rows = {"step": {**row, "value": 1.25}, "a peer": {**row, "value": 3.0, "same_losses_and_weights": False}}
    part = {"rows": rows, "missing": {"other": "ImportError: no"}, "over_forward": 1.07, "environment": environment}
    text = TABLES["overhead-quickstart"][1]({"quickstart": {**part, "default": {"every": 1, "engine": "ghost"}}})
    assert "| step level, every step | 1.25 | 1.10 to 1.40 | 20 | yes |" in text
    assert "| a peer | 3.00 | 1.10 to 1.40 | 20 | **no** |" in text
    assert "takes 1.07 × one bare forward pass" in text
    assert "other: left out (ImportError: no)." in text
    assert text.endswith("2026-01-01; a processor, 1 of 2 cores; torch 2.")
    memory = {"mib": {"quickstart": {"plain": 500.0, "ghost": 620.4}}, "environment": environment}
    assert "| quickstart | with pairs (ghost), every step | 620 | +120 |" in TABLES["overhead-memory"][1](
        {"memory": memory}
    )


def test_every_table_of_a_quick_file() -> None:
    """Scaling and predictions: an axis of two sizes at which time doubles, and the runs that are predicted."""
    environment = {"date": "now", "quick": True, "machine": "p", "threads": 1, "cores": 1, "versions": {}}
    rows = {
        str(size): {
            "case": {"probes": size}, "left_out": {}, "work": work().as_json(),
            "mib": dict.fromkeys(("train", "measure", "ghost"), 3.0),
            "seconds": {name: {"value": size / 1e3} for name in NAMES if name != "exact"},
        }
        for size in (100, 200)
    }  # fmt: skip
    scaling = {"axes": {"probes": {"rows": rows, "growth": growth(rows)}}, "environment": environment}
    text = TABLES["overhead-scaling"][1]({"scaling": scaling})
    assert "| probes: 200 | 200.0 | 200.0 | 200.0 | 200.0 | 200.0 | – | 200.0 | 3 |" in text
    assert "| grows as (model) | 1.00 (0.00) |" in text
    model = {**check_model({"scaling": scaling}), "environment": environment}
    assert TABLES["overhead-model"][1]({"model": model}).count("\n") == 2 + len(model["summary"]) - 2 + 1
    assert "Llama-3.1-70B, FSDP2, 64 GPUs" in TABLES["overhead-predicted"][1]({"model": model})
