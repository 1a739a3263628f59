"""What `dual-lora gpu-check` alone asks of the kernels: every way of launching them, and how often Sign(D C) is wrong.

P and Q could be made on the matrix units, which are free while plain fp32 units work (`triton_launch.PRODUCTS`). What
would be lost is signs: rounded operands flip 90 (TF32) or 670 (bf16) in a million and move ΔW by 1.7 % or 5.2 %; three
TF32 products, whose sum has nearly fp32's bits, should flip as few as fp32 does. A card has to show that first.
"""

from collections.abc import Iterator, Sequence

import torch

from dual_lora.core import triton_compose, triton_gradient, triton_launch
from dual_lora.core.reference import Adapter, Factors, Form, direction
from dual_lora.core.triton_check import Launch, Layout
from dual_lora.core.triton_compose import compose


def every(device: torch.device, dtype: torch.dtype, ranks: Sequence[tuple[int, int, Form]]) -> Iterator[Launch]:
    """Every way in which the kernels are launched with these ranks and that dtype: tile, alignment, order of sums."""
    target = triton_launch.target(device)
    for n, strides in ((16, (16, 1)), (0, (0, 1))):  # aligned, and shifted by one entry with rows of odd length
        layout = Layout(dtype, n == 16, strides)
        size = n, n, n
        tile = triton_compose.TILES[target]
        yield Launch("compose", device, False, tile, (0, n, n), tuple(ranks), (layout, Layout(dtype, True, strides)))
        for tile in triton_gradient.TILES[target, dtype.itemsize]:
            for deterministic in (False, True):
                yield Launch("gradient", device, deterministic, tile, size, tuple(ranks), (layout, layout))
            yield Launch("gradient", device, False, tile, (0, n, n), tuple(ranks), (None, layout))


def sign_flips(device: torch.device, products: str, size: int = 2048, r: int = 16) -> int:
    """Entries of Sign(D C), [size, size], in which the compose kernel differs from fp64; factors from N(0, 0.02²)."""
    generator = torch.Generator().manual_seed(0)
    C, D = (torch.randn(shape, generator=generator).mul(0.02).to(device) for shape in ((r, size), (size, r)))
    ones = torch.ones(1, size, device=device), torch.ones(size, 1, device=device)  # P = 1: ΔW is the sign itself
    adapter = Adapter(Factors(*ones, C, D), torch.ones((), device=device), Form())
    truth = direction(D.double() @ C.double(), adapter.form)
    return int((compose(None, [adapter], products=products) != truth).sum())
