"""Check our adapter files before transformers reads them itself, so that a damaged file raises a clear error.

Imports of `dual_lora.method` are inside functions: it needs PEFT, which cannot be imported while transformers is.
"""

import functools
import json
import os
import sys
from importlib import import_module
from typing import Any


def connect() -> None:
    """Wrap transformers' own `load_adapter`; to be called once, when its module has been imported."""
    mixin: Any = sys.modules["transformers.integrations.peft"].PeftAdapterMixin
    mixin.load_adapter = _checked_before_load(mixin.load_adapter)


def _checked_before_load(load_adapter: Any) -> Any:
    @functools.wraps(load_adapter)
    def wrapped(model: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        subfolder = (kwargs.get("adapter_kwargs") or {}).get("subfolder") or ""
        names = list(kwargs.get("adapter_state_dict") or (args[2] if len(args) > 2 and args[2] else ()))
        if _is_ours(peft_model_id, subfolder):
            names += import_module("dual_lora.method.saved").check_file(peft_model_id, subfolder)
        before = set(getattr(model, "peft_config", {}))
        result = load_adapter(model, peft_model_id, *args, **kwargs)
        for name in set(model.peft_config) - before:
            if model.peft_config[name].peft_type == "DUAL_LORA":
                has_counts = not names or any("dual_lora_left" in tensor for tensor in names)
                misfits = [key for key, *_ in getattr(result, "mismatched_keys", ())]
                import_module("dual_lora.method.loaded").finish_loading(model, name, has_counts, misfits)
        return result

    return wrapped


def _is_ours(folder: Any, subfolder: str) -> bool:
    path = os.path.join(folder, subfolder, "adapter_config.json") if isinstance(folder, str | os.PathLike) else ""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("peft_type") == "DUAL_LORA"
    except (ValueError, AttributeError, RecursionError):  # damaged: transformers says so itself
        return False
