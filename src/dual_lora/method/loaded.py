"""After transformers' own loader, which calls no hook of PEFT's: what it leaves open of a warm-up."""

import os
from typing import Any

from torch import nn

from ..verify.numbers import header
from .layer import named_layers
from .saved import warn_if_unfinished


def settle(model: nn.Module, adapter_name: str, folder: str | os.PathLike[str], subfolder: str = "") -> None:
    """An adapter whose file has no count is finished, and one that acts below its full strength says so."""
    layers, config = named_layers(model, adapter_name), model.peft_config[adapter_name]  # type: ignore[index,operator]
    path = os.path.join(folder, subfolder, "adapter_model.safetensors")
    if os.path.isfile(path):
        counted = any(".dual_lora_left" in name for name in header(path))
        for layer in () if counted else layers.values():
            layer._set_steps_left(adapter_name, 0)
    counts: dict[str, Any] = {f"{n}.dual_lora_left": layer.dual_lora_left[adapter_name] for n, layer in layers.items()}
    warn_if_unfinished(counts, config)
