"""Whether calling a layer is PyTorch's own computation and nothing else, so that the fused product may replace it.

Not so where somebody hooks the layer, or has replaced its forward, or the function that forward calls: noise, simulated
quantisation and counters come in that way, and would be passed by.
"""

from types import BuiltinFunctionType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .merge import is_foreign_tensor

_OF_ALL_MODULES = _PRE, _POST, _BACK_PRE, _BACK = (
    *(nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks),
    *(nn.modules.module._global_backward_pre_hooks, nn.modules.module._global_backward_hooks),
)
_number_of_modes = torch._C._len_torch_function_stack
_number_of_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_dynamo = torch.compiler.is_dynamo_compiling


def own(*forwards: Any) -> tuple[Any, ...]:
    """Return those forwards that are the library's own, and not what was put into its class before this import."""
    return tuple(f for f in forwards if home(f).startswith(("torch.nn.modules.", "transformers.pytorch_utils")))


def home(function: Any) -> str:
    """Return the name of the module that a function's code is from, which `functools.wraps` does not change."""
    return str(getattr(function, "__globals__", {}).get("__name__", ""))


_FUNCTIONS = vars(nn.functional)
_OWN_FUNCTIONS = {  # None for one that was replaced before this import
    name: found if type(found) is BuiltinFunctionType or home(found) == "torch.nn.functional" else None
    for name, found in _FUNCTIONS.items()
    if name in ("linear", "embedding")
}


def is_replaced(function: str) -> bool:
    """Whether somebody's own code replaces a function of `torch.nn.functional`, or a mode acts on its calls."""
    found = _FUNCTIONS[function]
    if found is not _OWN_FUNCTIONS[function] and not home(found).startswith("deepspeed."):  # which takes less memory
        return True
    if torch.compiler.is_compiling():
        return False
    modes = [torch._C._get_function_stack_at(k) for k in range(_number_of_modes())]
    if _number_of_dispatch_modes():  # which see our operators in place of the product
        modes += _get_current_dispatch_mode_stack()
    # Torch's own set a default device, and ours counts memory.
    return any(not type(mode).__module__.startswith(("torch.", "dual_lora.")) for mode in modes)


def is_plain(base: Any, forwards: tuple[Any, ...], reads_foreign_tensors: bool = False, function: str = "") -> bool:
    """Whether calling a layer is one of these forwards and nothing else.

    reads_foreign_tensors: whether the weight may be a library's own kind of tensor.
    function: of torch.nn.functional, which those forwards call.
    """
    return (
        type(base).forward in forwards
        and (reads_foreign_tensors or not is_foreign_tensor(base._parameters.get("weight")))
        and "forward" not in base.__dict__  # accelerate's hooks sit there
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not ((_PRE or _POST or _BACK_PRE or _BACK) and _somebody_hooks_all())
        and (
            not function
            or (
                _FUNCTIONS[function] is _OWN_FUNCTIONS[function]
                and not _number_of_modes()
                and (_is_dynamo() or not _number_of_dispatch_modes())
            )
            or not is_replaced(function)
        )
    )


def _somebody_hooks_all() -> bool:
    """Whether a hook of all modules may change what a layer gets or gives. PyTorch's own, of its counters, look on."""
    hooks = (hook for hooks in _OF_ALL_MODULES for hook in hooks.values())
    return any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks)
