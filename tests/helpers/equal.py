"""Equality of records to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def assert_same(found: Any, expected: Any, place: str = "record") -> None:
    """Fail unless both hold the same values of the same types, arrays to the last bit; lists may stand for tuples."""
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), place
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), place
        assert found.tobytes() == expected.tobytes(), place
    elif is_dataclass(expected):
        assert type(found) is type(expected), place
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name), f"{place}.{field.name}")
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{index}]")
    elif isinstance(expected, float) and math.isnan(expected):
        assert isinstance(found, float), place
        assert math.isnan(found), place
    else:
        assert type(found) is type(expected), place
        assert found == expected, place
