"""PEFT's hot-swap of adapters, for Dual LoRA: new factors in the same tensors, so that nothing recompiles.

A smaller rank is padded with zeros, which does not change P = B A and Q = D C. λα/√(r1 r2) is a tensor already.
`install` wraps the functions of `peft.utils.hotswap`; adapters of other methods go to PEFT's own functions.
"""

import copy
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .._warning import warn
from ..core.frozen import check_seed
from ..core.reference import scaling
from .cache import composed_weights
from .config import DualLoraConfig
from .layer import DualLoraLayer, layers_of, named_layers
from .layers.experts import ParamWrapper
from .patterns import layer_options
from .precision import mark_as_stored, warn_of_rounded
from .state import AdapterState

# The options in which both adapters have to agree; ranks, α and the estimator (used in training only) may differ.
KEYS_TO_CHECK = ["magnitude_activation", "direction_activation", "plain_rank", "dropout"]
RANK_DIMENSION = {"A": -2, "B": -1, "C": -2, "D": -1}


def hotswap_from_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: DualLoraConfig
) -> None:
    """Replace an adapter's factors by those of `state_dict` (as saved, with or without the adapter's name).

    Layers that the new adapter leaves out get ΔW = 0. The model's configuration is updated, so that it can be saved.
    Raises RuntimeError, with nothing changed, for tensors of layers that the old adapter does not have and for shapes
    that differ in more than the rank; ValueError while the adapter is merged.
    """
    model = getattr(model, "_orig_mod", model)
    layers = named_layers(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights. Please "
            "unmerge the adapter first by calling `peft_model.unmerge_adapter()`; unmerging after a swap of merged "
            "weights would otherwise corrupt them."
        )
    new = {key.removesuffix(f".{adapter_name}"): value for key, value in state_dict.items()}
    own = {f"{name}.dual_lora_{part}" for name in layers for part in ("A", "B", "C", "D", "left", "seed")}
    others = {key: value for key, value in state_dict.items() if key.removesuffix(f".{adapter_name}") not in own}
    known = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    unexpected = [key for key in others if key not in known]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    _check_fits(layers, new, adapter_name)
    key_of = _key_function(model)
    scales: dict[DualLoraLayer, Tensor] = {}
    with torch.no_grad():
        _warn_of_base(others, known, adapter_name)
        for key, value in others.items():
            known[key].copy_(value)
        for name, layer in layers.items():
            composed_weights.drop(layer)
            scales[layer] = layer.strength_tensor(adapter_name)
            if adapter_name in layer.tied:
                continue  # its factors are the embedding's
            warn_of_rounded((new.get(f"{name}.dual_lora_{letter}") for letter in RANK_DIMENSION), layer.shared)
            for letter, factors in zip(RANK_DIMENSION, layer.factor_dicts(adapter_name), strict=False):
                _write(factors[adapter_name], new.get(f"{name}.dual_lora_{letter}"))
            if adapter_name in layer.dual_lora_seed and (seed := new.get(f"{name}.dual_lora_seed")) is not None:
                layer.set_seed(adapter_name, seed)
            mark_as_stored(layer.stored_factors(adapter_name))
            r1, r2, alpha = layer_options(config, key_of(name, layer))
            before, left = layer.states[adapter_name], new.get(f"{name}.dual_lora_left")
            state = AdapterState(r1, r2, alpha, before.form, before.warmup, before.share)
            layer.states[adapter_name], layer.scaling[adapter_name] = state, state.scaling
            if left is not None and left.any() and config.warmup_steps:
                layer.begin_warmup(adapter_name, config.warmup_steps)
            layer.set_left(adapter_name, 0 if left is None else left)
        for layer in layers.values():
            if adapter_name in layer.tied:
                layer.tie(adapter_name, layer.tied[adapter_name])
            _rescale(layer, adapter_name, scales[layer])

    configs: Any = getattr(model, "peft_config", {})
    if adapter_name in configs:
        configs[adapter_name] = changed = copy.copy(configs[adapter_name])
        changed.init_weights, changed.warmup_steps = config.init_weights, config.warmup_steps
        changed.direction_seed = config.direction_seed
        _write_options(changed, model, adapter_name)


def _warn_of_base(others: dict[str, Tensor], known: dict[str, Tensor], adapter: str) -> None:
    """Say which weights of the base itself a swap changes. Those that an adapter trains have its name, biases have not;
    PEFT saves an embedding with an adapter on it, most often as it was."""
    changed = [
        key
        for key, value in others.items()
        if adapter not in key.split(".")
        and not key.endswith(".bias")
        and not torch.equal(known[key], value.to(known[key]))
    ]
    if changed:
        warn(
            f"The adapter holds {len(changed)} weights of the base itself, the first of them {changed[0]}. They take "
            "the place of the base's own, and stay when the next adapter comes.",
            stacklevel=4,
        )


def _key_function(model: nn.Module) -> Callable[[str, DualLoraLayer], str]:
    """Return a function from a layer and its name to the key that patterns match: its name in the base model."""
    tuners = (f"{name}.model.".lstrip(".") for name, m in model.named_modules() if isinstance(m, BaseTuner))
    root = next(tuners, "")

    def key_of(name: str, layer: DualLoraLayer) -> str:
        key = name.removeprefix(root).split(".base_layer")[0]  # not inside other parameters' wrappers
        return f"{key}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else key

    return key_of


def _write_options(config: Any, model: nn.Module, adapter: str) -> None:
    """Write the stored ranks and α of every layer to the configuration: the most common, and patterns for others."""
    key_of, named = _key_function(model), named_layers(model, adapter)
    layers = {key_of(name, layer): _stored_options(layer, adapter) for name, layer in named.items()}
    if not layers:
        return
    config.r1, config.r2, config.alpha = usual = max(layers.values(), key=[*layers.values()].count)
    others = {f"^{re.escape(key)}": options for key, options in layers.items() if options != usual}
    config.rank_pattern = {key: [r1, r2] for key, (r1, r2, _) in others.items()}
    vars(config)["alpha_pattern"] = {key: alpha for key, (*_, alpha) in others.items()}


def _stored_options(layer: DualLoraLayer, adapter: str) -> tuple[int, int, float]:
    """Return the stored ranks, with padding, and the α that gives the same scale with them."""
    factors, state = layer.stored_factors(adapter), layer.states[adapter]
    r1, r2 = factors.A.shape[-2], factors.C.shape[-2] if state.r2 else 0
    return r1, r2, state.strength / scaling(1.0, r1, r2)


def _check_fits(layers: dict[str, DualLoraLayer], new: dict[str, Tensor], adapter: str) -> None:
    for name, layer in layers.items():
        seed = f"{name}.dual_lora_seed"
        if adapter in layer.dual_lora_seed and f"{name}.dual_lora_B" in new and seed not in new:
            raise RuntimeError(
                f"Hot swapping the adapter did not succeed: the seed of frozen signs, {seed}, is missing. Save the "
                "adapter with `save_pretrained`."
            )
        if seed in new:
            check_seed(new[seed], seed)
        for (letter, dimension), factors in zip(RANK_DIMENSION.items(), layer.factor_dicts(adapter), strict=False):
            key = f"{name}.dual_lora_{letter}"
            old = list(factors[adapter].shape)
            got = list(new[key].shape) if key in new else old
            fixed = [k for k in range(len(old)) if k != len(old) + dimension]
            if len(got) != len(old) or any(got[k] != old[k] for k in fixed):
                raise RuntimeError(
                    f"Hot swapping the adapter did not succeed: {key} has shape {got} in place of {old}, where the "
                    "rank alone may differ. Was it trained on another base model?"
                )


def _write(old: Tensor, new: Tensor | None) -> None:
    """Copy `new` into the tensor `old`, padded with zeros; a larger rank replaces its memory. None: zeros."""
    old.zero_()  # raises the version counter, which a write to `.data` does not: a waiting backward raises an error
    if new is None:
        return
    new = new.to(old.device, old.dtype)
    if any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
        old.data = new.clone()  # do not share memory with `state_dict`
    else:
        old[tuple(slice(0, n) for n in new.shape)].copy_(new)


def pad_ranks(model: nn.Module, target_rank: int | None, config: Any = None) -> None:
    """Pad the factors of every adapter with zeros to a total rank, half for each group (r1 rounded up). None: do not.

    Raises ValueError, with nothing changed, for an adapter that is larger already.
    """
    layers = layers_of(model)
    if target_rank is None:
        return
    if target_rank < 2:
        raise ValueError(f"target_rank is the total r1 + r2 and has to be at least 2, got {target_rank}.")

    def ranks(state: AdapterState) -> tuple[int, int]:
        return (target_rank - target_rank // 2, target_rank // 2) if state.r2 else (target_rank, 0)

    for layer in layers:
        for adapter in layer.states:
            state = layer.states[adapter]
            r1, r2 = ranks(state)
            if state.r1 > r1 or state.r2 > r2:
                raise ValueError(
                    f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                    f"({layer.r[adapter]}). This is not possible. (r1 and r2 are {state.r1} and {state.r2}, and would "
                    f"be {r1} and {r2}.)"
                )
    done: dict[Tensor, nn.Parameter] = {}  # tied layers share theirs
    for layer in layers:
        for letter, dimension in RANK_DIMENSION.items():
            factors = getattr(layer, f"dual_lora_{letter}")
            for adapter, factor in factors.items():
                if factor not in done:
                    more = ranks(layer.states[adapter])[letter in "CD"] - factor.shape[dimension]
                    padded = nn.functional.pad(factor.data, (0, more) if dimension == -1 else (0, 0, 0, more))
                    done[factor] = nn.Parameter(padded, requires_grad=factor.requires_grad)
                factors[adapter] = done[factor]
    mark_as_stored(done.values())
    known = getattr(model, "peft_config", {})
    named = config if isinstance(config, dict) else {next((a for a in known if known[a] is config), "default"): config}
    for adapter, one in named.items():
        if one is not None:
            _write_options(one, model, adapter)


def _rescale(layer: DualLoraLayer, adapter: str, before: Tensor) -> None:
    """Write the adapter's strength into the old tensor, which captured CUDA graphs read."""
    now = layer.strength_tensor(adapter)
    if now is not before and not before.is_inference() and (before.device, before.dtype) == (now.device, now.dtype):
        layer.dual_lora_scale[adapter] = before.copy_(now)


def install() -> None:
    """Wrap PEFT's hot-swap functions so that they take adapters of this method."""
    from peft.utils import PeftType, hotswap

    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.DUAL_LORA] = KEYS_TO_CHECK  # type: ignore[attr-defined]
    theirs: Callable[..., None] = hotswap.hotswap_adapter_from_state_dict

    @wraps(theirs)
    def from_state_dict(model: Any, state_dict: Any, adapter_name: str, config: Any, *more: Any, **named: Any) -> None:
        if isinstance(config, DualLoraConfig):
            hotswap_from_state_dict(model, state_dict, adapter_name, config)
        else:
            theirs(model, state_dict, adapter_name, config, *more, **named)

    their_preparation: Callable[..., None] = hotswap.prepare_model_for_compiled_hotswap

    @wraps(their_preparation)
    def prepare(model: Any, *, target_rank: Any = None, config: Any = None, check_compiled: Any = "error") -> None:
        if not layers_of(model):
            their_preparation(model, target_rank=target_rank, config=config, check_compiled=check_compiled)
            return
        _check_compiled(model, check_compiled)
        pad_ranks(model, target_rank, config)

    hotswap.hotswap_adapter_from_state_dict = from_state_dict
    hotswap.prepare_model_for_compiled_hotswap = prepare


def _check_compiled(model: nn.Module, reaction: str) -> None:
    if reaction not in ("error", "warn", "ignore"):
        raise ValueError(f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{reaction}' instead.")
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False)) or reaction == "ignore":
        return
    if reaction == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    warn(
        "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely result "
        "in re-compilation, hurting performance. Call the function before compiling the model.",
        stacklevel=3,
    )
