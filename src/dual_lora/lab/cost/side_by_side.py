"""The content of `estimate`: one step with several methods on several numbers of devices, and the largest that fits."""

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dual_lora.lab.cost.memory import Memory, memory_of
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import Step, simulate
from dual_lora.lab.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
LEAST_DEVICE = 1e6  # bytes; less was meant in another unit
LENGTH_STEP = 64  # tokens
LARGEST_BATCH, LARGEST_LENGTH, LARGEST_RANK = 1024, 1 << 17, 512


@dataclass(frozen=True)
class Column:
    """One method. memory: by number of devices; seconds: of an optimizer step on this machine, None if not known."""

    options: StepOptions
    step: Step
    memory: dict[int, Memory]
    seconds: float | None

    @property
    def method(self) -> str:
        return str(self.options.method["name"])

    @property
    def flops_a_token(self) -> float:
        return self.step.flops / (self.options.batch * self.options.length)

    @property
    def tokens_a_second(self) -> float | None:
        tokens = self.options.batch * self.options.length * self.options.accumulate
        return tokens / self.seconds if self.seconds else None

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON: bytes, parameters, flops, seconds."""
        return {
            "method": self.options.method,
            "base_parameters": round(self.step.base_parameters),
            "trainable_parameters": round(self.step.trained_parameters),
            "saved_bytes": round(self.step.saved),
            "flops_a_token": round(self.flops_a_token),
            "seconds_a_step": self.seconds,
            "tokens_a_second": self.tokens_a_second,
            "kept_for_backward": round(self.step.kept.total),
            "memory": {str(n): memory.plain() for n, memory in self.memory.items()},
        }


def side_by_side(
    steps: Sequence[StepOptions],
    devices: int = 1,
    strategy: str = "ddp",
    rates: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[Column], dict[str, str]]:
    """A column for every step that is possible, and by its method the reason for every one that is not.

    steps: one for each method. Raises UserError where none is possible, with the first one's reason.
    """
    from dual_lora.lab.cost.calibrate import seconds_of

    columns, refused = [], {}
    for options in steps:
        try:
            step = simulate(options, say)
            memory = {n: memory_of(options, step, n, strategy) for n in counts(devices)}
        except UserError as error:
            refused[str(options.method["name"])] = str(error)
            continue
        columns.append(Column(options, step, memory, seconds_of(options, step, rates) if rates else None))
    if not columns:
        raise UserError(next(iter(refused.values())))
    return columns, refused


def counts(devices: int) -> list[int]:
    """Return 1, 2, 4 … up to `devices`, which is the last one."""
    powers = [2**k for k in range(devices.bit_length()) if 2**k < devices]
    return [*powers, devices]


def parse_size(text: str) -> float:
    """Bytes in "24GB" or "80 GiB". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    if not found or found[2] not in _UNITS:
        raise UserError(f"--fits is {text!r}, expected a size such as 24GB or 16GiB.")
    size = float(found[1]) * _UNITS[found[2]]
    if size < LEAST_DEVICE:
        raise UserError(f"--fits is {text!r}, which is {size:,.0f} bytes: write the unit, as in --fits {found[1]}GB.")
    return size


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
    known: dict[Any, bool] = {}

    def fits(changed: StepOptions) -> bool:
        key = changed.batch, changed.length, changed.rank
        if key not in known:
            if say:
                shape = f"batch {changed.batch}, length {changed.length}, rank {changed.rank}"
                say(f"{changed.method['name']}: does {shape} fit?")
            known[key] = memory_of(changed, simulate(changed), devices, strategy).peak <= limit
        return known[key]

    longest = min(getattr(options.config, "max_position_embeddings", None) or LARGEST_LENGTH, LARGEST_LENGTH)
    powers = LARGEST_RANK.bit_length() - 1 if options.rank else 0
    batch = _last(lambda k: fits(replace(options, batch=k)), LARGEST_BATCH)
    length = _last(lambda k: fits(replace(options, length=k * LENGTH_STEP)), longest // LENGTH_STEP)
    power = _last(lambda k: fits(options.with_rank(2**k)), powers)
    return {"batch": batch or None, "length": length * LENGTH_STEP or None, "rank": 2**power if power else None}


def _last(fits: Callable[[int], bool], top: int) -> int:
    """The largest k of 1 … top that fits, where every smaller one does too; 0 if none does."""
    doubled = (2**i for i in range(top.bit_length()))  # a small answer, or none, is found by few questions
    end = next((k for k in doubled if not fits(k)), top + 1)
    return bisect.bisect_left(range(1, end), True, key=lambda k: not fits(k))
