"""The adapter with a fault, computed with the loaded model: a forward pass each, made when it is asked for.

At another strength, for any method of PEFT that changes layers: y = y_base + s (y_adapter − y_base). For a linear layer
that is the update ΔW times s, exactly.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify.diagnose import Known, projection, rms
from dual_lora.lab.verify.logprobs import (
    Probe,
    as_bf16,
    as_int4,
    asks_classes,
    base_parameters,
    merged,
    rows_of,
    score,
)
from dual_lora.method.layer import DualLoraLayer

# The base rounded, with the adapter next to it, as a server has it that loads both.
FOUR_BITS = "four bits"
# What a merged file holds, and whether its blocks have a least value.
FOUR_BITS_MERGED = {"four bits, merged": False, "four bits with a least value, merged": True}
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
            yield what, self.without(missing)

    def without(self, missing: set[str]) -> Tensor:
        """Score the model with the layers of these names without their adapter."""
        with strengths(self.model, lambda name: 0.0 if name in missing else 1.0):
            return score(self.model, self.probes)

    def coarse(self) -> dict[str, Tensor]:
        if not _fits_a_copy(self.model):
            return {}
        with as_int4(self.model):
            found = {FOUR_BITS: score(self.model, self.probes)}
        if _fits_a_copy(self.model, LARGEST_COPIED // 3):  # what a method keeps for its unmerging is a copy, too
            with contextlib.suppress(Exception), merged(self.model):  # whatever it has against a merge
                for name, least in FOUR_BITS_MERGED.items():
                    with as_int4(self.model, least):
                        found[name] = score(self.model, self.probes)
        return found


def known_of(tuned: Any, probes: list[Probe], before: tuple[Tensor, Tensor] | None = None) -> Known:
    """Compute what base and adapter give, and what rounding does to it; before: the two, where they were computed
    already.

    A base too large to be copied, or in four bits, is taken to round as much as its adapter's outputs in bf16 do.
    """
    with without_adapter(tuned, probes) as model:
        base = before[0] if before else score(model, probes)
        with as_bf16(model):
            base_rounded = score(model, probes)
    with tuned.as_variant("tuned") as model:
        own = before[1] if before else score(model, probes)
        with as_bf16(model):
            rounded = score(model, probes)
    if not bool(torch.isfinite(base).all() and torch.isfinite(own).all()):
        raise UserError(f"{tuned.source} gives log-probabilities that are no numbers: its weights are damaged.")
    rows = rows_of(probes)
    named = {"unit": "class", "asks": "texts"} if asks_classes(probes) else {}
    strength, _ = projection(rounded - base, own - base, rows)
    return Known(
        base=base,
        tuned=own,
        rows=rows,
        rounding=max(rms(rounded - own), rms(base_rounded - base), 1e-6),
        rounded_strength=strength if rms(own - base) > 0 else 1.0,
        warms_up=any(getattr(c, "warmup_steps", None) for c in getattr(tuned.model, "peft_config", {}).values()),
        **named,
    )


@contextlib.contextmanager
def without_adapter(tuned: Any, probes: Sequence[Probe]) -> Iterator[Any]:
    """The base. Of a classifier, with the head that was trained: so is a file in which the update alone is missing."""
    if asks_classes(probes) and adapted_layers(tuned.model):
        with tuned.as_variant("tuned") as model, strengths(model, lambda _: 0.0):
            yield model
    else:
        with tuned.as_variant("base") as model:
            yield model


def _fits_a_copy(model: Any, largest: int = LARGEST_COPIED) -> bool:
    """Whether the base can be copied: not one that is packed in few bits already, nor one too large."""
    held = list(base_parameters(model).values())
    size = sum(p.numel() * p.element_size() for p in held)
    return size <= largest and all(p.is_floating_point() for p in held)


def adapted_layers(model: Any) -> dict[str, Any]:
    """The layers that the adapter changes, by name; none for prompt learning and full fine-tuning."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


@contextlib.contextmanager
def strengths(model: Any, of: Callable[[str], float]) -> Iterator[None]:
    """The adapter at the strength `of(name)` in every layer: 0 is off, 1 as it is, 2 what merging twice gives."""
    changed = []
    try:
        for name, layer in adapted_layers(model).items():
            if (strength := of(name)) != 1:
                layer.forward = functools.partial(_scaled, layer, layer.forward, strength)
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _scaled(layer: Any, forward: Callable[..., Any], strength: float, *args: Any, **kwargs: Any) -> Any:
    base = layer.base_layer(*args, **kwargs)
    if strength == 0 or not isinstance(base, Tensor):
        return base
    return base + strength * (forward(*args, **kwargs) - base)


def parts(model: Any) -> dict[str, set[str]]:
    """Parts of the adapter that servers lose: {what is missing: names of its layers}. Each is some, never all."""
    names = list(adapted_layers(model))
    blocks = {name: int(at[1]) for name in names if (at := re.search(r"\.(\d+)\.", name))}
    numbers = sorted(set(blocks.values()))
    middle = len(numbers) // 2
    found: dict[str, set[str]] = {
        "the first half of the blocks": {n for n, i in blocks.items() if i in numbers[:middle]},
        "the second half of the blocks": {n for n, i in blocks.items() if i in numbers[middle:]},
        "every other block, from the first": {n for n, i in blocks.items() if numbers.index(i) % 2 == 0},
        "every other block, from the second": {n for n, i in blocks.items() if numbers.index(i) % 2 == 1},
    }
    for depth in (-2, -1):  # self_attn, mlp; then q_proj, k_proj, …
        for kind in dict.fromkeys(name.split(".")[depth] for name in names if name.count(".") >= 2):
            if not kind.isdigit():
                found[f"every {kind}"] = {name for name in names if name.split(".")[depth] == kind}
    kept: dict[str, set[str]] = {}
    for what, missing in found.items():
        if 0 < len(missing) < len(names) and missing not in kept.values():
            kept[what] = missing
    return kept


def strength_notes(tuned: Any) -> list[str]:
    """Return notes on an adapter's own strength."""
    factors = [float(layer.warmup_factor("default").min()) for layer in (_warming_layers(tuned) if tuned else [])]
    if factors and min(factors) < 1:
        return [f"it was saved during its warm-up: λ is {min(factors):.2f}"]
    return []


def _warming_layers(tuned: Any) -> list[Any]:
    """The layers whose adapter has the paper's warm-up, and with it a λ that may be below 1."""
    layers = adapted_layers(tuned.model).values()
    return [m for m in layers if isinstance(m, DualLoraLayer) and m.states["default"].warmup]
