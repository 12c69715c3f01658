"""Records as JSON and arrays, and back, bit for bit.

A record becomes plain JSON in which every array is a reference ``{"array": name, "dtype": dtype}`` to a tensor beside
it, ``name`` being the path of the field (``snapshot/pre``, ``shift/shift_y``). The types that
:mod:`smda_callbacks.records` declares lead the way back. No pickle, nothing that runs code when read.

JSON has no NaN and no infinity, so a float that is not finite is written as one of the strings ``"NaN"``,
``"Infinity"``, ``"-Infinity"``; fields declared as float turn back into floats, in free-form mappings (the manifest,
rows of the gap table) they stay strings. None is null. Tuples in free-form mappings come back as lists.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

#: Fields stored in a smaller dtype where that loses nothing: gates are mostly 0/1, models compute in float32 at most.
_NARROW: dict[str, type[np.generic]] = {"gate": np.uint8, "pre": np.float32}


def encode(record: Any) -> tuple[Any, Arrays]:
    """``record`` (a dataclass of records.py) as JSON-ready values and the arrays that they refer to.

    Arrays keep their dtype and every bit; those of ``gate`` that are only 0/1 are stored as uint8 and those of ``pre``
    that are float32 numbers as float32, and are given back in their own dtype. Raises TypeError for a value that is
    neither JSON nor an array.
    """
    arrays: Arrays = {}
    return _encode(record, "", arrays), arrays


def decode(kind: Any, value: Any, arrays: Mapping[str, NDArray[Any]] | None = None) -> Any:
    """The inverse of :func:`encode`: ``value`` as the declared type ``kind``, arrays taken from ``arrays``.

    Raises KeyError or TypeError where ``value`` was not written from a ``kind``.
    """
    if value is None:
        return None
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: decode(hints[name], item, arrays) for name, item in value.items()})
    origin, args = get_origin(kind), get_args(kind)
    if origin is np.ndarray:
        return (arrays or {})[value["array"]].astype(value["dtype"], copy=False)
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(decode(each, item, arrays) for each, item in zip(kinds, value, strict=True))
    if origin is Mapping:
        return {key: decode(args[1], item, arrays) for key, item in value.items()}
    if type(None) in args:
        return decode(next(each for each in args if each is not type(None)), value, arrays)
    return float(value) if kind is float else value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON in ASCII, keys in their order; numbers that are not finite become strings.

    Raises TypeError for what JSON cannot hold, naming the place.
    """
    return json.dumps(_encode(value, "", None), indent=indent, allow_nan=False)


def _encode(value: Any, path: str, arrays: Arrays | None) -> Any:
    """``value`` as JSON; arrays go to ``arrays`` under their path, and are refused where that is None."""
    if isinstance(value, np.ndarray) and arrays is not None:
        arrays[path] = _narrowed(path, value)
        return {"array": path, "dtype": value.dtype.name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return (
            value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        )
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key, path): _encode(item, f"{path}/{key}".lstrip("/"), arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item, f"{path}/{index}".lstrip("/"), arrays) for index, item in enumerate(value)]
    raise TypeError(
        f"{path or 'the value'} is a {type(value).__name__}, which JSON cannot hold; allowed are None, bool, int, "
        "float, str, lists and mappings of them. Turn it into one of these, for example with str()."
    )


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{path or 'the mapping'} has the key {key!r}; JSON keys are strings. Use str({key!r}).")
    return key


def _narrowed(path: str, array: NDArray[Any]) -> NDArray[Any]:
    plain = np.asarray(array, order="C")
    small = _NARROW.get(path.rpartition("/")[2])
    if small is None or plain.dtype.kind != "f":
        return plain
    with np.errstate(all="ignore"):  # what overflows does not come back the same, and is kept as it was
        narrow = plain.astype(small)
    return narrow if narrow.astype(plain.dtype).tobytes() == plain.tobytes() else plain


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
