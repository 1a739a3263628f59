"""PyTorch's encoder layers, in inference, read the weights off their children and leave the children's forward out.

An adapter below them would be the base without a word: the fast path is off while there is one.
"""

from __future__ import annotations

from torch import nn

from .layer import DualLoraLayer

# What each module looks at before it takes its fast path, and nowhere else.
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


def set_fast_paths(model: nn.Module) -> None:
    """Switch fast paths off above adapted layers, and on again where there is none any more."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind):
                kept = vars(module)
                kept.setdefault("_dual_lora_switch", kept.get(switch, False))
                adapted = any(isinstance(m, DualLoraLayer) for m in module.modules())
                setattr(module, switch, False if adapted else kept["_dual_lora_switch"])
