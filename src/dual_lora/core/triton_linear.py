"""Forward and backward of the operators by the Triton kernels, with the same signatures as `blocked`.

Forward composes W + ΣΔW of one layer in x's dtype and leaves the product to the library; the composed weight is gone
when the call returns. In backward it is composed again for dx, and the factors' gradients come from one kernel that
keeps G = dyᵀx in registers. A quantised weight is dequantised into a temporary first.

The kernels were judged in Triton's interpreter and compiled ahead for several cards. A card that is met for the first
time has to show that they agree with `blocked` there, before anything is computed with them.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import blocked, triton_compose, triton_gradient
from .blocked import Adapter, Gradients, Needs, RowSource
from .reference import Factors, Form


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
) -> Gradients:
    """Gradients of `forward` for dy [T, O] and x [T, I]; those of the factors in fp32."""
    dx = dy @ compose(weight, adapters, x.dtype) if needs.x else None
    dW = dy.t() @ x if needs.weight else None
    grads = None
    if needs.factors:
        grads = triton_gradient.factor_gradients(dy, x, [a.working() for a in adapters], loss_scale)
    return Gradients(dx, dW, grads)


def factor_gradients(
    G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None, routed: Tensor | None = None
) -> list[Factors]:
    """The factors' share of `backward`, fp32, from a G = ∂L/∂W [O, I] or [E, O, I] that is already there."""
    working = [a.working() for a in adapters]
    return triton_gradient.factor_gradients(None, G, working, loss_scale, routed=routed)


@functools.cache
def agrees_with_blocked(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether value and all gradients of a small case agree on this device; warns, and stays with `blocked`, if not."""
    try:
        worst = disagreement(device, dtype)
    except Exception as error:  # whatever a compiler or driver may say: training goes on without the kernels
        worst, reason = float("inf"), f"{type(error).__name__}: {error}"
    else:
        reason = f"they differ from PyTorch's result by {worst:.2g} of its largest entry"
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    if worst <= tolerance:
        return True
    warnings.warn(
        f"Dual LoRA's Triton kernels are not used on {torch.cuda.get_device_name(device)} in {dtype}: {reason}. The "
        "plain path computes the same, slower. Please report this card.",
        UserWarning,
        stacklevel=2,
    )
    return False


def disagreement(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference from `blocked` in y, dx and the factors' gradients, relative to each one's largest entry.

    P and Q are integers here, so that no sign hangs on a rounding.
    """
    T, O, I, r = 48, 100, 72, 8
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).float().to(device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    factors = Factors(integers(r, I), integers(O, r), integers(r, I), integers(O, r))
    adapters = [Adapter(factors, torch.tensor(0.01, device=device), Form())]
    x, dy, weight = normal(T, I), normal(T, O), normal(O, I)
    needs = Needs(True, False, True)
    got, judge = backward(dy, x, weight, adapters, None, needs), blocked.backward(dy, x, weight, adapters, None, needs)
    ours, theirs = ([grads.x, *grads.factors[0]] for grads in (got, judge))  # type: ignore[index]
    pairs = [
        (forward(x, weight, adapters), blocked.forward(x, weight, adapters)),
        *zip(ours, theirs, strict=True),
    ]
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)  # type: ignore[union-attr]
