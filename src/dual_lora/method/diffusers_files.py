"""Patch diffusers' functions that save, load and offload an adapter, which know LoRA's names and modules only.

Scripts hold these functions by name, often from before this package was imported. So the functions' code is replaced,
not the name in their module; only the one for offloading is replaced by its name, as diffusers alone calls it.

diffusers' files without metadata have no α, so α is saved next to the factors. In a file without both, α is that of
`lora_alpha` = rank, as for LoRA.
"""

import math
import re
import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .config import DualLoraConfig
from .lora_fields import LORA_ALPHA

_MARK, _ALPHA = ".dual_lora_", ".dual_lora_alpha"
_AGAIN = ": it is damaged, or no adapter. Save it again."


def patch_in_place(function: Any, ours: str) -> Callable[..., Any]:
    """Replace the code of a function of diffusers by a call of `ours`. Returns the original function.

    ours: the name of a function of this module that takes the original function and its arguments.
    """
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    name = f"_{ours}_with_dual_lora"
    function.__globals__[name] = lambda *args, **kwargs: globals()[ours](original, *args, **kwargs)
    space: dict[str, Any] = {}
    exec(f"def asked(*args, **kwargs):\n    return {name}(*args, **kwargs)", space)
    function.__code__, function.__defaults__, function.__kwdefaults__ = space["asked"].__code__, None, None
    return original


def note_alpha(B: Any, layer: Any, adapter: str) -> None:
    """Attach a layer's α to its factor B in a state that is about to be saved, for `convert_state`."""
    if B is not None:
        state = layer.states[adapter]
        B._dual_lora_alpha = LORA_ALPHA * state.r * layer.scaling[adapter]


def convert_state(original: Callable[..., Any], state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Convert a state for `save_lora_weights`: keys of this method stay as they are, and known α are added."""
    if not any(_MARK in name for name in state):
        return original(state, *args, **kwargs)
    alphas = {
        name.partition(_MARK)[0] + _ALPHA: torch.tensor(factor._dual_lora_alpha)
        for name, factor in state.items()
        if hasattr(factor, "_dual_lora_alpha")
    }
    return {**state, **alphas}


def make_configuration(original: Callable[..., Any], state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Make the configuration of the adapter in a state, from its metadata or from the shapes of its factors."""
    if not any(_MARK in name for name in state):
        return original(state, *args, **kwargs)
    metadata = kwargs.get("metadata") or (args[1] if len(args) > 1 else None)
    if metadata:
        return DualLoraConfig(**metadata)
    if any("dual_lora_seed" in name for name in state):
        raise ValueError(
            "This file holds a Dual LoRA adapter with frozen signs but not its configuration, which the "
            "tensors alone do not determine: save the adapter with `save_pretrained`, which writes both."
        )
    noted = {name.removesuffix(_ALPHA): _number(name, state.pop(name)) for name in [*state] if name.endswith(_ALPHA)}
    ranks: dict[str, Any] = {}
    for name, factor in state.items():
        layer, _, letter = name.partition(_MARK)
        if letter in ("A", "C"):
            if factor.ndim < 2:
                raise ValueError(f"{name} has the shape {tuple(factor.shape)}, expected a matrix{_AGAIN}")
            ranks.setdefault(layer, [0, 0])[letter == "C"] = factor.shape[-2]
    if not ranks:
        raise ValueError(f"This file names layers of a Dual LoRA adapter, but has no factor A or C of any{_AGAIN}")
    usual = max(ranks.values(), key=[*ranks.values()].count)
    others = {f"^{re.escape(layer)}": pair for layer, pair in ranks.items() if pair != usual}
    alphas = {f"^{re.escape(layer)}": noted.get(layer, LORA_ALPHA * sum(pair)) for layer, pair in ranks.items()}
    return DualLoraConfig(
        r1=usual[0],
        r2=usual[1],
        alpha=LORA_ALPHA * sum(usual),
        rank_pattern=others,
        alpha_pattern=alphas,
        target_modules=sorted(ranks),
    )


def _number(name: str, tensor: Any) -> float:
    """The one number in a tensor, an α. Raises ValueError for anything else."""
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, or no finite value, expected a number{_AGAIN}")
    return value


def connect_conversion() -> None:
    """Patch `convert_state_dict_to_diffusers`; to be called once its module has been imported."""
    from diffusers.utils import state_dict_utils

    patch_in_place(state_dict_utils.convert_state_dict_to_diffusers, "convert_state")


def connect_loading() -> None:
    """Patch the function with which `load_lora_weights` makes a configuration, once its module has been imported."""
    from diffusers.utils import peft_utils

    patch_in_place(peft_utils._create_lora_config, "make_configuration")


def connect_group_offloading() -> None:
    """Let diffusers' offloading by leaves load factors when their layer is called, once its module has been imported.

    It hooks the module that holds a parameter. Factors are held by dictionaries, which nobody calls.
    """
    from diffusers.hooks import group_offloading

    find: Callable[..., str] = group_offloading._find_parent_module_in_module_dict

    @wraps(find)
    def parent(name: str, modules: Any) -> str:
        return find(name.partition(_MARK)[0], modules)

    group_offloading._find_parent_module_in_module_dict = parent  # type: ignore[assignment]
