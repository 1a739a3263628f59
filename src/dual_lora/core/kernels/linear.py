"""Forward and backward of the operators by the Triton kernels, with the same signatures as `blocked`.

Forward composes W + ΣΔW of one layer in x's dtype and leaves the product to the library; the composed weight is gone
when the call returns. In backward it is composed again for dx, and the factors' gradients come from one kernel that
keeps G = dyᵀx in registers. A quantised weight is dequantised into a temporary first.

`check` tries each kind of launch on the card before anything is computed with it.
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
    """Compose W + ΣΔW, [O, I] or [E, O, I]: the fp32 sum, rounded to `dtype`; of experts the routed ones, in `out`."""
    if not (weight is None or isinstance(weight, Tensor)):
        weight = weight.rows(0, weight.shape[0])
    return triton_compose.compose(weight, [a.in_working_dtype() for a in adapters], dtype, out, routed)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
    G_rows: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Compute the gradients of `forward` for dy [T, O] and x [T, I]; those of the factors are fp32.

    G_rows: the rows of dy and x whose product is G, where these are not all rows.
    """
    dx = dy @ compose(weight, adapters, x.dtype) if needs.x else None
    dy, x = G_rows or (dy, x)
    dW = dy.t() @ x if needs.weight else None
    grads = None
    if needs.factors:
        working, base = [a.in_working_dtype() for a in adapters], None
        if triton_launch.multiplies_weight(working):
            base = weight if weight is None or isinstance(weight, Tensor) else weight.rows(0, weight.shape[0])
        grads = triton_gradient.factor_gradients(dy, x, working, loss_scale, weight=base)
    return Gradients(dx, dW, grads)


def factor_gradients(
    G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None, routed: Tensor | None = None
) -> list[Factors]:
    """Compute the factors' gradients, fp32, from a given G = ∂L/∂W, [O, I] or [E, O, I]."""
    working = [a.in_working_dtype() for a in adapters]
    return triton_gradient.factor_gradients(None, G, working, loss_scale, routed=routed)


def are_correct(
    dtype: torch.dtype,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    gradient_of: tuple[Tensor | None, Tensor, Tensor | None] | None,
) -> bool:
    """Whether the kernels compute correctly on this card with the launches of this call."""
    if not triton_check.is_correct(triton_check.compose_launch(weight, adapters, dtype)):
        return False
    if gradient_of is None:
        return True
    dy, x, loss_scale = gradient_of
    return triton_check.is_correct(triton_check.gradient_launch(dy, x, adapters, loss_scale is not None, weight))
