"""Products of two matrices, in fp32 on a CPU by the library that is faster there.

torch.mm calls MKL, which uses AVX-512 on its maker's processors alone. On others oneDNN, which torch carries as well
and uses for bf16, takes less time: half on a Zen 5, a tenth less on a Zen 4 (docs/explanation/performance-notes.md).
Everywhere else this is torch.mm.
"""

import functools
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

# Sums of so many terms are made in the same order by both libraries, one term after the other; MKL cuts longer ones.
SAME_BITS = 128
SMALL = 1 << 20
"""Multiplications below which the cost of calling oneDNN is more than it saves."""


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b, in `out` or, by oneDNN, in new memory that is laid out like `out`."""
    if not _uses_onednn(a, b):
        return torch.mm(a, b, out=out)
    if out is not None and out.stride(0) == 1 != out.stride(1):
        return onednn_mm(b.t(), a.t()).t()
    return onednn_mm(a, b)


def factors_mm(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """Return P or Q as `mm` does, with the bits of torch.mm: all implementations have to find the same signs."""
    if _uses_onednn(left, right) and right.shape[0] <= SAME_BITS and onednn_sums_alike():
        return mm(left, right, out)
    return torch.mm(left, right, out=out)


@functools.cache
def onednn_sums_alike() -> bool:
    """Whether oneDNN gives the bits of torch.mm, found by trial: with AVX2, torch 2.6's oneDNN does not."""
    numbers = partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)
    with _disable_current_modes(), torch.autocast("cpu", enabled=False):
        for rank in (16, 48, SAME_BITS):
            a, b = numbers(96, rank), numbers(rank, 320)
            whole = torch.mm(a, b)
            if not all(torch.equal(onednn_mm(a[rows], b), whole[rows]) for rows in (slice(0, 96), slice(32, 64))):
                return False
    return True


def mm_columns(whole: Tensor, cols: slice, a: Tensor, b: Tensor) -> Tensor:
    """Write a @ b to these columns of `whole` and return it; if they are all of its columns, return the product."""
    part = whole[:, cols]
    product = mm(a, b, part)
    if product is part:
        return whole
    if product.shape == whole.shape:
        return product
    part.copy_(product)
    return whole


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total` in place."""
    if _uses_onednn(a, b):
        total += mm(a, b, total)
    else:
        total.addmm_(a, b)


def as_left_operand(a: Tensor) -> Tensor:
    """Return `a` in the layout in which `mm` takes its first operand without a copy; for use in several products."""
    return a.contiguous() if a.dtype == torch.float32 and a.device.type == "cpu" and onednn_is_faster() else a


def onednn_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a.contiguous(), without_gaps(b).t(), None, "none", [], "")


def without_gaps(b: Tensor) -> Tensor:
    """Return `b`, copied if it is part of a wider matrix, for which oneDNN has only loops, a thousand times slower."""
    return b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()


def _uses_onednn(a: Tensor, b: Tensor) -> bool:
    large = a.shape[0] * a.shape[1] * b.shape[1] >= SMALL
    return large and a.dtype == torch.float32 and a.device.type == "cpu" and onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's fp32 products are faster than MKL's here."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False  # not Linux: unknown
