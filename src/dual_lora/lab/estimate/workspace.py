"""What an operator uses inside itself while it runs, invisible to a dispatch mode.

Dual LoRA's operator on a CPU works in panels and tiles of the weight (`core/blocked.py`), on a GPU it composes one
whole weight at a time (`core/triton_linear.py`).
"""

from __future__ import annotations

from typing import Any


def inner_bytes(func: Any, args: Any, out: Any, on: str) -> int:
    """Bytes that one call has had beyond its inputs and outputs."""
    if func.namespace != "dual_lora":
        return 0
    name = func._schema.name
    if name == "dual_lora::linear":
        x, factors = args[0], args[3]
        return linear_bytes(factors[1].shape[0], x.shape[-1], x.dtype.itemsize, on)
    if name == "dual_lora::linear_backward":
        x, factors, need_x, need_factors = args[1], args[3], args[7], args[9]
        O, I = factors[1].shape[0], x.shape[-1]
        scaled = sum(f.numel() for f in factors) * 4
        if on == "gpu":
            return O * I * x.dtype.itemsize * need_x
        return (
            _tiles(O, I, x.dtype.itemsize)
            + _panel(O, I, x.dtype.itemsize) * (need_x + need_factors)
            + scaled * need_factors
        )
    return 0


def linear_bytes(O: int, I: int, itemsize: int, on: str) -> int:
    """The composed panel and the tiles of a forward call."""
    if on == "gpu":
        return O * I * itemsize
    return _panel(O, I, itemsize) + _tiles(O, I, itemsize)


def _panel(O: int, I: int, itemsize: int) -> int:
    from dual_lora.core.blocked import CPU

    return min(CPU.panel, O * I * itemsize)


def _tiles(O: int, I: int, itemsize: int) -> int:
    """P and Q of one tile, and where the panel is not fp32 itself its sum; all fp32."""
    from dual_lora.core.blocked import CPU

    return (2 if itemsize == 4 else 3) * 4 * min(CPU.tile, O * I)
