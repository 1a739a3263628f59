"""The adapter with a fault, computed with the loaded model: a forward pass each, made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify.diagnose import Known, projection, rms
from dual_lora.lab.verify.logprobs import Probe, as_bf16, as_int4, base_parameters, rows_of, score
from dual_lora.lab.verify.strength import adapted_layers, parts, strengths

LARGEST_COPIED = 4 << 30  # bytes of base weights of which a rounded copy is made


class ModelGuesses:
    """Forward passes of a loaded model, over the probes that the candidate was asked."""

    def __init__(self, model: Any, probes: list[Probe]):
        self.model, self.probes = model, probes

    def scaled(self, strength: float) -> Tensor | None:
        if not adapted_layers(self.model):
            return None
        with strengths(self.model, lambda _: strength):
            return score(self.model, self.probes)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for what, missing in parts(self.model).items():
            with strengths(self.model, lambda name, missing=missing: 0.0 if name in missing else 1.0):  # type: ignore[misc]
                yield what, score(self.model, self.probes)

    def coarse(self) -> Tensor | None:
        if not _may_be_copied(self.model):
            return None
        with as_int4(self.model):
            return score(self.model, self.probes)


def known_of(tuned: Any, probes: list[Probe], before: tuple[Tensor, Tensor] | None = None) -> Known:
    """What base and adapter give, and what rounding does to it; before: the two, where they were computed already.

    A base too large to be copied, or in four bits, is taken to round as much as its adapter's outputs in bf16 do.
    """
    with tuned.as_variant("base") as model:
        base = before[0] if before else score(model, probes)
    with tuned.as_variant("tuned") as model:
        own = before[1] if before else score(model, probes)
        with as_bf16(model):
            rounded = score(model, probes)
    with tuned.as_variant("base") as model, as_bf16(model):
        base_rounded = score(model, probes)
    if not bool(torch.isfinite(base).all() and torch.isfinite(own).all()):
        raise UserError(f"{tuned.source} gives log-probabilities that are no numbers: its weights are damaged.")
    rows = rows_of(probes)
    strength, _ = projection(rounded - base, own - base, rows)
    return Known(
        base=base,
        tuned=own,
        rows=rows,
        rounding=max(rms(rounded - own), rms(base_rounded - base), 1e-6),
        rounded_strength=strength if rms(own - base) > 0 else 1.0,
        warms_up=any(hasattr(layer, "warmup_factor") for layer in adapted_layers(tuned.model).values()),
    )


def _may_be_copied(model: Any) -> bool:
    """Not for a base that is packed in few bits already, nor for one too large."""
    held = list(base_parameters(model).values())
    size = sum(p.numel() * p.element_size() for p in held)
    return size <= LARGEST_COPIED and all(p.is_floating_point() for p in held)
