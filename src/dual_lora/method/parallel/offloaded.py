"""Factors that accelerate keeps on a CPU or a disk, away from the device that they are used on.

Its hooks bring a module's parameters for the time of that module's forward. A ParameterDict has none: it is asked for.
"""

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


def present(factors: nn.ParameterDict | BufferDict, adapter: str) -> Tensor:
    """The factor of an adapter; from where accelerate has put it, if it left a meta tensor in its place."""
    factor: Tensor = factors[adapter]
    hook: Any = getattr(factors, "_hf_hook", None) if factor.is_meta else None
    for one in getattr(hook, "hooks", [hook]):
        kept = getattr(one, "weights_map", None)
        if kept is not None:
            return _read(kept, adapter).to(one.execution_device)
    return factor


def _read(kept: Any, adapter: str) -> Tensor:
    try:
        return kept[adapter]
    except KeyError:  # PEFT writes an adapter of a base on the disk under names that are made for LoRA's
        layer, _, letter = kept.prefix.removesuffix(".").rpartition(".")
        return kept.dataset[f"{layer}.{adapter}.{letter}"]
