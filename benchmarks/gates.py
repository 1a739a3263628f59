"""The limits, as data. README.md says where each comes from; a row is added here and nowhere else.

A gate is one ratio of costs of one work: that of `subject` over that of another variant. Where `any_of` has several
limits, one of them has to hold (the floor moves with the machine, LoRA's cost does not move with it).
"""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """subject ≤ at_most × against."""

    against: str
    at_most: float
    aim: float | None = None
    bound: str = ""  # what the arithmetic allows, for the reader


class Gate(NamedTuple):
    """One line of the table."""

    work: str
    any_of: tuple[Limit, ...]
    threads: int | None = None  # None: with every number of threads of the run
    subject: str = "dual"


def _one(work: str, *limit: object, **kwargs: object) -> Gate:
    return Gate(work, (Limit(*limit),), **kwargs)  # type: ignore[arg-type]


FLOOR = "floor"  # what no exact way avoids, as products alone
STEP = "step SmolLM2-135M 4×256 fp32"
BF16_STEP = "step SmolLM2-135M 4×256 bf16"
SMALL_STEP = "step MiniLM 16×24 fp32"
SAMPLED_STEP = "step of 6 SmolLM2 blocks 4×256 fp32"
FUSED_STEP = "that step of PEFT's HiRA and LoHa"
FUSED_MEMORY = "memory of HiRA's and LoHa's step"
GRPO = "GRPO step, a third of SmolLM2-135M"
GRPO_LONG = "GRPO step, that model, completions of 256"

GATES: tuple[Gate, ...] = (
    _one(STEP, "lora", 1.40, 1.30, "1.29 by flops"),
    _one(STEP, "full", 1.00),
    _one(STEP, "dora", 1.10),
    _one(STEP, "hira", 0.75),
    Gate(STEP, (Limit("naive", 0.72), Limit("lora", 1.29, None, "1.29 by flops"))),
    _one(BF16_STEP, "lora", 1.45, 1.15, "1.29 by flops", threads=1),
    _one(SMALL_STEP, "lora", 1.60, 1.20, "1.40 by flops", threads=1),
    _one(SMALL_STEP, "lora", 1.25, subject="quarter", threads=1),
    _one(SAMPLED_STEP, "lora", 1.09, subject="quarter", threads=1),
    _one(SAMPLED_STEP, "lora", 1.15, subject="auto", threads=1),
    _one(FUSED_STEP, "hira", 0.75, subject="hira fused", threads=1),
    _one(FUSED_STEP, "loha", 0.75, subject="loha fused", threads=1),
    _one(FUSED_MEMORY, "hira", 0.92, 0.70, "0.83 by what is kept", subject="hira fused", threads=1),
    _one(FUSED_MEMORY, "loha", 0.92, 0.70, "0.83 by what is kept", subject="loha fused", threads=1),
    _one(GRPO, "lora", 1.35, None, "1.26 by flops", threads=1),
    _one(GRPO_LONG, "lora", 1.10, threads=1),
    _one("memory of that step", "lora", 1.00, 0.95, threads=1),
    _one("linear 4096 T2048 fp32", "lora", 1.50, None, "1.39 by flops"),
    _one("linear 4096 T2048 fp32", "full", 1.10),
    _one("linear 4096 T2048 fp32", "lora", 1.20, subject="quarter"),
    Gate("linear 4096 T512 fp32", (Limit("lora", 1.75, None, "1.59 by flops"), Limit(FLOOR, 1.15))),
    Gate("linear 4096 T512 bf16", (Limit("lora", 1.95, None, "1.60 by flops"), Limit(FLOOR, 1.30))),
    Gate("linear 4096 T512 nf4", (Limit("lora", 1.50), Limit(FLOOR, 1.30))),
    Gate("linear 4096 T2048 nf4", (Limit("lora", 1.50), Limit(FLOOR, 1.30))),
    _one("kept for backward", "inputs", 1.00, None, "nothing beyond x, W and factors", threads=1),
    _one("host time of a layer", "lora", 2.60, 2.25, "", threads=1),
    _one("decode 4096 T1 bf16", "base", 1.10, None, "1", threads=1),
    _one("decode 4096 T1 bf16 merged", "base", 1.00, None, "1", subject="merged", threads=1),
    _one("merge 4096 bf16", "lora", 1.00, 0.50, threads=1),
    _one("merge 4096 fp32", "lora", 1.00, 0.50, threads=1),
    _one("unmerge 4096 bf16", "lora", 1.00, 0.50, threads=1),
    _one("unmerge 4096 fp32", "lora", 1.00, 0.50, threads=1),
    _one("import", "lora", 1.20, threads=1),
    _one("first forward", "lora", 1.20, threads=1),
    _one("adapter load 7B", "lora", 1.20, threads=1),
    Gate(
        "threads on that step",
        (Limit("one thread", 1 / 1.7, None, "0.5"), Limit("as LoRA's scales", 1.05)),
        subject="two threads",
        threads=2,
    ),
)
