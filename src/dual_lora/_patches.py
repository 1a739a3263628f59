"""The list of all changes that this package makes to other libraries, with the reason and the upstream fix for each.

A change is made as soon as the library's own module has been imported, so that importing this package imports none of
them.

What the list does not have: hooks that a library offers (PyTorch's of optimizers, of operators and of decompositions;
`LoraLayer.register` of Python's abstract classes); `re._MAXCACHE`, raised where an adapter's patterns would not fit
(`verify/patterns.py`); the filter of one warning that is untrue here (`method/layers/read.py`); and gguf's
reader, which the laboratory replaces while it reads a file (`lab/model/read_gguf.py`).
"""

from functools import partial
from importlib import import_module
from typing import NamedTuple

from ._on_import import when_imported


class Patch(NamedTuple):
    """A change of another library."""

    after: str  # the module after whose import the change is made
    function: str  # the function of this package that makes it: module:name
    changes: tuple[str, ...]  # what is changed: module:attribute
    why: str
    until: str  # the upstream change that would make it unnecessary


REGISTER = "dual_lora.method.registration:register"

PATCHES = (
    Patch(
        "peft",
        REGISTER,
        ("peft.utils:PeftType.DUAL_LORA",),
        "PEFT takes methods by a name in its enum alone.",
        "PEFT: `register_peft_method` adds the name",
    ),
    Patch(
        "peft",
        REGISTER,
        (
            "peft.utils.hotswap:hotswap_adapter_from_state_dict",
            "peft.utils.hotswap:prepare_model_for_compiled_hotswap",
            "peft.utils.hotswap:CONFIG_KEYS_TO_CHECK",
        ),
        "Swapping adapters is written for LoRA's factors.",
        "PEFT: hotswap asks the tuner",
    ),
    Patch(
        "peft",
        REGISTER,
        ("peft:PeftModel.create_or_update_model_card",),
        "Whoever downloads an adapter has to know which package it needs.",
        "PEFT: a tuner says what its card adds",
    ),
    Patch(
        "peft",
        REGISTER,
        tuple(f"torch.amp:GradScaler.{name}" for name in ("__init_subclass__", "scale")),
        "The clip acts on values of gradients, which a scaler multiplies; nothing in backward says by what.",
        "PyTorch: the factor on the loss can be asked for in backward",
    ),
    Patch(
        "transformers.integrations.peft",
        "dual_lora._transformers:connect",
        ("transformers.integrations.peft:PeftAdapterMixin.load_adapter",),
        "transformers reads adapter files itself, and says nothing of a damaged one.",
        "transformers: `load_adapter` loads by PEFT's function",
    ),
    Patch(
        "deepspeed.runtime.engine",
        "dual_lora.method.parallel.deepspeed:connect",
        tuple(
            f"deepspeed.runtime.engine:DeepSpeedEngine.{name}" for name in ("__init__", "backward", "_take_model_step")
        ),
        "ZeRO steps flattened copies, which no hook of PyTorch's optimizers sees.",
        "DeepSpeed: a hook after a step",
    ),
    Patch(
        "torch._inductor.lowering",
        "dual_lora.core.decompositions:keep_in_inductor",
        (),
        "Where CI is set, Inductor refuses operators that have a decomposition.",
        "PyTorch: `make_fallback` refuses its own operators alone",
    ),
    Patch(
        "torch.utils.flop_counter",
        "dual_lora.core.flops:register",
        (),
        "To PyTorch's counter of operations an operator that it does not know counts nothing.",
        "PyTorch: an operator brings its formula",
    ),
    Patch(
        "diffusers.utils.state_dict_utils",
        "dual_lora.method.diffusers_files:connect_conversion",
        ("diffusers.utils.state_dict_utils:convert_state_dict_to_diffusers",),
        "diffusers renames LoRA's keys alone.",
        "diffusers: keys by the adapter's configuration",
    ),
    Patch(
        "diffusers.utils.peft_utils",
        "dual_lora.method.diffusers_files:connect_loading",
        ("diffusers.utils.peft_utils:_create_lora_config",),
        "diffusers makes a LoraConfig of every file.",
        "diffusers: configurations by `peft_type`",
    ),
    Patch(
        "diffusers.hooks.group_offloading",
        "dual_lora.method.diffusers_files:connect_group_offloading",
        ("diffusers.hooks.group_offloading:_find_parent_module_in_module_dict",),
        "diffusers loads a parameter when the module that holds it is called, and a dictionary never is.",
        "diffusers: the nearest module that has a forward",
    ),
)


def _call(function: str) -> None:
    module, _, name = function.partition(":")
    getattr(import_module(module), name)()


def connect() -> None:
    """Register every change, to be made when its library has been imported."""
    for after, function in dict.fromkeys((patch.after, patch.function) for patch in PATCHES):
        when_imported(after, partial(_call, function))
