"""Checks before a merge of a whole model, and warnings after it."""

from typing import Any

from torch import nn

from .._warning import warn
from .layer import DualLoraLayer, layers_of
from .layers.quantized import QuantizedLinear
from .warmup import describe_remaining_steps


def quantised_layers(model: nn.Module) -> list[QuantizedLinear]:
    """Return the quantised adapted layers of a model."""
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


def warn_of_second_names(model: nn.Module) -> None:
    """Warn of an adapted module that has a second name: PEFT replaces it under the first name only."""
    bases = {layer.get_base_layer(): layer for layer in layers_of(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in bases and name.rpartition(".")[2] != "base_layer":
            bases[module].shared.warn_once(
                f"{name!r} is the same module as one that is adapted under another name: the adapter does not act "
                "there until it is merged, which changes both. Give it a module of its own, or call the other name."
            )


def warn_unfinished(name: str, config: Any, layers: dict[str, DualLoraLayer]) -> None:
    """Warn of an adapter that is merged for good during its warm-up, below full strength.

    For an adapter that was loaded for inference the warning came when it was loaded.
    """
    waiting = {n: left for n, layer in layers.items() if (left := layer.steps_left(name))}
    if waiting and not config.inference_mode:
        first, most = next(iter(waiting)), max(waiting.values())
        where = first if len(waiting) == 1 else f"{first} and {len(waiting) - 1} more layers"
        warn(
            f"The Dual LoRA adapter {name!r} is merged during its warm-up ({where}: "
            f"{describe_remaining_steps(most, config.warmup_steps)}). The merged model is what the adapter is now "
            "(λ below 1; 0 in layers that the data have not reached). Train it to the end of the warm-up, or choose "
            "fewer `warmup_steps`, about a tenth of the run's.",
            stacklevel=4,
        )


def warn_of_rounding(layers: list[QuantizedLinear]) -> None:
    """Warn of the error of quantising merged weights again."""
    errors = sorted(layer.merge_error for layer in layers if layer.merge_error is not None)
    if errors:
        warn(
            f"Merged into {len(errors)} quantised layers, whose weights were quantised again. The error of this is "
            f"{errors[len(errors) // 2]:.1%} of ΔW's norm in the median layer and {errors[-1]:.1%} in the worst (each "
            "layer's `merge_error`). Unmerging restores the old weights bit for bit. For an exact merge, merge into "
            "the base model in bf16 or fp32 and quantise the result.",
            stacklevel=4,
        )


def _adapters_to_merge(layer: DualLoraLayer, adapter_names: list[str] | None) -> list[str]:
    """Return the adapters of a layer that a merge would take: those of these names; None: the active ones."""
    return layer.known_names(layer.active_adapters if adapter_names is None else adapter_names)


def refuse_unmergeable(tuner: Any, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Raise ValueError for a layer that cannot be merged, before any layer of the model is changed."""
    for layer in layers_of(tuner):
        asked = _adapters_to_merge(layer, adapter_names)
        if asked and safe_merge:
            layer.refuse_broken([], asked)
        if asked and not isinstance(layer, QuantizedLinear):
            for parameter in layer.merge_parameters().values():
                layer.refuse_computed(parameter)


def refuse_shared_weights(tuner: Any, adapter_names: list[str] | None) -> None:
    """Raise ValueError where two modules that share a weight have different updates; warn where one has none."""
    if any(config.layer_replication for config in tuner.peft_config.values()):
        raise ValueError("Cannot merge Dual LoRA layers when base model layers are replicated")
    holders: dict[int, list[nn.Module]] = {}
    layers: dict[tuple[nn.Module, int], DualLoraLayer] = {}  # by the base layer and the parameter that each adapts
    for module in tuner.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(module)
        if isinstance(module, DualLoraLayer) and not isinstance(module, QuantizedLinear):
            layers |= {(module.get_base_layer(), id(p)): module for p in module.merge_parameters().values()}

    def updates(layer: DualLoraLayer) -> set[str]:
        return {*_adapters_to_merge(layer, adapter_names), *layer.merged_adapters}

    for (base, weight), layer in layers.items():
        own = updates(layer) - layer.tied.keys()
        for other in holders.get(weight, ()) if own else ():
            its = layers.get((other, weight))
            theirs = updates(its) if its is not None else set()
            if other is base or (its is not None and own <= its.tied.keys()):
                continue
            way_out = (
                "Untie them first (`layer.weight = nn.Parameter(layer.weight.clone())` and "
                "`tie_word_embeddings=False`), or train with `ensure_weight_tying=True`: both get one update."
            )
            if theirs:
                raise ValueError(
                    f"Cannot merge: {base} and {other} share one weight, and their updates ({', '.join(sorted(own))} "
                    f"and {', '.join(sorted(theirs))}) differ: no single weight gives the same result as the unmerged "
                    "model. " + way_out
                )
            layer.shared.warn_once(
                f"Merging adapter {', '.join(sorted(own))} into {base} changes {other} as well, which shares its "
                "weight and has no update of its own: the merged model differs from the unmerged one. " + way_out
            )
