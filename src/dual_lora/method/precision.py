"""Factors stay fp32, whatever foreign code does to them.

Factors rounded to bf16 flip the sign of 0.07 % of the entries and change ΔW by 4.6 % (a plain B A product: 0.23 %). A
cast by `.to()` is undone by the layer with all bits kept. This file answers the casts that leave no such chance:
`param.data = param.data.to(bfloat16)` (TRL's QLoRA path), and FSDP2's mixed precision, which hands the forward pass
a rounded copy while it keeps the true values elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .._warning import warn
from ..core.reference import Factors

FACTOR_DTYPES = (torch.float32, torch.float64)


class Warned(set[str]):
    """What one model's layers have warned of, each of which would otherwise say it again. A copy has warned nothing."""

    def __reduce__(self) -> tuple[type[Warned], tuple[()]]:
        return Warned, ()

    def once(self, message: str) -> None:
        """Warn, unless that was said before."""
        if message not in self:
            self.add(message)
            warn(message, stacklevel=3)


def mark_as_stored(factors: Iterable[torch.Tensor]) -> None:
    """Remember that these parameters are the stored values themselves, not somebody's working copy."""
    for factor in factors:
        factor._dual_lora_stored = True  # type: ignore[attr-defined]


def in_fp32(factors: Factors, warned: Warned) -> Factors:
    """The factors in fp32 (or fp64), with one warning where that was not so."""
    low = [f for f in factors if f.is_floating_point() and f.dtype not in FACTOR_DTYPES]
    if not low:
        return factors
    if all(hasattr(f, "_dual_lora_stored") for f in low):
        if not factors.B.is_meta and factors.B.any():  # else it has not trained, and a rounded start is as good
            warned.once(
                f"Dual LoRA's factors were cast to {low[0].dtype} by foreign code and are fp32 again, without the bits "
                "that were lost: bf16 factors flip 0.07 % of the signs and change ΔW by 4.6 %. Leave the factors in "
                "fp32; the base may have any dtype."
            )
        for factor in low:
            factor.data = factor.data.float()
        mark_as_stored(low)
        return factors
    warned.once(
        f"Mixed precision of the sharded model rounds Dual LoRA's factors to {low[0].dtype} in every step, which flips "
        "signs and changes ΔW by some 4.6 %. Load the base model in bf16 and leave FSDP2's MixedPrecisionPolicy "
        "(accelerate: mixed_precision) off: the base then computes in bf16 and the factors stay fp32."
    )
    return Factors(*(f.float() if f.is_floating_point() and f.dtype not in FACTOR_DTYPES else f for f in factors))
