"""Means over layers, of an analysis's rows. Layers count by their number of entries, so that a mean is over entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def mean_over_layers(rows: Sequence[Row], key: str) -> float | None:
    """Weighted by O · I where the rows have them; None where no row has the key."""
    found = [(row[key], row.get("O", 1) * row.get("I", 1)) for row in rows if row.get(key) is not None]
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else None


def spread_over_layers(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """The values between which the middle 80 % of the layers lie, each layer counting once."""
    values = sorted(row[key] for row in rows if row.get(key) is not None)
    last = len(values) - 1
    return values[round(0.1 * last)], values[round(0.9 * last)]


def last_state(rows: Sequence[Row]) -> list[Row]:
    """The rows of the largest step."""
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == last]
