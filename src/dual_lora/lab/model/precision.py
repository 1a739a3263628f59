"""The precision that `auto` stands for: bf16 where this device is really faster with it, fp32 elsewhere.

On a CPU a few small products decide, not a query: torch says that bf16 is supported wherever it can be computed, and
without units for it (most CPUs) a product takes 5 to 20 times as long as in fp32. An accelerator is asked.
A run, or a study as a whole, is told once; its recipe keeps the answer, so that another machine does the same.
"""

from __future__ import annotations

import functools
import timeit
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from dual_lora.lab.model.device import best_device, process_count
from dual_lora.lab.recipe.schema import Recipe

AUTO: Final = "auto"
Short = Literal["bf16", "fp32"]
DTYPES: dict[Short, str] = {"bf16": "bfloat16", "fp32": "float32"}
# A recipe's field, and what stands there for each of the two.
FIELDS: dict[tuple[str, str], dict[Short, str]] = {
    ("model", "dtype"): DTYPES,
    ("train", "autocast"): {"bf16": "bf16", "fp32": "none"},
}
FASTER = 1.5  # bf16 has to be so many times as fast: below that, rounding buys nothing
SHAPE = 128, 576, 1536  # tokens, inputs, outputs: a layer of SmolLM2-135M
ROUNDS = 7


@dataclass(frozen=True)
class Fast:
    """The precision that a device is fast in. milliseconds: of one product in each, where that was measured."""

    precision: Short
    why: str
    milliseconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"auto: {self.precision} ({self.why})"


@functools.cache
def fast_precision(device: str | None = None) -> Fast:
    """bf16 or fp32, for the device of this process or another one. Found once a process."""
    import torch

    device = device or best_device()
    kind = device.partition(":")[0]
    if kind == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return Fast("bf16", f"{device} has units for it") if able else Fast("fp32", f"{device} has no units for bf16")
    if kind != "cpu":
        return _try_bf16(device)
    if process_count() > 1:  # each process would measure for itself, and has to do the same
        return Fast("fp32", "several processes on CPUs")
    return faster_precision(measure_products())


def faster_precision(milliseconds: dict[str, float]) -> Fast:
    """The choice that follows from the times of a product in fp32 and in bf16."""
    plain, short = milliseconds["fp32"], milliseconds["bf16"]
    times = f"a matrix product takes {short:.2f} ms in bf16, {plain:.2f} in fp32"
    return Fast("bf16" if short * FASTER < plain else "fp32", times, milliseconds)


def measure_products() -> dict[str, float]:
    """Milliseconds of one small product on this CPU in fp32 and in bf16, measured in turns.

    The fastest of each counts: other work on the machine only adds to it.
    """
    import torch

    T, I, O = SHAPE
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    operands = {name: (torch.ones(T, I, dtype=dtype), torch.ones(O, I, dtype=dtype)) for name, dtype in dtypes.items()}
    spent: dict[str, list[float]] = {name: [] for name in dtypes}
    with torch.no_grad():
        for _ in range(1 + ROUNDS):
            for name, (x, weight) in operands.items():
                product = functools.partial(torch.nn.functional.linear, x, weight)
                spent[name].append(1e3 * timeit.timeit(product, number=1))
    return {name: round(min(times[1:]), 4) for name, times in spent.items()}  # the first one warms up


def _try_bf16(device: str) -> Fast:
    import torch

    try:
        x = torch.ones(8, 8, device=device, dtype=torch.bfloat16)
        (x @ x).sum().item()
    except (RuntimeError, TypeError, NotImplementedError):
        return Fast("fp32", f"{device} does not compute in bf16 here")
    return Fast("bf16", f"{device} computes in it")


def requested_precision(recipe: Recipe) -> dict[str, str]:
    """Return the precision that a recipe asks for: {"model.dtype": ..., "train.autocast": ...}."""
    return {f"{part}.{name}": str(getattr(getattr(recipe, part), name)) for part, name in FIELDS}


def is_auto(recipe: Recipe) -> bool:
    """Whether a field of the recipe is `auto`."""
    return AUTO in requested_precision(recipe).values()


def with_precision(recipe: Recipe, precision: Short) -> Recipe:
    """The recipe with `precision` instead of every `auto`."""
    return _replaced(recipe, {at: words[precision] for at, words in FIELDS.items()})


def with_precision_of(recipe: Recipe, before: Recipe) -> Recipe:
    """The recipe with what `before`, its run, has instead of every `auto`."""
    return _replaced(recipe, {(part, name): getattr(getattr(before, part), name) for part, name in FIELDS})


def _replaced(recipe: Recipe, values: dict[tuple[str, str], str]) -> Recipe:
    for (part, name), value in values.items():
        own = getattr(recipe, part)
        if getattr(own, name) == AUTO:
            recipe = recipe.model_copy(update={part: own.model_copy(update={name: value})})
    return recipe


def with_trained_in_full(recipe: Recipe) -> Recipe:
    """The recipe with fp32 instead of `auto` for weights that are trained themselves.

    In bf16 most steps of an optimizer are smaller than its rounding.
    """
    return _replaced(recipe, {("model", "dtype"): "float32"}) if recipe.method["name"] == "full" else recipe


def with_device_precision(recipe: Recipe) -> Recipe:
    """The recipe with what this device is fast in; nothing is measured if it leaves nothing open."""
    recipe = with_trained_in_full(recipe)
    return with_precision(recipe, fast_precision().precision) if is_auto(recipe) else recipe


def record_of(asked: Recipe, chosen: Recipe) -> dict[str, Any]:
    """Return the record's entry for precision: requested, chosen, and what the choice followed from."""
    found = {"asked": requested_precision(asked), "chosen": requested_precision(chosen)}
    return found | (asdict(fast_precision()) if is_auto(asked) else {})
