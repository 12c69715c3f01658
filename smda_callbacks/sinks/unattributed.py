"""Which windows of a run were not attributed to pairs, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from smda_callbacks.records import WindowRecord


def unattributed(manifest: Mapping[str, Any], windows: Iterable[WindowRecord]) -> tuple[int, dict[str, int]]:
    """The number of booked windows, and for each reason how many of them were not attributed, most first."""
    booked = [window for window in windows if window.status == "ok"]
    every = int((manifest.get("attribution") or {}).get("every", 1))
    unknown = f"left out by attribution.every: {every}" if every > 1 else "the store does not say why"
    counts: dict[str, int] = {}
    for window in booked:
        if window.pairs is None:
            why = (window.unattributed or unknown).rstrip(".")
            counts[why] = counts.get(why, 0) + 1
    return len(booked), dict(sorted(counts.items(), key=lambda item: -item[1]))


def unattributed_sentence(manifest: Mapping[str, Any], windows: Iterable[WindowRecord]) -> str | None:
    """How many windows were not attributed, and why, in a sentence; None where all were, or where pairs never are."""
    if (manifest.get("attribution") or {}).get("engine", "off") == "off":
        return None
    booked, counts = unattributed(manifest, windows)
    left = sum(counts.values())
    if not left:
        return None
    verb, noun = ("is" if left == 1 else "are"), ("window" if booked == 1 else "windows")
    text = f"{left} of {booked} {noun} {verb} not attributed"
    if len(counts) == 1:
        return f"{text}: {next(iter(counts))}."
    return f"{text}. " + " ".join(f"{number} of them: {why}." for why, number in counts.items())
