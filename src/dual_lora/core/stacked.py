"""Dual LoRA on the weights of experts, [E, O, I], one expert after the other: `blocked` and `whole` for stacks.

Only the routed experts are composed, and only they get a gradient.
"""

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import blocked, whole
from .reference import Adapter, Factors


def adapters_of_expert(adapters: Sequence[Adapter], e: int) -> list[Adapter]:
    """Select the factors of expert `e` from stacked adapters."""
    return [a._replace(factors=Factors(*(f[e] for f in a.factors))) for a in adapters]


def compose(
    weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype, out: Tensor, routed: Tensor | None = None
) -> Tensor:
    """Compose W + ΣΔW of the routed experts (default: all) in `out`, [E, O, I]."""
    for e in _experts(len(out), routed):
        W, own = None if weight is None else weight[e], adapters_of_expert(adapters, e)
        _implementation(W, own).compose(W, own, dtype, out[e])
    return out


def factor_gradients(
    G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None, routed: Tensor | None = None
) -> list[Factors]:
    """Compute the factors' gradients, fp32, from G = ∂L/∂W [E, O, I]; zero for experts that are not routed."""
    grads = [Factors(*map(torch.zeros_like, a.factors)) for a in adapters]
    for e in _experts(len(G), routed):
        own = adapters_of_expert(adapters, e)
        found = _implementation(None, own).factor_gradients(G[e], own, loss_scale)
        for whole_stack, four in zip(grads, found, strict=True):
            for grad, g in zip(whole_stack, four, strict=True):
                grad[e] = g
    return grads


def _experts(count: int, routed: Tensor | None) -> Iterable[int]:
    return range(count) if routed is None else routed.tolist()


def _implementation(weight: Tensor | None, adapters: Sequence[Adapter]) -> ModuleType:
    return whole if whole.fits(weight, adapters) else blocked
