"""Forward and backward of the operators by the Triton kernels, with the same signatures as `blocked`.

Forward composes W + ΣΔW of one layer in x's dtype and leaves the product to the library; the composed weight is gone
when the call returns. In backward it is composed again for dx, and the factors' gradients come from one kernel that
keeps G = dyᵀx in registers. A quantised weight is dequantised into a temporary first.

`triton_check` tries each way of launching the kernels on the card before anything is computed with it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocked import Gradients, Needs, RowSource
from ..reference import Adapter, Factors
from . import check as triton_check
from . import compose as triton_compose
from . import gradient as triton_gradient
from . import launch as triton_launch


def forward(x: Tensor, weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype."""
    return x @ compose(weight, adapters, x.dtype).t()


def compose(
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    out: Tensor | None = None,
    routed: Tensor | None = None,
) -> Tensor:
    """W + ΣΔW, [O, I] or [E, O, I], the rounding to `dtype` of the fp32 sum; of experts the routed ones, into `out`."""
    if not (weight is None or isinstance(weight, Tensor)):
        weight = weight.rows(0, weight.shape[0])
    return triton_compose.compose(weight, [a.working() for a in adapters], dtype, out, routed)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
    of_G: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Gradients of `forward` for dy [T, O] and x [T, I]; those of the factors in fp32.

    of_G: other rows of dy and x, whose product is G.
    """
    dx = dy @ compose(weight, adapters, x.dtype) if needs.x else None
    dy, x = of_G or (dy, x)
    dW = dy.t() @ x if needs.weight else None
    grads = None
    if needs.factors:
        working, base = [a.working() for a in adapters], None
        if triton_launch.multiplies_weight(working):
            base = weight if weight is None or isinstance(weight, Tensor) else weight.rows(0, weight.shape[0])
        grads = triton_gradient.factor_gradients(dy, x, working, loss_scale, weight=base)
    return Gradients(dx, dW, grads)


def factor_gradients(
    G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None, routed: Tensor | None = None
) -> list[Factors]:
    """The factors' share of `backward`, fp32, from a G = ∂L/∂W [O, I] or [E, O, I] that is already there."""
    working = [a.working() for a in adapters]
    return triton_gradient.factor_gradients(None, G, working, loss_scale, routed=routed)


def are_right(
    dtype: torch.dtype,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    gradient_of: tuple[Tensor | None, Tensor, Tensor | None] | None,
) -> bool:
    """Whether the kernels compute right on this card, launched as this call would launch them."""
    if not triton_check.is_right(triton_check.composing(weight, adapters, dtype)):
        return False
    if gradient_of is None:
        return True
    dy, x, loss_scale = gradient_of
    return triton_check.is_right(triton_check.differentiating(dy, x, adapters, loss_scale is not None, weight))
