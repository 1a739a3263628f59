"""A saved adapter: the four factors of every layer, and the count of the paper's warm-up if it has one.

PEFT reads the tensors. This file checks that they are complete and fit, because a missing factor would silently stay
random.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist

from .._warning import warn
from ..verify.numbers import check_numbers, header
from .parallel.sharded import local
from .warmup import describe_remaining_steps

_NUMBERS = re.compile(r"\.dual_lora_(left|seed)")  # which are no factors
PEFT_PREFIX = "base_model.model."


def check_file(folder: str | os.PathLike[str], subfolder: str | None = None) -> list[str]:
    """Return the names of the tensors in a folder's adapter file, [] without a file.

    Raises ValueError for a file that was cut short, is of another method, or holds tensors that are not floating-point,
    which loading would convert without a warning.
    """
    path = os.path.join(folder, subfolder or "", "adapter_model.safetensors")
    if not os.path.isfile(path):
        return []
    try:
        kinds = {name: kind for name, (kind, _) in header(path).items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({os.path.getsize(path)} bytes; {error}). It was cut short or "
            "damaged when it was written or copied: copy it again, or take an earlier checkpoint."
        ) from error
    if not any(".dual_lora_" in name for name in kinds):
        raise ValueError(_no_factors_message(path, list(kinds)))
    check_numbers(kinds, path)
    return list(kinds)


def with_prefix(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the state with the names of a PeftModel, if the model is one.

    A state from a plain model with an adapter, as transformers loads one, has names without the prefix: PEFT would load
    nothing of it, without an error.
    """
    if not any(name.startswith(PEFT_PREFIX) for name, _ in model.named_parameters()):
        return state
    return named_as_saved(state)


def named_as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with the prefix that names in PEFT's files have."""
    return {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}


def with_counts(state: dict[str, Tensor], layers: Mapping[str, Any], config: Any, adapter: str) -> dict[str, Tensor]:
    """Return the state with a warm-up count, in the right shape, for every layer that has one.

    An adapter that is loaded for inference after its warm-up drops the count.
    """
    names = {name.removeprefix(PEFT_PREFIX): layer for name, layer in layers.items()}
    counts = {layer_of(key): value for key, value in state.items() if key.endswith(".dual_lora_left")}
    state = {key: value for key, value in state.items() if not key.endswith((".dual_lora_left", ".dual_lora_alpha"))}
    ended = config.inference_mode and not any(bool(left.any()) for left in counts.values())
    for stem in {key.rpartition(".dual_lora_B")[0] for key in state if ".dual_lora_B" in key}:
        layer = names.get(stem.removeprefix(PEFT_PREFIX))
        if layer is None or adapter not in layer.dual_lora_left:
            continue
        if ended:
            layer.begin_warmup(adapter, 0)
            continue
        state[f"{stem}.dual_lora_left"] = layer.fitted_count(adapter, counts.get(layer_of(stem)))
    return state


def warn_if_not_gathered(state: dict[str, Tensor], adapter_name: str) -> None:
    """Warn of factors that are shards and not gathered: the saved file would not load again."""
    factors = {n: t for n, t in state.items() if ".dual_lora_" in n and not _NUMBERS.search(n)}
    shards = [n for n, t in factors.items() if t.ndim < 2 or 0 in t.shape]
    if shards:
        warn(
            f"Adapter {adapter_name!r}: {_shortened(shards, 'factors')} are empty or flat, which means that DeepSpeed "
            "ZeRO-3 / FSDP shards were not gathered before save_pretrained(): the saved adapter is incomplete. Save "
            "through Trainer or accelerate (`get_state_dict`), or inside "
            "deepspeed.zero.GatheredParameters([…]) / FullyShardedDataParallel.summon_full_params(model).",
            stacklevel=3,
        )


def warn_of_nan(state: Mapping[str, Tensor], adapter_name: str, action: str) -> None:
    """Warn of NaN or infinity in the factors C and D that are saved or loaded.

    Those in A and B show in every output. Sign takes a NaN for negative, so the model would go on with finite numbers.
    """
    directions = {n: t for n, t in state.items() if re.search(r"\.dual_lora_[CD]\b", n) and t.is_floating_point()}
    broken = sorted({layer_of(n) for n, t in directions.items() if not t.is_meta and not _is_finite(local(t))})
    if broken:
        warn(
            f"Adapter {adapter_name!r} is {action} with NaN or infinity in C or D of {_shortened(broken)}. Their signs "
            "mean nothing, and the model's outputs do not show it. Go back to an earlier checkpoint, and look for the "
            "step at which the loss or the gradient's norm was not finite.",
            stacklevel=4,
        )


def _is_finite(values: Tensor) -> bool:
    """Whether all numbers are. Eight bits have no `isfinite` of their own in torch."""
    return bool((values.float() if values.element_size() == 1 else values).isfinite().all())


def refuse_empty(state: dict[str, Tensor], adapter_name: str) -> None:
    """Raise ValueError in the first process if the state that is to be saved has no factor."""
    first = not dist.is_available() or not dist.is_initialized() or not dist.get_rank()
    if first and not any(".dual_lora_" in name for name in state):
        raise ValueError(
            f"There is no factor of the Dual LoRA adapter {adapter_name!r} in the state that is to be saved "
            f"({len(state)} tensors): nothing was written. Under FSDP gather it first (accelerate's `get_state_dict`, "
            "or FullyShardedDataParallel.summon_full_params(model))."
        )


def warn_of_scales(layers: list[Any], adapter_name: str) -> None:
    """Warn of a strength that was set with `set_scale`, which is not saved."""
    scales = {layer.scaling[adapter_name] / layer.states[adapter_name].scaling for layer in layers}
    other = next((scale for scale in scales if not math.isclose(scale, 1)), None)
    if other is not None:
        warn(
            f"Adapter {adapter_name!r} has {other:.4g} times its own strength (`set_scale`). This factor is not saved, "
            "so the adapter will load at its own strength. To save the changed strength: "
            f"model.base_model.add_weighted_adapter([{adapter_name!r}], [1.0], 'scaled'), and save that.",
            stacklevel=4,
        )


def warn_if_unfinished(counts: Mapping[str, Tensor], config: Any) -> None:
    """Warn of layers of an adapter loaded for inference that act below full strength."""
    layers = sorted(layer_of(name) for name, left in counts.items() if left.any())
    if layers and config.inference_mode:
        most = max(int(left.max()) for left in counts.values())
        warn(
            f"This Dual LoRA adapter was saved during its warm-up: {_shortened(layers)} with "
            f"{describe_remaining_steps(most, config.warmup_steps)}. It is used as it was saved (λ below 1). "
            "Train it to the end of the warm-up, or choose fewer `warmup_steps`.",
            stacklevel=3,
        )


def check_fits(model: nn.Module, config: Any, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless `state` (keys as in the model) has factors for exactly the model's adapted layers.

    A single missing factor gives a warning when the state is loaded. For other shapes PEFT itself raises an error,
    unless it is told to ignore them. Sharded and flattened models, whose parameters have other names, are not checked.
    """
    # Tied layers share their factors: those of the first suffice, and a file may have both.
    own, known = (
        [n for n, _ in named if ".dual_lora_" in n and n.endswith(f".{adapter_name}")]
        for named in (model.named_parameters(), model.named_parameters(remove_duplicate=False))
    )
    wanted = {layer_of(name) for name in own}
    given = {layer_of(name) for name in state if ".dual_lora_" in name}
    missing, extra = sorted(wanted - given), sorted(given - {layer_of(name) for name in known})
    if not wanted or not (missing or extra):
        return
    if not given:
        raise ValueError(_no_factors_message("This file", list(state)))
    lacks = f"it lacks the factors of {_shortened(missing)}, which this model adapts" if missing else ""
    has = f"it has factors of {_shortened(extra)}, which this model does not adapt" if extra else ""
    raise ValueError(
        f"The saved Dual LoRA adapter does not fit this model: {'; '.join(filter(None, (lacks, has)))}. Load it on the "
        f"base that it was trained on (its configuration names {config.base_model_name_or_path!r}), with its own "
        "configuration. Nothing was loaded."
    )


def without_mismatched_layers(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the matching factors of layers in which another factor has a mismatched shape.

    PEFT raises an error for the mismatched one, or with `ignore_mismatched_sizes` leaves it as it was initialised. The
    layer then keeps its initial factors, with ΔW = 0, instead of a mixture of trained and random ones.
    """
    held = dict(model.named_parameters())
    own = {name: parameter.shape for name, parameter in held.items()}
    mixed = {layer_of(n) for n, t in state.items() if n in own and ".dual_lora_" in n and own[n] != t.shape}
    for B in (held.get(f"{layer}.dual_lora_B.{adapter_name}") for layer in mixed):
        if B is not None and not B.is_meta:
            B.data.zero_()  # the paper's start has another
    fits = {n for n, t in state.items() if n in own and own[n] == t.shape}
    return {n: t for n, t in state.items() if layer_of(n) not in mixed or ".dual_lora_" not in n or n not in fits}


def layer_of(name: str) -> str:
    """Return the name of the layer that a tensor's name belongs to."""
    return name.removeprefix(PEFT_PREFIX).partition(".dual_lora_")[0]


def _no_factors_message(what: str, names: list[str]) -> str:
    return (
        f"{what} holds no factors of a Dual LoRA adapter; its tensors: {', '.join(names[:2]) or 'none at all'}. Is it "
        "an adapter of another type, or another file under this name?"
    )


def _shortened(names: list[str], what: str = "layers") -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {what}"
