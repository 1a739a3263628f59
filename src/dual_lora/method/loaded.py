"""After transformers' own loader, which calls no hook of PEFT's: what it leaves open of a warm-up."""

from torch import nn

from .layer import named_layers
from .precision import mark_as_stored
from .saved import warn_if_unfinished


def settle(model: nn.Module, adapter_name: str, has_counts: bool) -> None:
    """An adapter that was loaded without a count is finished, and one that acts below its full strength says so."""
    layers, config = named_layers(model, adapter_name), model.peft_config[adapter_name]  # type: ignore[index,operator]
    for layer in layers.values():
        mark_as_stored(layer._stored(adapter_name))  # other parameters than those that were marked
        if not has_counts:
            layer.set_left(adapter_name, 0)
    warn_if_unfinished({name: layer.left(adapter_name) for name, layer in layers.items()}, config)
