"""Beside how many others a method's runs were measured: times on a shared machine are not those of a free one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def loads(methods: Iterable[Mapping[str, Any]]) -> set[int | None]:
    """All numbers of runs at a time in these methods of a results.json; None where a run does not say."""
    return {n for m in methods for n in m.get("measured_beside", [])}


def company(method: Mapping[str, Any]) -> str:
    """How many runs there were at a time when this method's were measured, "?" where it was not recorded."""
    return ", ".join("?" if n is None else str(n) for n in method.get("measured_beside", []))
