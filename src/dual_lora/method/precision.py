"""Keep factors in fp32 when foreign code casts them.

Factors rounded to bf16 flip the sign of 0.07 % of the entries and change ΔW by 4.6 % (a plain B A product: 0.23 %). A
cast by `.to()` is undone by the layer without loss. This file handles the casts that cannot be undone:
`param.data = param.data.to(bfloat16)` (TRL's QLoRA path), FSDP2's mixed precision, which gives the forward pass a
rounded copy, and saved files that somebody has made smaller.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..core.reference import Factors
from .shared import Shared

FACTOR_DTYPES = (torch.float32, torch.float64)


def mark_as_stored(factors: Iterable[torch.Tensor]) -> None:
    """Mark parameters as the stored values; a working copy (FSDP2's) has no mark."""
    for factor in factors:
        factor._dual_lora_stored = True  # type: ignore[attr-defined]


def in_fp32(factors: Factors, shared: Shared) -> Factors:
    """Return the factors in fp32 (or fp64), with one warning if they were cast."""
    low = [f for f in factors if f.is_floating_point() and f.dtype not in FACTOR_DTYPES]
    if not low:
        return factors
    if all(hasattr(f, "_dual_lora_stored") for f in low):
        if not factors.B.is_meta and factors.B.any():  # before training, rounding does no harm
            shared.warn_once(
                f"Dual LoRA's factors were cast to {low[0].dtype} by foreign code and are fp32 again, without the bits "
                "that were lost: bf16 factors flip 0.07 % of the signs and change ΔW by 4.6 %. Leave the factors in "
                "fp32; the base may have any dtype."
            )
        for factor in low:
            factor.data = factor.data.float()
        mark_as_stored(low)
        return factors
    shared.warn_once(
        f"Mixed precision of the sharded model rounds Dual LoRA's factors to {low[0].dtype} in every step, which flips "
        "signs and changes ΔW by some 4.6 %. Load the base model in bf16 and leave FSDP2's MixedPrecisionPolicy "
        "(accelerate: mixed_precision) off: the base then computes in bf16 and the factors stay fp32."
    )
    return Factors(*(f.float() if f.is_floating_point() and f.dtype not in FACTOR_DTYPES else f for f in factors))


def warn_of_rounded(factors: Iterable[torch.Tensor | None], shared: Shared) -> None:
    """Warn of an adapter's A, B, C and D that are to be loaded in another dtype than fp32; None is a missing one."""
    _, B, *directions = factors
    low = [f for f in directions if f is not None and f.is_floating_point() and f.dtype not in FACTOR_DTYPES]
    if low and not (B is not None and not B.is_meta and not B.any()):  # before training, rounding does no harm
        shared.warn_once(
            f"The factors that are loaded are in {low[0].dtype}, so somebody has cast what was saved. The model has "
            "them in fp32 again, without the bits that were lost: they decide signs, so that bf16 changes ΔW by 4.6 % "
            "and fp16 by 1.5 % (LoRA's by 0.2 % and 0.03 %). Keep the fp32 file."
        )
