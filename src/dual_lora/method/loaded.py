"""After transformers' own loader, which calls no hook of PEFT's: what it leaves open."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .layer import named_layers
from .precision import mark_as_stored
from .saved import layer_of, warn_if_unfinished


def settle(model: nn.Module, adapter_name: str, has_counts: bool, misfits: Iterable[str] = ()) -> None:
    """An adapter that was loaded without a count is finished, and one that acts below its full strength says so.

    misfits: names of factors that were not loaded, as they have another shape (`ignore_mismatched_sizes`). Their layers
    go back to the start, at which they change nothing: with their other factors they would be a random update.
    """
    layers: Any = named_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[index,operator]
    for name in {layer_of(key) for key in misfits} & set(layers):
        layers[name].reset_dual_lora_parameters(adapter_name, config)
        layers[name].dual_lora_B[adapter_name].data.zero_()
    for layer in layers.values():
        mark_as_stored(layer._stored(adapter_name))  # other parameters than those that were marked
        if not has_counts:
            layer.set_left(adapter_name, 0)
    warn_if_unfinished({name: layer.left(adapter_name) for name, layer in layers.items()}, config)
