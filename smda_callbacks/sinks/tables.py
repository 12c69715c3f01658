"""The tables of a run, in tidy long form, derived from its windows.

Behaviours are in the units of the policy's target, coefficients and shifts in behaviour units per standard deviation of
the feature at distillation. The first rows are those of the baseline: nothing has shifted there, so what belongs to a
window is null. Windows that are not ``ok`` appear in ``steps`` only.

``steps``, one row per record
    ``step``, ``first_step`` (of the window, both inclusive), ``baseline`` (whether it is that), ``status``, ``skipped``
    (number of optimizer steps skipped), ``seconds``, ``update_rms``, ``first_order_error``, ``r2_<behaviour>``,
    ``r2_loo_<behaviour>``, ``fvu``, ``l0``, ``jaccard``, ``delta_fvu``, ``delta_fvu_magnitude`` (SAE health),
    ``trainer_<name>`` (what the trainer reported), ``alerts`` (number), ``error``.

``categories``, one row per record, category and behaviour
    ``step``, ``category``, ``behaviour``, ``mean`` (of the behaviour over the category's probes), one column for each
    of :data:`~smda_callbacks.records.ROWS` (they sum to the change of ``mean`` over the window), ``cumulative`` (change
    of ``mean`` since the baseline).

``features``, one row per record, feature and behaviour
    ``step``, ``feature`` (SAE index), ``behaviour``, ``coef``, one column for each of
    :data:`~smda_callbacks.records.PATHWAYS`, ``floor_<part>`` (noise floor of the part for an update of this window's
    size, by the floor in force at it; null if the noise was not measured), ``above_floor_<part>`` (part larger than
    twice its floor), ``above_floor`` (any of them).

``pathways``, one row per record and behaviour
    ``step``, ``behaviour``, one column for each part (L2 norm over features), ``total`` (norm of their sum),
    ``cumulative`` (norm of the coefficients' change since the baseline), ``first_order_error`` (of the whole window),
    ``reliability_<part>`` (split-half, of the whole window).

Runs that attribute their change to pairs have those of :mod:`smda_callbacks.sinks.pair_tables` too: ``pairs``,
``pair_totals``, ``pair_steps`` and ``ledger``. In an audit every record is one pair's change from the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smda_callbacks.maths.account import mean_by_group
from smda_callbacks.maths.uncertainty import above_floor
from smda_callbacks.records import PATHWAYS, ROWS, Array, RunStart, SAEHealth, WindowRecord
from smda_callbacks.sinks import files
from smda_callbacks.sinks.attribution import is_attributed
from smda_callbacks.sinks.files import StoreError
from smda_callbacks.sinks.noise_in_force import all_in_force, floors_at
from smda_callbacks.sinks.pair_tables import PAIR_TABLES
from smda_callbacks.sinks.store_reader import RunStore

Columns = dict[str, Any]
_Builder = Callable[[RunStore, list[WindowRecord]], pa.Table]

_HEALTH = tuple(SAEHealth.__dataclass_fields__)


def build_table(store: RunStore, name: str) -> pa.Table:
    """The table ``name`` of ``store``.

    Raises StoreError for a name other than those of :data:`TABLES` and, where pairs are attributed, of PAIR_TABLES.
    """
    builders = _builders(store)
    if name not in builders:
        rest = " The run attributes nothing to pairs, and so has no table of them." if name in PAIR_TABLES else ""
        raise StoreError(
            f"there is no table {name!r}; allowed are {', '.join(builders)}. See smda_callbacks.sinks.tables.{rest}"
        )
    return builders[name](store, [store.baseline, *store.windows()])


def write_tables(path: Path) -> None:
    """Write all tables of the store at ``path`` as Parquet files (zstd) into its folder ``tables``."""
    store = RunStore.open(path)
    records = [store.baseline, *store.windows()]
    (path / files.TABLES).mkdir(exist_ok=True)
    for name, build in _builders(store).items():
        buffer = pa.BufferOutputStream()
        pq.write_table(build(store, records), buffer, compression="zstd")
        files.write_atomic(path / files.TABLES / f"{name}.parquet", buffer.getvalue().to_pybytes())


def _steps(store: RunStore, records: list[WindowRecord]) -> pa.Table:
    integers: Columns = {
        "step": [each.step for each in records],
        "first_step": [each.first_step for each in records],
        "skipped": [len(each.skipped) for each in records],
        "alerts": [len(each.alerts) for each in records],
    }
    floats: Columns = {
        name: [getattr(each, name) for each in records] for name in ("seconds", "update_rms", "first_order_error")
    }
    for number, behaviour in enumerate(store.policy.behaviours):
        floats[f"r2_{behaviour}"] = [_at(each.r2, number) for each in records]
        floats[f"r2_loo_{behaviour}"] = [_at(each.r2_loo, number) for each in records]
    floats |= {name: [getattr(each.health, name, None) for each in records] for name in _HEALTH}
    reported = dict.fromkeys(name for each in records for name in each.trainer)
    floats |= {f"trainer_{name}": [each.trainer.get(name) for each in records] for name in reported}
    words: Columns = {name: [getattr(each, name) for each in records] for name in ("status", "error")}
    columns: Columns = {name: pa.array(values, pa.int64()) for name, values in integers.items()}
    columns["baseline"] = pa.array([each is records[0] for each in records])
    columns |= {name: pa.array(values, pa.string()) for name, values in words.items()}
    columns |= {name: pa.array(values, pa.float64()) for name, values in floats.items()}
    order = ["step", "first_step", "baseline", "status", "skipped", *floats, "alerts", "error"]
    return pa.table({name: columns[name] for name in order})


def _categories(store: RunStore, records: list[WindowRecord]) -> pa.Table:
    start = _category_means(store, store.baseline)

    def columns(record: WindowRecord) -> Columns:
        mean = _category_means(store, record)
        return {"mean": mean} | {row: record.account.get(row) for row in ROWS} | {"cumulative": mean - start}

    return _long(store, records, {"category": store.categories}, columns)


def _features(store: RunStore, records: list[WindowRecord]) -> pa.Table:
    floors_of = _floors(store, records)

    def columns(record: WindowRecord) -> Columns:
        floors = floors_of[record.step]
        above = {
            part: above_floor(record.shift[part], floor) if floor is not None and part in record.shift else None
            for part, floor in floors.items()
        }
        known = [values for values in above.values() if values is not None]
        found: Columns = {"coef": record.coef} | {part: record.shift.get(part) for part in PATHWAYS}
        found |= {f"floor_{part}": floor for part, floor in floors.items()}
        found |= {f"above_floor_{part}": values for part, values in above.items()}
        return found | {"above_floor": np.any(known, axis=0) if known else None}

    return _long(store, records, {"feature": store.policy.features}, columns)


def _pathways(store: RunStore, records: list[WindowRecord]) -> pa.Table:
    start = store.baseline.coef

    def columns(record: WindowRecord) -> Columns:
        parts = {part: record.shift.get(part) for part in PATHWAYS}
        complete = [part for part in parts.values() if part is not None]
        found: Columns = {name: _norm(part) for name, part in parts.items()}
        found["total"] = _norm(sum(complete[1:], complete[0])) if complete else None
        found["cumulative"] = _norm(record.coef - start) if record.coef is not None and start is not None else None
        scalars = {"first_order_error": record.first_order_error}
        scalars |= {f"reliability_{part}": record.reliability.get(part) for part in PATHWAYS}
        shape = (len(store.policy.behaviours),)
        return found | {name: None if value is None else np.full(shape, value) for name, value in scalars.items()}

    return _long(store, records, {}, columns)


#: The tables by name.
TABLES: Mapping[str, _Builder] = {
    "steps": _steps,
    "categories": _categories,
    "features": _features,
    "pathways": _pathways,
}


def _builders(store: RunStore) -> dict[str, _Builder]:
    """The tables that a run has."""
    if not is_attributed(store.manifest):
        return dict(TABLES)
    return {**TABLES, **{name: _of_pairs(build) for name, build in PAIR_TABLES.items()}}


def _of_pairs(build: Callable[[RunStart, Sequence[WindowRecord]], pa.Table]) -> _Builder:
    return lambda store, records: build(store.start, records[1:])


def _long(
    store: RunStore,
    records: list[WindowRecord],
    axes: Mapping[str, Iterable[Any]],
    columns: Callable[[WindowRecord], Columns],
) -> pa.Table:
    """Stack the arrays ``[*axes, behaviour]`` that ``columns`` gives per ok record into a table; None becomes nulls."""
    used = [each for each in records if each.status == "ok"]
    names = {**{axis: list(values) for axis, values in axes.items()}, "behaviour": list(store.policy.behaviours)}
    shape = tuple(len(values) for values in names.values())
    places = np.indices(shape).reshape(len(shape), -1)
    size = places.shape[1]
    table: Columns = {"step": pa.array(np.repeat([each.step for each in used], size), pa.int64())}
    for place, (axis, values) in zip(places, names.items(), strict=True):
        table[axis] = pa.array([values[index] for index in place] * len(used))
    blocks = [columns(each) for each in used]
    for name in blocks[0]:
        kind = pa.bool_() if name.startswith("above_floor") else pa.float64()
        chunks = [pa.nulls(size, kind) if each[name] is None else pa.array(each[name].ravel(), kind) for each in blocks]
        table[name] = pa.chunked_array(chunks, kind)
    return pa.table(table)


def _floors(store: RunStore, records: list[WindowRecord]) -> dict[int, dict[str, Array | None]]:
    """Step -> noise floor of every part for the window's update, ``[feature, behaviour]``; None where not known."""
    found: dict[int, dict[str, Array | None]] = {}
    for record, noise in zip(records, all_in_force(store.noise, records), strict=True):
        floors = floors_at(noise, record.update_rms) if record.shift else None
        found[record.step] = {part: None if floors is None else floors[part] for part in PATHWAYS}
    return found


def _category_means(store: RunStore, record: WindowRecord) -> Array:
    """Mean behaviour of every category, ``[category, behaviour]``."""
    if record.snapshot is None:
        raise StoreError(
            f"the record of step {record.step} in {store.path} is marked ok but has no snapshot; ok records carry one. "
            "Write what was measured, or the status that it has."
        )
    return mean_by_group(record.snapshot.y, store.groups)


def _norm(values: Array | None) -> Array | None:
    return None if values is None else np.linalg.norm(values, axis=0)


def _at(values: tuple[float, ...], number: int) -> float | None:
    return values[number] if number < len(values) else None
