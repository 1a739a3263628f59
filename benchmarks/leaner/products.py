"""fp32 products by oneDNN in the place of MKL: y, dx, G, P and a small gradient, at the shapes the blocks give them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dual_lora.core import product

from .. import judge
from .finding import Finding, compared

T, RANK, TILE = 512, 16, (256, 1024)


def findings(size: int, seconds: float) -> Iterator[Finding]:
    x, dy, W = torch.randn(T, size), torch.randn(T, size), torch.randn(size, size)
    B, A, dP = torch.randn(TILE[0], RANK), torch.randn(RANK, TILE[1]), torch.randn(TILE)
    works = {"y": (x, W.t()), "dx": (dy, W), "G": (product.left(dy.t()), x), "P, one tile": (B, A), "dA": (B.t(), dP)}
    for name, (a, b) in works.items():
        out = torch.empty(a.shape[0], b.shape[1])
        judge.check_close({name: product.onednn_mm(a, b)}, {name: a @ b}, 1e-5)
        variants = {
            "MKL": lambda a=a, b=b, out=out: torch.mm(a, b, out=out),
            f"{name} by oneDNN": lambda a=a, b=b: product.onednn_mm(a, b),
        }
        taken = [f"{name} by oneDNN"] if product.fp32_library() == "oneDNN" else []
        yield from compared(variants, "MKL", seconds, taken=taken)
