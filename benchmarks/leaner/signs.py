"""Signs kept from forward to backward, as bits or bytes, in the place of computing Q again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dual_lora.core import product

from .. import judge
from .finding import Finding, compared

ROWS, RANK = 64, 16


def findings(size: int, seconds: float) -> Iterator[Finding]:
    D, C = torch.randn(ROWS, RANK), torch.randn(RANK, size)
    Q, M = product.mm(D, C).clone(), torch.rand(ROWS, size)
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    out, T = torch.empty_like(Q), torch.empty_like(Q)

    def signed(Q: Tensor) -> Tensor:
        return torch.ops.aten.leaky_relu_backward.grad_input(M, Q, -1.0, False, grad_input=T)

    def again() -> Tensor:
        return signed(product.mm(D, C, out))

    def bits() -> Tensor:
        packed = ((Q > 0).view(ROWS, -1, 8) * weights).sum(-1, dtype=torch.uint8)
        return signed((packed.unsqueeze(-1) & weights).view(ROWS, size).float())

    def bytes_() -> Tensor:
        kept = Q.gt(0)
        return signed(out.copy_(kept))

    for idea in (bits, bytes_):
        judge.check_close({"T": idea().clone()}, {"T": again().clone()}, 0.0)
    variants = {"Q again": again, "signs packed to bits": bits, "signs as bytes": bytes_}
    beside = {"signs packed to bits": "keeps O·I/8 bytes a layer", "signs as bytes": "keeps O·I bytes a layer"}
    yield from compared(variants, "Q again", seconds, beside)
