"""Dual LoRA on a weight that is one tile: `blocked` without its blocks, for the layers that are small.

There the cost of a call is that of its Python; each function here is one straight line.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tile
from .blocked import Gradients, Needs
from .product import mm
from .reference import Adapter, Factors


def forward(x: Tensor, weight: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype; without a weight, x (ΣΔW)ᵀ."""
    W = compose(weight, adapters, x.dtype)
    return mm(x, W.t())


def compose(
    weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """W + ΣΔW, [O, I], the rounding to `dtype` of the fp32 sum (fp64's, for that). `out` may be the weight itself."""
    W = _sum(weight, _products(adapters, weight), dtype)
    return W if out is None else out.copy_(W)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
    of_G: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradients of `forward` for dy [T, O] and x [T, I]; those of the factors in fp32.

    of_G: other rows of dy and x, whose product is G.
    """
    dx = grads = None
    G: Any = None
    made = _products(adapters, weight)
    if needs.x:
        dx = mm(dy, _sum(weight, made, x.dtype, spare=not needs.factors))
    if needs.weight or needs.factors:
        dyG, xG = of_G or (dy, x)
        G = mm(dyG.t(), xG)
    if needs.factors:
        grads = _factor_gradients(G, made, loss_scale)
    return Gradients(dx, G if needs.weight else None, grads)


def factor_gradients(G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None) -> list[Factors]:
    """The factors' share of `backward`, fp32, from a G = ∂L/∂W [O, I], which stays as it is."""
    return _factor_gradients(G, _products(adapters, None), loss_scale)


def _products(adapters: Sequence[Adapter], weight: Tensor | None) -> list[tuple[Adapter, Tensor, Tensor]]:
    """The adapters in working precision with their P and Q."""
    return [(a, *tile.products(a, weight=weight)) for a in map(Adapter.working, adapters)]


def _sum(
    weight: Tensor | None, made: list[tuple[Adapter, Tensor, Tensor]], dtype: torch.dtype, spare: bool = True
) -> Tensor:
    """W + ΣΔW; `spare`: P may be overwritten."""
    W: Any = weight
    if W is not None and (dtype == torch.float64 or W.dtype.itemsize == 1):
        W = W.to(dtype)
    for (_, scale, form, _), P, Q in made:
        T = tile.update(P, Q, form, P if spare else torch.empty_like(P))
        W = T.mul_(scale) if W is None else tile.add_update(W, T, scale)
    return W if W.dtype == dtype else W.to(dtype)


def _factor_gradients(
    G: Tensor, made: list[tuple[Adapter, Tensor, Tensor]], loss_scale: Tensor | None
) -> list[Factors]:
    grads = []
    for adapter, P, Q in made:
        (A, B, C, D), scale, *_ = adapter = adapter.whole()
        rule = tile.estimator(adapter, loss_scale, carries=True)
        dP, dQ = rule.product_gradients(torch.mul(G, scale, out=torch.empty_like(P)), P, Q)
        direction = map(torch.zeros_like, (C, D)) if dQ is None else (D.t().mm(dQ), dQ.mm(C.t()))
        grads.append(Factors(B.t().mm(dP), dP.mm(A.t()), *direction))
    return grads
