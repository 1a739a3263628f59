"""Modules of PyTorch that read the weights off their children and leave the children's forward out.

An adapter below them would be the base, without a warning. Encoder layers do so in inference alone: that is switched
off while an adapter is below them. The others are given the composed weight to read.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core.compose_op import also_recompose
from .layer import DualLoraLayer, Linear

# What each module looks at before it takes its fast path, and nowhere else.
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_READERS = tuple(getattr(nn, name) for name in ("MultiheadAttention", "LinearCrossEntropyLoss") if hasattr(nn, name))


def set_fast_paths(model: nn.Module) -> None:
    """Switch fast paths off above adapted layers, and on again where there is none any more."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind):
                kept = vars(module)
                kept.setdefault("_dual_lora_switch", kept.get(switch, False))
                adapted = any(isinstance(m, DualLoraLayer) for m in module.modules())
                setattr(module, switch, False if adapted else kept["_dual_lora_switch"])


def is_read(parent: nn.Module, layer: nn.Module) -> bool:
    """Whether this linear layer is one whose weight its parent reads in place of calling it."""
    return isinstance(parent, _READERS) and type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)


class ReadLinear(Linear):
    """Dual LoRA on a linear layer whose weight is read. An attention merges its output projection itself."""

    takes_dropout = False

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Not: a LoRA layer in this place would be the base, for nobody calls it."""
        return False

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge, without a warning about what the attention has merged already."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name not in self.merged_adapters]
        if names:
            super().merge(safe_merge, names)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Unmerge, without a warning about what the attention has unmerged already."""
        if self.merged:
            super().unmerge(adapter_names)

    @property
    def weight(self) -> Tensor:
        """W + ΣΔW over the active adapters."""
        names = self._at_work()  # first: it may take a merged update out of the weight
        weight: Any = self.get_base_layer().weight
        if not names:
            return weight
        return also_recompose(self._composed(weight, self._adapters(names), weight))
