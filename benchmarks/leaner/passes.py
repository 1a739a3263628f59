"""The passes over one tile: fewer and cheaper ones, and how a block of columns of a bf16 weight is read."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import judge
from .finding import Finding, compared

ROWS, COLS = 256, 1024
TINY = 1e-37
S = 1.5
CLIP = 0.5


def findings(size: int, seconds: float) -> Iterator[Finding]:
    P, Q, G, W = (torch.randn(ROWS, COLS) for _ in range(4))
    M, T, other = P.clamp(min=0), torch.empty(ROWS, COLS), torch.empty(ROWS, COLS)

    def products_and_sum() -> Tensor:
        torch.clamp(P, min=0, out=T)
        torch.sub(Q, TINY, out=other).sign_()
        return torch.addcmul(W, T, other, value=S)

    def one_displacement() -> Tensor:
        torch.clamp(P, min=0, out=T)
        torch.ops.aten.leaky_relu_backward.grad_input(T, Q, -1.0, False, grad_input=T)
        return torch.add(W, T, alpha=S)

    def copysign() -> Tensor:
        torch.clamp(P, min=0, out=T)
        torch.copysign(T, torch.sub(Q, TINY, out=other), out=T)
        return torch.add(W, T, alpha=S)

    composed = {"M and S, addcmul": products_and_sum, "T by leaky_relu_backward": one_displacement,
                "T by copysign": copysign}  # fmt: skip
    judge.check_close(*({"W_eff": f()} for f in (one_displacement, products_and_sum)), 1e-6)
    judge.check_close(*({"W_eff": f()} for f in (copysign, products_and_sum)), 1e-6)
    yield from compared(composed, "M and S, addcmul", seconds, taken=["T by leaky_relu_backward"])
    sign, displacement = torch.where(Q > 0, 1.0, -1.0), torch.where(Q > 0, M, -M)

    def threshold() -> tuple[Tensor, Tensor]:
        dP = torch.ops.aten.threshold_backward.grad_input(torch.mul(sign, G, out=T), M, 0, grad_input=T)
        return dP, torch.mul(M, G, out=other).clamp_(-CLIP, CLIP)

    def signs_of_T() -> tuple[Tensor, Tensor]:
        dP = torch.sign(displacement, out=T).mul_(G)
        return dP, torch.mul(displacement, dP, out=other).clamp_(-CLIP, CLIP)

    results = [dict(zip(("dP", "dQ"), (t.clone() for t in f()), strict=True)) for f in (signs_of_T, threshold)]
    judge.check_close(*results, 1e-6)
    masks = {"mask by threshold_backward": threshold, "mask by sign(T)": signs_of_T}
    yield from compared(masks, "mask by threshold_backward", seconds, taken=["mask by sign(T)"])
    yield from _reading(size, seconds)


def _reading(size: int, seconds: float) -> Iterator[Finding]:
    """All tiles of a bf16 weight, read in blocks of columns as backward reads them, into fp32."""
    weight = torch.randn(max(size, COLS), max(size, COLS)).bfloat16()
    tiles = [t for block in weight.split(COLS, 1) for t in block.split(ROWS) if t.shape == (ROWS, COLS)]
    wide, low = torch.empty(ROWS, COLS), torch.empty(ROWS, COLS, dtype=torch.bfloat16)

    def at_once() -> None:
        for tile in tiles:
            wide.copy_(tile)

    def copied_first() -> None:
        for tile in tiles:
            wide.copy_(low.copy_(tile))

    def summed_from_bf16() -> None:
        for tile in tiles:
            torch.add(tile, wide, alpha=0.0, out=wide)

    variants = {"a bf16 column block converted": at_once, "copied, then converted": copied_first,
                "added as bf16, converted inside": summed_from_bf16}  # fmt: skip
    yield from compared(variants, "a bf16 column block converted", seconds, taken=["copied, then converted"])
