"""Factors that accelerate has offloaded to a CPU or a disk.

Its hooks load a module's parameters for the module's forward. A ParameterDict has no forward, so factors are loaded
here.
"""

from typing import Any

from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


def load(factors: nn.ParameterDict | BufferDict, adapter: str) -> Tensor:
    """Return the factor of an adapter, loaded from accelerate's storage if there is a meta tensor in its place."""
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
    except KeyError:  # for a base on the disk, PEFT writes an adapter under other names, made for LoRA's
        layer, _, letter = kept.prefix.removesuffix(".").rpartition(".")
        return kept.dataset[f"{layer}.{adapter}.{letter}"]
