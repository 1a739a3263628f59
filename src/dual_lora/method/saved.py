"""A saved adapter: the four factors of every layer, and what is left of the paper's warm-up where it has one.

PEFT reads the tensors; here it is checked that they are all there and fit, because what is missing would silently be
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
from .warmup import until_full

_NUMBERS = re.compile(r"\.dual_lora_(left|seed)")  # which are no factors
PEFT_PREFIX = "base_model.model."


def check_file(folder: str | os.PathLike[str], subfolder: str | None = None) -> list[str]:
    """The names of the tensors in the folder's adapter file, of which a folder may have none.

    Raises ValueError if it was cut short, is of another method or holds no floating-point numbers, which loading would
    make of others in silence.
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
        raise ValueError(_foreign(path, list(kinds)))
    check_numbers(kinds, path)
    return list(kinds)


def with_prefix(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with the names of a PeftModel, where the model is one: that of a plain model with an adapter in it, as
    transformers loads one, has the names of that model, of which PEFT would load nothing in silence."""
    if not any(name.startswith(PEFT_PREFIX) for name, _ in model.named_parameters()):
        return state
    return named_as_saved(state)


def named_as_saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the prefix that PEFT's files have; a model into which transformers has loaded has none."""
    return {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}


def with_counts(state: dict[str, Tensor], layers: Mapping[str, Any], config: Any, adapter: str) -> dict[str, Tensor]:
    """The state with a count of the paper's warm-up for every layer that has one, in the shape that it has there.

    Without one an adapter is finished; in the middle of a warm-up the layer's own count stays (averages are put in
    place so, and taken out again). An adapter that is loaded to be used and has ended its warm-up forgets it.
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
        own = layer.dual_lora_left[adapter]
        left = counts.get(layer_of(stem), own if 0 < layer.steps_left(adapter) < layer.states[adapter].warmup else 0)
        state[f"{stem}.dual_lora_left"] = layer.fitting(adapter, left)
    return state


def warn_if_not_gathered(state: dict[str, Tensor], adapter_name: str) -> None:
    """Say that what is about to be saved are shards and not the factors: the file would not load again."""
    factors = {n: t for n, t in state.items() if ".dual_lora_" in n and not _NUMBERS.search(n)}
    shards = [n for n, t in factors.items() if t.ndim < 2 or 0 in t.shape]
    if shards:
        warn(
            f"Adapter {adapter_name!r}: {_some(shards, 'factors')} are empty or flat, which means that DeepSpeed "
            "ZeRO-3 / FSDP shards were not gathered before save_pretrained(): the saved adapter is incomplete. Save "
            "through Trainer or accelerate (`get_state_dict`), or inside "
            "deepspeed.zero.GatheredParameters([…]) / FullyShardedDataParallel.summon_full_params(model).",
            stacklevel=3,
        )


def refuse_empty(state: dict[str, Tensor], adapter_name: str) -> None:
    """Raise ValueError for a state without one factor, but in processes that have nothing to save."""
    first = not dist.is_available() or not dist.is_initialized() or not dist.get_rank()
    if first and not any(".dual_lora_" in name for name in state):
        raise ValueError(
            f"There is no factor of the Dual LoRA adapter {adapter_name!r} in the state that is to be saved "
            f"({len(state)} tensors): nothing was written. Under FSDP gather it first (accelerate's `get_state_dict`, "
            "or FullyShardedDataParallel.summon_full_params(model))."
        )


def warn_of_scales(layers: list[Any], adapter_name: str) -> None:
    """Say that an adapter acts at another strength than the one it will have when it is loaded."""
    scales = {layer.scaling[adapter_name] / layer.states[adapter_name].strength for layer in layers}
    other = next((scale for scale in scales if not math.isclose(scale, 1)), None)
    if other is not None:
        warn(
            f"Adapter {adapter_name!r} has {other:.4g} times its own strength (`set_scale`). This factor is not saved, "
            "so the adapter will load at its own strength. To save the changed strength: "
            f"model.base_model.add_weighted_adapter([{adapter_name!r}], [1.0], 'scaled'), and save that.",
            stacklevel=4,
        )


def warn_if_unfinished(counts: Mapping[str, Tensor], config: Any) -> None:
    """Say which layers of an adapter loaded for inference act below full strength."""
    layers = sorted(layer_of(name) for name, left in counts.items() if left.any())
    if layers and config.inference_mode:
        most = max(int(left.max()) for left in counts.values())
        warn(
            f"This Dual LoRA adapter was saved during its warm-up: {_some(layers)} with "
            f"{until_full(most, config.warmup_steps)}. It is used as it was saved (λ below 1). "
            "Train it to the end of the warm-up, or choose fewer `warmup_steps`.",
            stacklevel=3,
        )


def check_fits(model: nn.Module, config: Any, adapter_name: str, state: dict[str, Tensor]) -> None:
    """Raise ValueError unless the layers that `state` (keys as in the model) has factors of are those that have some.

    A single factor that is missing gets a warning, as in PEFT; other shapes PEFT refuses itself, unless told to ignore
    them. Sharded and flattened models, whose parameters go by other names, are left to PEFT altogether.
    """
    # Tied layers share their factors: those of the first suffice, and a file may have both.
    own, known = (
        [n for n, _ in named if ".dual_lora_" in n and n.endswith(f".{adapter_name}")]
        for named in (model.named_parameters(), model.named_parameters(remove_duplicate=False))
    )
    wanted = {layer_of(name) for name in own}
    given = {layer_of(name) for name in state if ".dual_lora_" in name}
    if not wanted:
        return
    missing, extra = sorted(wanted - given), sorted(given - {layer_of(name) for name in known})
    if not (missing or extra):
        bare = {name.removeprefix(PEFT_PREFIX) for name in state}
        absent = [name for name in own if name.removeprefix(PEFT_PREFIX) not in bare]
        if absent:
            warn(
                f"The saved Dual LoRA adapter lacks {_some(absent, 'factors')}: these keep their present values.",
                stacklevel=3,
            )
        return
    if not given:
        raise ValueError(_foreign("This file", list(state)))
    lacks = f"it lacks the factors of {_some(missing)}, which this model adapts" if missing else ""
    has = f"it has factors of {_some(extra)}, which this model does not adapt" if extra else ""
    raise ValueError(
        f"The saved Dual LoRA adapter does not fit this model: {'; '.join(filter(None, (lacks, has)))}. Load it on the "
        f"base that it was trained on (its configuration names {config.base_model_name_or_path!r}), with its own "
        "configuration. Nothing was loaded."
    )


def without_strangers(model: nn.Module, adapter_name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the other factors of layers of which one has another shape than the model's.

    PEFT raises its error for that one, or, told to ignore it (`ignore_mismatched_sizes`), leaves it as it was drawn.
    The layer then keeps its whole start, at which it changes nothing: it is no mixture of trained and random factors.
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
    """The layer's name in that of one of its tensors."""
    return name.removeprefix(PEFT_PREFIX).partition(".dual_lora_")[0]


def _foreign(what: str, names: list[str]) -> str:
    return (
        f"{what} holds no factors of a Dual LoRA adapter; its tensors: {', '.join(names[:2]) or 'none at all'}. Is it "
        "an adapter of another type, or another file under this name?"
    )


def _some(names: list[str], what: str = "layers") -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more {what}"
