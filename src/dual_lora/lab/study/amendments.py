"""What was changed in a study after it was begun: noticed field by field, and kept for its results."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dual_lora.lab.read import read_json

Changes = dict[str, tuple[Any, Any]]  # field: (old, new)


class Amendment(BaseModel):
    """A change of the study after it was begun: what, when, and how many final runs had ended by then."""

    date: str
    what: str
    ended: int
    of: int
    fields: Changes = {}


def amendment(what: str, ended: Collection[bool], fields: Changes) -> Amendment:
    """A change of today. ended: whether each final run had."""
    return Amendment(date=time.strftime("%Y-%m-%d"), what=what, ended=sum(ended), of=len(ended), fields=fields)


def changes(before: dict[str, Any], now: dict[str, Any], inside: Iterable[str] = ("search",)) -> Changes:
    """What differs, field by field `inside` some. One that was not known is none of them."""
    pairs: Changes = {}
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        if name in inside and isinstance(old, dict) and isinstance(new, dict):
            pairs |= {f"{name}.{key}": pair for key, pair in changes(old, new).items()}
        elif old != new:
            pairs[name] = old, new
    return pairs


def ended_in(results: Path) -> list[bool]:
    """Whether each final run had ended, by the results of an earlier version."""
    try:
        return [seed["status"] != "missing" for method in read_json(results)["methods"] for seed in method["seeds"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
