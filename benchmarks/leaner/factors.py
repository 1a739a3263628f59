"""P and Q from operands of a lower precision: time of one product, flipped signs, and the change of ΔW.

Ten and seven bits of mantissa (TF32, bf16), sums of two or three such terms, and int8 with a scale a row and a column,
which changes no sign by itself. TF32 is emulated, so it has no time. The judge of the signs is fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dual_lora.core import product

from .finding import Finding, compared

RANK, SIGMA, TILE = 16, 0.02, 64


def findings(size: int, seconds: float) -> Iterator[Finding]:
    g = torch.Generator().manual_seed(0)
    A, C = (torch.randn(RANK, size, generator=g) * SIGMA for _ in range(2))
    B, D = (torch.randn(size, RANK, generator=g) * SIGMA for _ in range(2))
    P, Q = B.double() @ A.double(), D.double() @ C.double()
    delta = P.clamp(min=0) * torch.where(Q > 0, 1.0, -1.0)

    def effect(Q2: Tensor, P2: Tensor) -> str:
        flips = float(((Q2 > 0) != (Q > 0)).double().mean()) * 1e6
        other = P.clamp(min=0) * torch.where(Q2 > 0, 1.0, -1.0)
        both = P2.double().clamp(min=0) * torch.where(Q2 > 0, 1.0, -1.0)
        of_Q, of_both = (float((d - delta).norm() / delta.norm()) for d in (other, both))
        return f"{flips:.1f} signs in a million; ΔW moves by {of_Q:.2%} (Q), {of_both:.2%} (P and Q)"

    out, low = torch.empty(TILE, size), torch.empty(TILE, size, dtype=torch.bfloat16)
    variants: dict[str, Callable[[], object]] = {"fp32": lambda: product.mm(D[:TILE], C, out)}
    beside = {"fp32": effect(product.mm(D, C), product.mm(B, A))}
    for terms in (1, 3, 4, 6):
        name = f"bf16, {terms} term{'s' * (terms > 1)}"
        left, right = _terms(D, C, terms, torch.Tensor.bfloat16)
        variants[name] = lambda left=left, right=right: torch.mm(left[:TILE], right, out=low)
        other = _terms(B, A, terms, torch.Tensor.bfloat16)
        beside[name] = effect(left @ right, other[0] @ other[1])
    d, c = _int8(D, 1), _int8(C, 0)
    variants["int8"] = lambda: torch._int_mm(d[:TILE], c)
    beside["int8"] = effect(torch._int_mm(d, c), _scaled_int8(B, A))
    inexact = [name for name in variants if not beside[name].startswith("0.0 ")]
    yield Finding("fp32 itself", "fp64", None, beside["fp32"])
    yield from compared(variants, "fp32", seconds, beside, inexact)
    for terms in (1, 3):
        (left, right), (b, a) = (_terms(x, y, terms, _tf32) for x, y in ((D, C), (B, A)))
        name = f"TF32, {terms} term{'s' * (terms > 1)} (emulated)"
        text = effect(left @ right, b @ a)
        yield Finding(name, "fp32", None, text, text.startswith("0.0 "))


def _terms(left: Tensor, right: Tensor, terms: int, lower: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Operands of one longer product that sums the `terms` largest partial products of split operands."""
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)][:terms]
    parts = []
    for whole in (left, right):
        split, rest = [], whole
        for _ in range(3):
            split.append(lower(rest))
            rest = rest - split[-1].float()
        parts.append(split)
    return torch.cat([parts[0][i] for i, _ in pairs], 1), torch.cat([parts[1][j] for _, j in pairs], 0)


def _tf32(x: Tensor) -> Tensor:
    """Rounded to nearest (ties to even) at ten bits of mantissa."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).view(torch.float32)


def _int8(x: Tensor, dim: int) -> Tensor:
    """Scaled to ±127 along `dim`; the scale is positive and drops out of the sign."""
    return (x / x.abs().amax(dim, keepdim=True) * 127).round().to(torch.int8)


def _scaled_int8(left: Tensor, right: Tensor) -> Tensor:
    scales = left.abs().amax(1, keepdim=True) * right.abs().amax(0, keepdim=True) / 127**2
    return torch._int_mm(_int8(left, 1), _int8(right, 0)) * scales
