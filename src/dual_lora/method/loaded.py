"""After transformers' own loader, which calls no hook of PEFT's: what it leaves open of a warm-up."""

from typing import Any

from torch import nn

from .layer import named_layers
from .saved import warn_if_unfinished


def settle(model: nn.Module, adapter_name: str) -> None:
    """An adapter that was loaded without a count is finished, and one that acts below its full strength says so."""
    layers, config = named_layers(model, adapter_name), model.peft_config[adapter_name]  # type: ignore[index,operator]
    for layer in layers.values():
        if layer.is_as_read(adapter_name):
            layer._set_steps_left(adapter_name, 0)
    counts: dict[str, Any] = {f"{n}.dual_lora_left": layer.dual_lora_left[adapter_name] for n, layer in layers.items()}
    warn_if_unfinished(counts, config)
