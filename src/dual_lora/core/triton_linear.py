"""Forward and backward of the operator by the Triton kernels, with the same signatures as `blocked`.

Forward composes W + ΣΔW of one layer in x's dtype and leaves the product to the library; the composed weight is gone
when the call returns. In backward it is composed again for dx, and the factors' gradients come from one kernel that
keeps G = dyᵀx in registers.

The kernels were judged in Triton's interpreter and compiled ahead for several cards. A card that is met for the first
time has to show that they agree with `blocked` there, before anything is computed with them.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import blocked, triton_compose, triton_gradient, triton_group
from .blocked import Adapter, Gradients, Needs
from .composing import Job
from .reference import Factors, Form

SWITCH = "DUAL_LORA_KERNELS"  # "plain" keeps to PyTorch's own operations
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_RANK = 256


def takes(x: Tensor, weight: Tensor | None, adapters: Sequence[Adapter]) -> bool:
    """Whether the kernels compute this call: a GPU on which they proved right, dtypes and ranks that they know."""
    return knows(x.device, x.dtype, weight, adapters)


def knows(device: torch.device, dtype: torch.dtype, weight: Tensor | None, adapters: Sequence[Adapter]) -> bool:
    """The same for x, or a composed weight, of that dtype."""
    return (
        device.type == "cuda"
        and dtype in DTYPES
        and (weight is None or weight.dtype in DTYPES)
        and all(a.factors.A.dtype != torch.float64 for a in adapters)
        and all(max(a.factors.A.shape[0], a.factors.C.shape[0]) <= LARGEST_RANK for a in adapters)
        and os.environ.get(SWITCH) != "plain"
        and agrees_with_blocked(device, dtype)
    )


def forward(x: Tensor, weight: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype."""
    return x @ triton_compose.compose(weight, [a.working() for a in adapters], out_dtype=x.dtype).t()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients of `forward` for dy [T, O] and x [T, I]; those of the factors in fp32."""
    working = [a.working() for a in adapters]
    dx = dy @ triton_compose.compose(weight, working, out_dtype=x.dtype) if needs.x else None
    dW = dy.t() @ x if needs.weight else None
    grads = triton_gradient.factor_gradients(dy, x, working, loss_scale) if needs.factors else None
    return Gradients(dx, dW, grads)


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
    """The largest difference from `blocked` in y, dx, the factors' gradients and the composed weight of a group,
    relative to each one's largest entry.

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
        (triton_group.compose_group([Job(weight, adapters, dtype)])[0], blocked.compose(weight, adapters, dtype)),
        *zip(ours, theirs, strict=True),
    ]
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)  # type: ignore[union-attr]
