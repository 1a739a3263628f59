"""Dual LoRA (Xu et al., arXiv 2512.03402) as a Hugging Face PEFT method.

>>> from peft import get_peft_model                          # doctest: +SKIP
>>> from dual_lora import DualLoraConfig                     # doctest: +SKIP
>>> model = get_peft_model(model, DualLoraConfig(r=16))      # doctest: +SKIP

Importing this package registers the method with PEFT (at once, or as soon as PEFT is imported), so that saved adapters
load by PEFT's and transformers' own functions. The names below are imported when they are first used.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._on_import import when_imported
from ._patches import connect
from ._tested import check_peft

if TYPE_CHECKING:
    from ._warning import DualLoraWarning
    from .core.decompositions import decompositions
    from .core.op import dual_lora_linear
    from .core.reference import Adapter, Factors, Form, delta_weight
    from .method.cache import composed_weights
    from .method.callback import DualLoraCallback
    from .method.config import DualLoraConfig
    from .method.conversion import convert_to_lora, save_as_lora
    from .method.fused import fuse, unfuse
    from .method.layer import DualLoraLayer
    from .method.model import DualLoraModel
    from .method.scaler import grad_scaler
    from .method.warmup import count_step
    from .verify.callback import VerifyAdapter

__version__ = "0.2.0"

_HOMES = {
    "DualLoraConfig": ".method.config",
    "DualLoraModel": ".method.model",
    "DualLoraLayer": ".method.layer",
    "DualLoraWarning": "._warning",
    "DualLoraCallback": ".method.callback",
    "composed_weights": ".method.cache",
    "grad_scaler": ".method.scaler",
    "count_step": ".method.warmup",
    "VerifyAdapter": ".verify.callback",
    "convert_to_lora": ".method.conversion",
    "save_as_lora": ".method.conversion",
    "fuse": ".method.fused",
    "unfuse": ".method.fused",
    "dual_lora_linear": ".core.op",
    "decompositions": ".core.decompositions",
    "Adapter": ".core.reference",
    "Factors": ".core.reference",
    "Form": ".core.reference",
    "delta_weight": ".core.reference",
}

__all__ = [
    "Adapter",
    "DualLoraCallback",
    "DualLoraConfig",
    "DualLoraLayer",
    "DualLoraModel",
    "DualLoraWarning",
    "Factors",
    "Form",
    "VerifyAdapter",
    "__version__",
    "composed_weights",
    "convert_to_lora",
    "count_step",
    "decompositions",
    "delta_weight",
    "dual_lora_linear",
    "fuse",
    "grad_scaler",
    "save_as_lora",
    "unfuse",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    # With both Python names the like: "Did you mean: 'DualLoraConfig'?"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted(__all__)


when_imported("peft", check_peft)
connect()
