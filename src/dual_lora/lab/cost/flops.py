"""Arithmetic of one operator call: torch's own formulas, and those that it lacks.

Dual LoRA's linear layer: 2·T·O·I + 2·O·I·(r1 + r2) forward, 4·T·O·I + 6·O·I·(r1 + r2) backward (P and Q again, four
small gradients); without dx or without gradients of the factors, less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating point operations of one call, 0 for what is not a product."""
    packet = func._overloadpacket
    own = _OURS.get(packet)
    if own is not None:
        return own(*args)
    formula: Any = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def linear(T: int, O: int, I: int, ranks: int) -> int:
    """Forward of Dual LoRA's layer. ranks: r1 + r2 of all its adapters."""
    return 2 * T * O * I + 2 * O * I * ranks


def linear_backward(T: int, O: int, I: int, ranks: int, need_x: bool = True, need_factors: bool = True) -> int:
    """Its backward: dx, the masked G, P and Q once more, the four small gradients."""
    products = need_x + need_factors
    return 2 * products * T * O * I + 2 * O * I * ranks + 4 * O * I * ranks * need_factors


def _linear(x: Any, weight: Any, bias: Any, factors: Any, *rest: Any) -> int:
    return linear(*_sizes(x, factors))


def _linear_backward(
    dy: Any, x: Any, weight: Any, factors: Any, scales: Any, forms: Any, loss_scale: Any, need_x: bool,
    need_weight: bool, need_factors: bool,
) -> int:  # fmt: skip
    T, O, I, ranks = _sizes(x, factors)
    return linear_backward(T, O, I, ranks, need_x, need_factors)


def _sizes(x: Any, factors: Any) -> tuple[int, int, int, int]:
    """T, O, I and the sum of all ranks (every other factor is A or C, [r, I])."""
    I = x.shape[-1]
    return x.numel() // I, factors[1].shape[0], I, sum(f.shape[0] for f in factors[::2])


def _attention(query: Any, key: Any, value: Any, *rest: Any) -> int:
    B, heads, T, width = query.shape
    return 2 * B * heads * T * key.shape[2] * (width + value.shape[-1])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any) -> int:
    """Scores again, and the gradients of scores, query, key and value."""
    B, heads, T, width = query.shape
    return 2 * B * heads * T * key.shape[2] * (3 * width + 2 * value.shape[-1])


_OURS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def register_own() -> None:
    """Count Dual LoRA's operators, once they are defined."""
    import dual_lora.core.op  # noqa: F401

    _OURS[torch.ops.dual_lora.linear] = _linear
    _OURS[torch.ops.dual_lora.linear_backward] = _linear_backward
