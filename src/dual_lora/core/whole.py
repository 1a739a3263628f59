"""Dual LoRA on a weight that is one tile: `blocked` without its blocks, for small layers.

Such a layer's time is that of the Python calls, so each function here is straight-line code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import scratch, tile
from .blocked import CPU, CUDA, Gradients, Needs, RowSource
from .product import mm
from .reference import Adapter, Factors
from .tile import ALL

Products = tuple[Adapter, Tensor, Tensor]  # with P and Q
Space = tuple[Any, Any, Any]  # scratch matrices in working precision: for T, for a composed weight, for G
NAMES = "P0", "Q0", "T", "composed", "gradient"  # the first adapter's products, and the three


def fits(weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> bool:
    """Whether the weight [O, I] is in memory and no larger than one tile."""
    A, B, *_ = adapters[0].factors
    largest = (CPU if A.device.type == "cpu" else CUDA).tile
    return A.shape[-1] * B.shape[-2] <= largest and (weight is None or isinstance(weight, Tensor))


def forward(x: Tensor, weight: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype; without a weight, x (ΣΔW)ᵀ."""
    made, space = _products(adapters, weight)
    return mm(x, _composed(weight, made, space, x.dtype).to(x.dtype).t())


def compose(
    weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Compose W + ΣΔW, [O, I]: the fp32 sum (for fp64, an fp64 sum), rounded to `dtype`. `out` may be the weight."""
    made, space = _products(adapters, weight)
    W = _composed(weight, made, space, dtype)
    return W.to(dtype, copy=True) if out is None else out.copy_(W)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
    G_rows: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Compute the gradients of `forward` for dy [T, O] and x [T, I]; those of the factors are fp32.

    G_rows: the rows of dy and x whose product is G, where these are not all rows.
    """
    dx = grads = None
    G: Any = None
    made, space = _products(adapters, weight)
    if needs.x:
        dx = mm(dy, _composed(weight, made, space, x.dtype, spare=not needs.factors).to(x.dtype))
    if needs.weight or needs.factors:
        dyG, xG = G_rows or (dy, x)
        *_, room = space
        G = mm(dyG.t(), xG, None if needs.weight or x.dtype != room.dtype else room)
    if needs.factors:
        grads = _factor_gradients(G, made, space, loss_scale)
    return Gradients(dx, G if needs.weight else None, grads)


def factor_gradients(G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None) -> list[Factors]:
    """Compute the factors' gradients, fp32, from a given G = ∂L/∂W [O, I], which is not overwritten."""
    return _factor_gradients(G, *_products(adapters, None), loss_scale)


def _products(adapters: Sequence[Adapter], weight: Tensor | None) -> tuple[list[Products], Space]:
    """Return the adapters in working precision with their P and Q, and scratch matrices for T, W + ΣΔW and G."""
    made = []
    T = composed = G = None
    for k, adapter in enumerate(adapters):
        adapter = adapter.in_working_dtype()
        A, B, *_ = adapter.factors
        names = NAMES if k == 0 else (f"P{k}", f"Q{k}")
        P, Q, *more = scratch.matrices(B.shape[0], A.shape[1], A.dtype, A.device, names)
        if more:
            T, composed, G = more
        made.append((adapter, *tile.products(adapter, ALL, ALL, P, Q, weight)))
    return made, (T, composed, G)


def _composed(
    weight: Tensor | None, made: list[Products], space: Space, dtype: torch.dtype, spare: bool = True
) -> Tensor:
    """Return W + ΣΔW before its rounding to `dtype`, in scratch memory (fp64: in memory of its own).

    spare: whether P may be overwritten, which saves cache.
    """
    own, composed, _ = space
    W: Any = weight
    if W is not None and (dtype == torch.float64 or W.dtype.itemsize == 1):
        W = W.to(dtype)
    for (_, scale, form, _), P, Q in made:
        room = P if spare else own
        T = tile.update(P, Q, form, room)
        out = None if dtype == torch.float64 else room if len(made) == 1 else composed
        W = torch.mul(T, scale, out=out) if W is None else tile.add_update(W, T, scale, out)
    return W


def _factor_gradients(G: Tensor, made: list[Products], space: Space, loss_scale: Tensor | None) -> list[Factors]:
    grads, scaled = [], space[0]
    for adapter, P, Q in made:
        adapter = adapter.with_mean_square()
        (A, B, C, D), scale, *_ = adapter
        rule = tile.estimator(adapter, loss_scale, G_is_scaled=True)
        dP, dQ = rule.product_gradients(torch.mul(G, scale, out=scaled), P, Q)
        direction = map(torch.zeros_like, (C, D)) if dQ is None else (D.t().mm(dQ), dQ.mm(C.t()))
        grads.append(Factors(B.t().mm(dP), dP.mm(A.t()), *direction))
    return grads
