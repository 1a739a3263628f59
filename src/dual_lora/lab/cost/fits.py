"""The largest batch, length or rank whose peak stays within a given memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dual_lora.lab.cost.memory import memory_of
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import simulate
from dual_lora.lab.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LENGTH_STEP = 64  # tokens
LARGEST_BATCH, LARGEST_LENGTH, LARGEST_RANK = 1024, 1 << 17, 512


def parse_size(text: str) -> float:
    """Bytes in "24GB" or "80 GiB". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise UserError(f"--fits is {text!r}, expected a size such as 24GB or 16GiB.")
    return float(found[1]) * _UNITS[found[2]]


def largest(
    options: StepOptions,
    limit: float,
    devices: int = 1,
    strategy: str = "ddp",
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """{"batch", "length", "rank"}: each the largest one that fits while the other two stay; None where nothing fits.

    Length comes in steps of 64 tokens, rank in powers of two (None for full fine-tuning).
    """
    known: dict[Any, float] = {}

    def peak(changed: StepOptions) -> float:
        key = changed.batch, changed.length, changed.rank
        if key not in known:
            if say:
                say(f"batch {changed.batch}, length {changed.length}, rank {changed.rank}")
            known[key] = memory_of(changed, simulate(changed), devices, strategy).peak
        return known[key]

    longest = min(getattr(options.config, "max_position_embeddings", None) or LARGEST_LENGTH, LARGEST_LENGTH)
    batch = _last(lambda k: peak(replace(options, batch=k)) <= limit, LARGEST_BATCH)
    length = _last(lambda k: peak(replace(options, length=k * LENGTH_STEP)) <= limit, longest // LENGTH_STEP)
    rank = None
    if options.rank:
        powers = LARGEST_RANK.bit_length() - 1
        found = _last(lambda k: peak(options.with_rank(2**k)) <= limit, powers)
        rank = 2**found if found else None
    return {"batch": batch or None, "length": length * LENGTH_STEP or None, "rank": rank}


def _last(fits: Callable[[int], bool], top: int) -> int:
    """The largest k of 1 … top that fits, where every smaller one does too; 0 if none does."""
    if top < 1 or not fits(1):
        return 0
    low, high = 1, None
    while high is None and low < top:
        tried = min(2 * low, top)
        if fits(tried):
            low = tried
        else:
            high = tried
    while high is not None and high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
