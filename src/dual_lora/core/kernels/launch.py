"""Launch constants of the Triton kernels, and the one place that asks what device they run on.

They were chosen without a GPU: each row was compiled ahead of time, and its registers, spills and shared memory were
read off the machine code (`benchmarks/compile-table.md`, for every Triton and card; the tests compare the rows with
it). None has been timed. A sweep on a card may change every number here.

The factor products run on plain fp32 units, whose operands want registers: that, not the matrix units, bounds the
tiles. A rank chunk of 16 is the least that `tl.dot` takes for fp32 on NVIDIA before Triton 3.8.
"""

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Adapter, check_factors, require_weight

RANK_CHUNK = 16
"""Ranks multiplied at a time in P = B A and Q = D C; the same in every kernel, so that they agree on every sign."""

PRODUCTS = "ieee"
"""Precision of P and Q in every kernel: "ieee" is fp32 on plain units. "tf32x3" is three products on the matrix units,
and may be set here for a card on which `dual-lora gpu-check` finds no more wrong signs than with "ieee"."""


class Tile(NamedTuple):
    """The part of ΔW that one program computes, and its launch constants."""

    rows: int  # of ΔW (out features)
    cols: int  # of ΔW (in features)
    tokens: int  # of dy and x multiplied at a time; compose has none
    warps: int
    stages: int
    splits: int = 1  # equal parts of the columns whose P and Q are made one after the other

    def constants(self) -> dict[str, int]:
        """Return the constants that both kernels take."""
        return {"ROWS": self.rows, "COLS": self.cols, "num_warps": self.warps, "num_stages": self.stages}


class Stack(NamedTuple):
    """One or several adapters as the kernels take them: one tuple for each letter."""

    letters: list[tuple[Tensor, ...]]  # A of every adapter, B, C and D, contiguous
    scales: tuple[Tensor, ...]
    shape: torch.Size  # of ΔW: [O, I] or [E, O, I]
    as_given: bool  # no factor was copied to make it contiguous
    constants: dict[str, Any]  # ranks and forms

    @property
    def batch(self) -> int:
        """E, or 1."""
        return self.shape[0] if len(self.shape) == 3 else 1


@functools.cache
def target(device: torch.device) -> str:
    """Return a device's row in the tables: "sm_80", "sm_90", "gfx942", or "interpreter" (CPU); see `table_row`."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return table_row(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return table_row(f"sm_{major}{minor}")


def table_row(card: str) -> str:
    """Return the row for a card's architecture, such as "sm_89" or "gfx942".

    Consumer cards take "sm_80", whose tiles fit into their shared memory. Raises NotImplementedError for a card without
    a row: on older cards the kernels would spill kilobytes of each thread's registers.
    """
    if card.startswith("gfx"):
        if card == "gfx942":
            return card
        expected = "gfx942 (MI300)"
    else:
        major = int(card.removeprefix("sm_")[:-1])
        if major >= 8:
            return "sm_90" if major in (9, 10) else "sm_80"
        expected = "sm_80 (Ampere) or later"
    raise NotImplementedError(f"it is {card}, and they have tiles for {expected}")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, which is where Triton launches."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; a grid should have at least one program for each."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def stack(adapters: Sequence[Adapter]) -> Stack:
    """Check the adapters against each other and lay them out for the kernels.

    The factors are matrices, or all of them carry the same leading batch dimension (experts).
    """
    if not adapters:
        raise ValueError("Got no adapter: pass at least one.")
    first = adapters[0].factors
    shape = torch.Size((*first.B.shape[:-1], first.A.shape[-1]))
    if len(shape) not in (2, 3):
        raise ValueError(f"The factors make a weight of shape {tuple(shape)}: expected [O, I] or [E, O, I].")
    check_factors(adapters, *shape)
    for factors, scale, form, _ in adapters:
        signs = torch.int32 if form.direction == "frozen" else torch.float32
        dtypes = torch.float32, torch.float32, signs, signs, torch.float32
        for name, t, dtype in zip(("A", "B", "C", "D", "scale"), (*factors, scale), dtypes, strict=True):
            if t.dtype != dtype:
                raise ValueError(f"{name} is {t.dtype}: the kernels take {dtype} alone (Adapter.in_working_dtype).")
        if scale.numel() != 1:
            raise ValueError(f"A scale has shape {tuple(scale.shape)}: expected one number for each adapter.")
    given = list(zip(*(a.factors for a in adapters), strict=True))
    constants = {
        "R1": tuple(f.shape[-2] for f in given[0]),
        "R2": tuple(f.shape[-2] for f in given[2]),
        "FORMS": tuple(a.form.check().code for a in adapters),
        "CHUNK": RANK_CHUNK,
    }
    as_given = all(f.is_contiguous() for letter in given for f in letter)
    letters = [tuple(f.contiguous() for f in letter) for letter in given]
    return Stack(letters, tuple(a.scale for a in adapters), shape, as_given, constants)


def multiplies_weight(adapters: Sequence[Adapter]) -> bool:
    """Whether one of the updates has the weight as its direction."""
    return any(a.form.direction == "weight" for a in adapters)


def check_weight(weight: Tensor | None, adapters: Sequence[Adapter]) -> None:
    """Raise ValueError for an update that multiplies the weight where there is none."""
    if multiplies_weight(adapters):
        require_weight(weight)


class Plan(NamedTuple):
    """A launch without its tensors, to be repeated with other tensors of the same signature."""

    program: Any  # what Triton compiled
    grid: tuple[int, int, int]
    tail: tuple[Any, ...]  # numbers and constants, in the order of the kernel
    device: torch.device
    result: tuple[int, ...]  # for the caller, to make the results with

    def launch(self, *tensors: Any) -> None:
        """The kernel on these tensors."""
        with on_device(self.device):
            self.program[self.grid](*tensors, *self.tail)


MOST_PLANS = 4096  # batches of varying length make a plan for each length
plans: dict[tuple[Any, ...], Plan] = {}


def signature(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Return what a plan depends on in tensors: alignment to 16 bytes, dtypes, shapes and strides.

    It leaves out the size of a storage, by which Triton chooses instructions on AMD's cards: those have no plans.
    """
    return tuple([None if t is None else (t.data_ptr() % 16, t.dtype, t.shape, t.stride()) for t in tensors])


def first_launch(
    key: tuple[Any, ...] | None,
    device: torch.device,
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Any],
    numbers: Sequence[int],
    result: tuple[int, ...],
    **constants: Any,
) -> None:
    """Launch kernel[grid](*tensors, *numbers, **constants), and keep the plan for further launches under `key`."""
    with on_device(device):
        program = kernel[grid](*tensors, *numbers, **constants)
    if key is None or program is None or torch.version.hip is not None:  # None: by the interpreter
        return
    if len(plans) >= MOST_PLANS:
        plans.clear()
    names = kernel.arg_names[len(tensors) + len(numbers) :]
    plans[key] = Plan(program, grid, (*numbers, *(constants[name] for name in names)), device, result)


def tile_count(size: int, tile: int) -> int:
    """Return how many tiles cover `size`. (Triton's `cdiv` takes 5 µs of Python a call.)"""
    return -(-size // tile)


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of a batch of matrices; one matrix counts as a batch of one."""
    *batch, row, column = tensor.stride()
    return (batch[0] if batch else 0), row, column
