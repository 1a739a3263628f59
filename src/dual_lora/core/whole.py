"""Dual LoRA on a weight that is one tile: `blocked` without its blocks, for the layers that are small.

There the cost of a call is that of its Python; each function here is one straight line.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import scratch, tile
from .blocked import Gradients, Needs
from .product import mm
from .reference import Adapter, Factors

Made = tuple[Adapter, Tensor, Tensor]  # with P and Q


def forward(x: Tensor, weight: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype; without a weight, x (ΣΔW)ᵀ."""
    made, space = _products(adapters)
    return mm(x, _sum(weight, made, space, x.dtype).t())


def compose(
    weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """W + ΣΔW, [O, I], the rounding to `dtype` of the fp32 sum (fp64's, for that). `out` may be the weight itself."""
    made, space = _products(adapters)
    W = _sum(weight, made, space, dtype)
    return W.clone() if out is None else out.copy_(W)


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
    made, space = _products(adapters)
    if needs.x:
        dx = mm(dy, _sum(weight, made, space, x.dtype))
    if needs.weight or needs.factors:
        dyG, xG = of_G or (dy, x)
        G = mm(dyG.t(), xG, None if needs.weight or x.dtype != space.G.dtype else space.G)
    if needs.factors:
        grads = _factor_gradients(G, made, space, loss_scale)
    return Gradients(dx, G if needs.weight else None, grads)


def factor_gradients(G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None) -> list[Factors]:
    """The factors' share of `backward`, fp32, from a G = ∂L/∂W [O, I], which stays as it is."""
    return _factor_gradients(G, *_products(adapters), loss_scale)


class _Space(NamedTuple):
    """Matrices of scratch memory, in working precision."""

    T: Tensor
    composed: Tensor
    G: Tensor


def _products(adapters: Sequence[Adapter]) -> tuple[list[Made], _Space]:
    """The adapters in working precision with their P and Q, and room for what is made of them."""
    first = adapters[0].working()
    A, B, *_ = first.factors
    names = ("P", "Q") if len(adapters) == 1 else [f"{letter}{k}" for k in range(len(adapters)) for letter in "PQ"]
    *products, T, composed, G = scratch.matrices(
        B.shape[0], A.shape[1], A.dtype, A.device, *names, "T", "composed", "gradient"
    )
    made = [
        (adapter, *tile.products(adapter, P=P, Q=Q))
        for adapter, P, Q in zip(
            (first, *map(Adapter.working, adapters[1:])), products[::2], products[1::2], strict=True
        )
    ]
    return made, _Space(T, composed, G)


def _sum(weight: Tensor | None, made: list[Made], space: _Space, dtype: torch.dtype) -> Tensor:
    """W + ΣΔW; may lie in scratch memory."""
    W: Any = weight
    if W is not None and (dtype == torch.float64 or W.dtype.itemsize == 1):
        W = W.to(dtype)
    out = space.composed if dtype != torch.float64 else None
    for (_, scale, form, _), P, Q in made:
        T = tile.update(P, Q, form, space.T)
        W = torch.mul(T, scale, out=out) if W is None else tile.add_update(W, T, scale, out)
    return W if W.dtype == dtype else W.to(dtype)


def _factor_gradients(G: Tensor, made: list[Made], space: _Space, loss_scale: Tensor | None) -> list[Factors]:
    grads = []
    for adapter, P, Q in made:
        (A, B, C, D), scale, *_ = adapter = adapter.whole()
        rule = tile.estimator(adapter, loss_scale, carries=True)
        dP, dQ = rule.product_gradients(torch.mul(G, scale, out=space.T), P, Q)
        grads.append(Factors(B.t().mm(dP), dP.mm(A.t()), D.t().mm(dQ), dQ.mm(C.t())))
    return grads
