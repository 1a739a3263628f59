"""Functions of the rank in a method's fields: `2r`, `r/2`, `8 sqrt(r)`."""

import math
import re
from collections.abc import Iterable
from typing import Any

from dual_lora.lab.errors import UserError

_NUMBER = r"0*[1-9]\d*(?:\.\d+)?|0*\.\d*[1-9]\d*|0+\.\d*[1-9]\d*"  # above 0
_RANK_RULE = re.compile(
    rf"^\s*(?:(?P<times>{_NUMBER})\s*\*?\s*)?(?:(?P<root>sqrt)\s*\(\s*r\s*\)|r)\s*(?:/\s*(?P<over>{_NUMBER}))?\s*$"
)
_LONGEST_RULE = 50  # characters


def _rule(value: Any) -> re.Match[str] | None:
    return _RANK_RULE.match(value) if isinstance(value, str) and len(value) <= _LONGEST_RULE else None


def rank_rule(value: Any, rank: int | None, where: str) -> Any:
    """Turn `2r`, `r/2` or `8 sqrt(r)` in a field into that function of the rank; anything else stays what it is."""
    match = _rule(value)
    if not match:
        return value
    if rank is None:
        raise UserError(f"{where} is {value!r}, but the method has no rank: give it one (r: 16), or write a number.")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank < 10**9:
        raise UserError(f"{where} is {value!r}, and the rank is {rank!r}: expected a whole number of bearable size.")
    base = math.sqrt(rank) if match["root"] else rank
    result = base * float(match["times"] or 1) / float(match["over"] or 1)
    return int(result) if result == int(result) else result


def rank_denominator(values: Iterable[Any], least: int) -> int:
    """The rank has to be a multiple of this, so that every rank rule among the values gives a whole number."""
    rules = map(_rule, values)
    return math.lcm(least, *(max(1, int(float(m["over"]))) for m in rules if m and m["over"]))
