"""The works that gates and curves name, and how each is run. A work measures; it knows nothing of limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .gates import BF16_STEP, FUSED_MEMORY, FUSED_STEP, GRPO, GRPO_LONG, SAMPLED_STEP, SMALL_STEP, STEP
from .measure import Measured, Unavailable


class Work(NamedTuple):
    """`run(threads, seconds)` returns measurements by the name of the work that they answer."""

    names: tuple[str, ...]
    run: Callable[[int, float], dict[str, Measured]]
    threads: int | None = None  # the only number of threads that it is made for
    shape: dict[str, Any] = {}  # noqa: RUF012 - read only


def linear(O: int, I: int, T: int, dtype: str, methods: tuple[str, ...]) -> Callable[[int, float], dict[str, Measured]]:
    def run(threads: int, seconds: float) -> dict[str, Measured]:
        import torch

        from . import linear as module

        if dtype == "bfloat16":
            _refuse_slow_bf16()
        return {_linear(O, T, dtype): module.measure(O, I, T, getattr(torch, dtype), threads, seconds, methods)}

    return run


def _linear(O: int, T: int, dtype: str) -> str:
    return f"linear {O} T{T} {SHORT[dtype]}"


SHORT = {"float32": "fp32", "bfloat16": "bf16"}
# Where torch's product in bf16 takes more times that in fp32, one pass of LoRA takes minutes. With AVX-512 and no units
# for bf16 it takes one to two times, with AVX2 eight to fifty.
SLOW_BF16 = 4


def _refuse_slow_bf16() -> None:
    """Raise Unavailable on a processor for which torch has no fast product in bf16."""
    from dual_lora.lab.model.precision import fast_precision

    milliseconds = fast_precision("cpu").milliseconds  # which the ledger's rows have asked for already
    times = milliseconds["bf16"] / milliseconds["fp32"]
    if times > SLOW_BF16:
        raise Unavailable(f"a product of matrices in bf16 takes {times:.0f} times as long as in fp32 on this processor")


def _nf4(threads: int, seconds: float) -> dict[str, Measured]:
    from . import quantized

    return {f"linear 4096 T{T} nf4": quantized.measure(4096, 4096, T, threads, seconds / 2) for T in (512, 2048)}


def _step(threads: int, seconds: float) -> dict[str, Measured]:
    """The step on one thread, or (2) on all: then also how the step of ours scales, and LoRA's."""
    from . import step

    made = _trainings()
    measured = step.measure(made, threads, seconds)
    if threads == 1:
        return {STEP: measured}
    scaling = step.measure_scaling(made["dual"], made["lora"], threads, seconds / 3)
    return {STEP: measured, "threads on that step": scaling}


def _bf16_step(threads: int, seconds: float) -> dict[str, Measured]:
    """Its layers are tested in bf16 by the works of one layer, and its model in fp32."""
    import torch

    from . import step

    _refuse_slow_bf16()
    made = step.trainings(("dual", "lora"), step.tokens(), dtype=torch.bfloat16)
    return {BF16_STEP: step.measure(made, threads, seconds)}


def _small_step(threads: int, seconds: float) -> dict[str, Measured]:
    from . import step

    made = step.encoder_trainings(("dual", "quarter", "lora", "naive"), 16, 24)
    step.check(made["dual"], made.pop("naive"))
    return {SMALL_STEP: step.measure(made, threads, seconds, (9, 99))}


def _sampled_step(threads: int, seconds: float) -> dict[str, Measured]:
    from . import step

    made = step.trainings(("dual", "quarter", "auto", "lora"), step.tokens(), num_hidden_layers=6)
    return {SAMPLED_STEP: step.measure(made, threads, seconds, (5, 25))}


FUSED = ("hira", "hira fused", "loha", "loha fused")


def _fused_step(threads: int, seconds: float) -> dict[str, Measured]:
    from . import step

    made = step.trainings(FUSED, step.tokens())
    for method in ("hira", "loha"):
        step.check_fused(made[f"{method} fused"], made[method])
    return {FUSED_STEP: step.measure(made, threads, seconds)}


_made: dict[str, Any] = {}


def _trainings() -> dict[str, Any]:
    """The models of the step, built and tested once for all numbers of threads."""
    from . import layers, step

    if not _made:
        _made.update(step.trainings(layers.METHODS, step.tokens()))
        step.check(_made["dual"], _made["naive"])
    return _made


def _kept(threads: int, seconds: float) -> dict[str, Measured]:
    import torch

    from .linear import kept_for_backward

    return {"kept for backward": kept_for_backward(512, 768, 64, torch.float32)}


def _decode(threads: int, seconds: float) -> dict[str, Measured]:
    import torch

    from .inference import decode

    cached, merged = decode(4096, 4096, 1, torch.bfloat16, threads, seconds)
    return {"decode 4096 T1 bf16": cached, "decode 4096 T1 bf16 merged": merged}


def _merge(dtype: str) -> Callable[[int, float], dict[str, Measured]]:
    def run(threads: int, seconds: float) -> dict[str, Measured]:
        import torch

        from .inference import merge

        merged, unmerged = merge(4096, 4096, getattr(torch, dtype), seconds)
        return {f"merge 4096 {SHORT[dtype]}": merged, f"unmerge 4096 {SHORT[dtype]}": unmerged}

    return run


def _grpo(work: str, length: str) -> Callable[[int, float], dict[str, Measured]]:
    def run(threads: int, seconds: float) -> dict[str, Measured]:
        from . import grpo

        return {work: grpo.measure(threads, seconds, grpo.COMPLETIONS[length])}

    return run


def _host(threads: int, seconds: float) -> dict[str, Measured]:
    from . import host

    return {"host time of a layer": host.measure(seconds / 2)}


def _child(task: str, name: str, rounds: int, methods: tuple[str, ...] = ("dual", "lora")) -> Work:
    def run(threads: int, seconds: float) -> dict[str, Measured]:
        from .child import compare

        return {name: compare(task, rounds, methods)}

    return Work((name,), run, threads=1)


WITH_FLOOR = ("dual", "lora", "full", "floor")

# In the order of the run: what is quick comes first.
WORKS: tuple[Work, ...] = (
    Work(("kept for backward",), _kept, 1, {"O": 512, "I": 768, "T": 64}),
    Work(("host time of a layer",), _host, 1, {"O": 16, "I": 16, "T": 2}),
    Work(("decode 4096 T1 bf16", "decode 4096 T1 bf16 merged"), _decode, 1, {"O": 4096, "I": 4096, "T": 1}),
    Work(("merge 4096 bf16", "unmerge 4096 bf16"), _merge("bfloat16"), 1, {"O": 4096, "I": 4096}),
    Work(("merge 4096 fp32", "unmerge 4096 fp32"), _merge("float32"), 1, {"O": 4096, "I": 4096}),
    _child("import", "import", 3),
    _child("first-forward", "first forward", 3),
    _child("load", "adapter load 7B", 2),
    _child("memory", "memory of that step", 1),
    _child("memory", FUSED_MEMORY, 1, FUSED),
    Work(("linear 4096 T512 bf16",), linear(4096, 4096, 512, "bfloat16", WITH_FLOOR), None,
         {"O": 4096, "I": 4096, "T": 512}),
    Work(("linear 4096 T512 fp32",), linear(4096, 4096, 512, "float32", WITH_FLOOR), None,
         {"O": 4096, "I": 4096, "T": 512}),
    Work(("linear 4096 T2048 fp32",), linear(4096, 4096, 2048, "float32", (*WITH_FLOOR, "quarter")), None,
         {"O": 4096, "I": 4096, "T": 2048}),
    Work(("linear 4096 T512 nf4", "linear 4096 T2048 nf4"), _nf4, None, {"O": 4096, "I": 4096}),
    Work((GRPO,), _grpo(GRPO, "short"), 1, {"prompts": 8, "prompt": 40, "completion": 32}),
    Work((GRPO_LONG,), _grpo(GRPO_LONG, "long"), 1, {"prompts": 8, "prompt": 40, "completion": 256}),
    Work((SMALL_STEP,), _small_step, 1, {"batch": 16, "length": 24}),
    Work((SAMPLED_STEP,), _sampled_step, 1, {"batch": 4, "length": 256}),
    Work((FUSED_STEP,), _fused_step, 1, {"batch": 4, "length": 256}),
    Work((BF16_STEP,), _bf16_step, 1, {"batch": 4, "length": 256}),
    Work((STEP, "threads on that step"), _step, None, {"batch": 4, "length": 256}),
)  # fmt: skip
