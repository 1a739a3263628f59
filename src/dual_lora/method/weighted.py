"""Copy an adapter to another one of the same ranks, at another strength: ΔW' = w ΔW."""

from typing import Any

from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .layer import DualLoraLayer, layers_of, named_layers
from .precision import mark_as_stored


def checked_source(
    model: nn.Module, known: dict[str, Any], adapters: list[str], weights: list[float], kind: str
) -> tuple[str, float]:
    """Return the adapter to copy and its weight.

    known: the model's adapters. Raises ValueError for unknown adapters, a sum of several, and an adapter that cannot
    take a negative weight.
    """
    for name in adapters:
        if name not in known:
            raise ValueError(f"Adapter {name} does not exist. Loaded: {', '.join(known)}.")
    if len(adapters) == len(weights) == 1 and (kind != "linear" or not weights[0]):
        raise ValueError(
            f"Dual LoRA copies the adapter {adapters[0]!r} with its factors multiplied, which needs combination_type "
            f"'linear' (the default) and a weight other than 0; given: '{kind}' and {weights[0]}."
        )
    if len(adapters) != 1 or len(weights) != 1:
        raise ValueError(
            f"Dual LoRA cannot combine adapters {adapters} with weights {weights} ('{kind}') into one "
            "adapter: ΔW = ReLU(BA) ⊙ Sign(DC) is not linear in its factors, so the sum of two updates is not of "
            "this form. Activate them together (`model.base_model.set_adapter([…])`, each layer's "
            "`set_scale(name, w)` for weights), merge them into the base (`merge_adapter([…])`), or convert each "
            "to LoRA (`peft.convert_to_lora`) and combine those. One adapter with a weight works."
        )
    for name, layer in named_layers(model, adapters[0]).items():
        if weights[0] * layer.scaling[adapters[0]] < 0:
            _refuse_undirected(layer, adapters[0], name)
    return adapters[0], weights[0]


def copy_scaled(model: nn.Module, source: str, weight: float, adapter_name: str) -> None:
    """Copy an adapter, with all that it trains, to an existing one: B' = |w| B, and D' = -D if w < 0.

    w goes into B and not into α, which would have to be saved for every layer. A strength that was set with `set_scale`
    is included.
    """
    for layer in layers_of(model, source):
        copy_factors(layer, source, adapter_name)
        layer.dual_lora_dropout[adapter_name].train(layer.dual_lora_dropout[source].training)
        if adapter_name in layer.tied:
            continue  # the factors are the embedding's
        strength = weight * layer.strength(source) / layer.strength(adapter_name)
        frozen = not layer.states[source].r2
        layer.factors(adapter_name).B.data.mul_(strength if frozen else abs(strength))
        if strength < 0 and not frozen:
            layer.factors(adapter_name).D.data.neg_()
        mark_as_stored(layer.stored_factors(adapter_name))
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            own = module.modules_to_save[adapter_name].train(module.modules_to_save[source].training)
            own.load_state_dict(module.modules_to_save[source].state_dict())
        elif isinstance(module, TrainableTokensLayer) and source in module.trainable_tokens_delta:
            module.trainable_tokens_delta[adapter_name].data.copy_(module.trainable_tokens_delta[source].data)


def copy_factors(layer: DualLoraLayer, source: str, adapter_name: str) -> None:
    """Copy factors and warm-up of one adapter to another one of the same ranks."""
    if adapter_name not in layer.tied:
        if adapter_name in layer.dual_lora_seed:
            layer.set_seed(adapter_name, layer.dual_lora_seed[source])
        for new, old in zip(layer.factors(adapter_name), layer.factors(source), strict=True):
            new.data.copy_(old.data)
        mark_as_stored(layer.stored_factors(adapter_name))
    layer.set_left(adapter_name, layer.left(source))


def _refuse_undirected(layer: DualLoraLayer, adapter: str, name: str) -> None:
    """Raise ValueError for an adapter whose ΔW no factors negate, e.g. with rows of D C that are zero."""
    factors, form = layer.adapter(adapter).factors, layer.states[adapter].form
    if form.direction == "frozen" and form.magnitude == "relu":
        raise ValueError(
            f"The layer {name!r} of adapter {adapter!r} has ReLU before signs that are frozen, so no factors of its "
            "form give the negative of its update. Use it with a negative strength (each layer's `set_scale(name, -1)`)"
            ", or merge it with one."
        )
    if form.direction == "sign" and (factors.D.eq(0).all(-1).any() or factors.C.eq(0).all(-2).any()):
        raise ValueError(
            f"The layer {name!r} of adapter {adapter!r} has rows or columns whose direction D C is zero, so "
            "negating D does not negate their sign: this adapter cannot be copied with a negative weight. Use it with "
            "a negative strength (each layer's `set_scale(name, -1)`), or merge it with one."
        )
