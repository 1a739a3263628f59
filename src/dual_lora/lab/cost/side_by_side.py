"""The same step with several methods on several numbers of devices: what the command shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dual_lora.lab.cost.memory import Memory, memory_of
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import Step, simulate
from dual_lora.lab.errors import UserError


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
        """For JSON: bytes, parameters, flops, seconds."""
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
    options: StepOptions,
    methods: Sequence[str],
    devices: int = 1,
    strategy: str = "ddp",
    rates: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> tuple[list[Column], dict[str, str]]:
    """A column for every method that is possible, and the reason for every one that is not.

    Raises UserError where none is possible, with the first one's reason.
    """
    from dual_lora.lab.cost.calibrate import seconds_of

    columns, refused = [], {}
    for name in methods:
        own = options.with_method(name)
        try:
            if own.quantisation != "none" and name == "full":
                raise UserError("Full fine-tuning needs a base that is not quantised.")
            step = simulate(own, say)
            memory = {n: memory_of(own, step, n, strategy) for n in counts(devices)}
        except UserError as error:
            refused[name] = str(error)
            continue
        columns.append(Column(own, step, memory, seconds_of(own, step, rates) if rates else None))
    if not columns:
        raise UserError(next(iter(refused.values())))
    return columns, refused


def counts(devices: int) -> list[int]:
    """1, 2, 4 … up to `devices`, which is the last one."""
    powers = [2**k for k in range(devices.bit_length()) if 2**k < devices]
    return [*powers, devices]
