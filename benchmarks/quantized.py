"""A layer whose base is NF4 (bitsandbytes), against PEFT's LoRA on the same base."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import layers
from .linear import compare, floor
from .measure import Measured, Unavailable


def measure(O: int, I: int, T: int, threads: int, seconds: float) -> Measured:
    """Check ours, then time forward and backward with dx; x and the compute dtype are bf16."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(O, I, generator=g) / I**0.5
    x, dy = (torch.randn(T, n, generator=g).bfloat16() for n in (I, O))
    modules = {m: _adapted(m, W) for m in ("dual", "lora")}
    dual = modules["dual"]
    return compare(modules, x, _dequantised(dual), dy, _floor(dual, x, dy), threads, seconds)


def _floor(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """The floor of a layer of that shape, and dequantising once forward and once backward."""
    products = floor(x, _dequantised(layer), dy, layers.RANK // 2, layers.RANK // 2)

    def run() -> None:
        for _ in ("forward", "backward"):
            _dequantised(layer)
        products()

    return run


def _dequantised(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    base = layer.get_base_layer()
    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(torch.bfloat16)


def _adapted(method: str, W: torch.Tensor) -> Any:
    """An NF4 layer of that weight with an adapter."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise Unavailable(f"bitsandbytes is not installed ({error})") from error
    from peft import get_peft_model

    base: Any = bnb.nn.Linear4bit(W.shape[1], W.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.load_state_dict({"weight": W})
    if base.weight.quant_state is None:
        base.weight._quantize("cpu")
    holder = nn.ModuleDict({"linear": base})
    holder.is_loaded_in_4bit = True  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(holder, layers.config(method, ["linear"])).base_model.model["linear"].train()
    except ValueError as error:
        raise Unavailable(f"{method} does not take an NF4 base here: {error}") from error
