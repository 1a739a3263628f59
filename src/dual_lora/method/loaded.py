"""The steps after transformers' own loading of an adapter, which does not call PEFT's hooks."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from .layer import named_layers
from .precision import mark_as_stored
from .saved import layer_of, warn_if_unfinished


def finish_loading(model: nn.Module, adapter_name: str, has_counts: bool, misfits: Iterable[str] = ()) -> None:
    """End the warm-up of an adapter that was loaded without a count, and warn of one that acts below full strength.

    misfits: names of factors that were not loaded because of their shape (`ignore_mismatched_sizes`). Their layers are
    initialised again with ΔW = 0: together with the loaded factors they would be a random update.
    """
    layers: Any = named_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[index,operator]
    for name in {layer_of(key) for key in misfits} & set(layers):
        layers[name].reset_dual_lora_parameters(adapter_name, config)
        layers[name].dual_lora_B[adapter_name].data.zero_()
    for layer in layers.values():
        mark_as_stored(layer.stored_factors(adapter_name))  # loading has replaced the marked parameters
        if not has_counts:
            layer.set_left(adapter_name, 0)
    warn_if_unfinished({name: layer.left(adapter_name) for name, layer in layers.items()}, config)
