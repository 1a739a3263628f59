"""Modules that read their children's weights and do not call the children.

An adapter on such a child would have no effect until it is merged, without a warning. PyTorch's encoder layers read
weights only on their fast path in inference, which is switched off while an adapter is below them. The others read the
composed weight: PyTorch's attention and fused loss, and every module whose code reads the weight of a module below it
(`read_weights`).
"""

import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...core.compose_op import track_composed
from ..layer import DualLoraLayer, Linear
from .conv import Conv1d, Conv2d, Conv3d
from .read_weights import matches, weights_read_by

# The attribute that each module checks before it takes its fast path, and uses nowhere else.
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
_READERS = tuple(getattr(nn, name) for name in ("MultiheadAttention", "LinearCrossEntropyLoss") if hasattr(nn, name))


def set_fast_paths(model: nn.Module) -> None:
    """Switch fast paths off above adapted layers, and on again where there is no adapted layer any more."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if isinstance(module, kind):
                kept = vars(module)
                kept.setdefault("_dual_lora_switch", kept.get(switch, False))
                adapted = any(isinstance(m, DualLoraLayer) for m in module.modules())
                setattr(module, switch, False if adapted else kept["_dual_lora_switch"])


def is_read(model: nn.Module, key: str, layer: nn.Module) -> bool:
    """Whether a module above the one named `key` reads its weight, instead of calling it or in addition."""
    if type(layer) not in READ_LAYERS:
        return False
    above, parts = model, key.split(".")
    for k, part in enumerate(parts):
        path = tuple(parts[k:])
        if isinstance(above, _READERS):
            if len(path) == 1:
                return type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)
        elif any(matches(path, read) for read in weights_read_by(type(above))):  # type: ignore[arg-type]
            return True
        above = getattr(above, part)
    return False


class ReadLayer(DualLoraLayer):
    """Dual LoRA on a layer whose weight is read: its `weight` is W + ΣΔW."""

    takes_no_reads = False  # set in a batch of several adapters, for which there is no single weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers says this of every LoraLayer, which ours count as. Here it is not true.
        warnings.filterwarnings("ignore", message="Detected LoRA on TDNNLayer")

    @property
    def weight(self) -> Tensor:
        """W + ΣΔW over the active adapters. Raises TypeError in a batch in which each sample has its own adapter."""
        if self.takes_no_reads:
            raise TypeError(
                "A layer whose weight is read and not called (an attention's out_proj, a fused loss's linear layer) "
                "does not support mixed adapter batches: run the samples of each adapter as a batch of their own."
            )
        names = self._names_to_add()  # first, because it may unmerge
        weight: Any = self.get_base_layer().weight
        if not names:
            return weight
        composed = track_composed(self._composed(weight, self._adapters(names), weight))
        return self._from_matrix(composed)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: a LoRA layer in this place would have no effect, because it is not called."""
        return False


class ReadConv1d(ReadLayer, Conv1d):
    """Dual LoRA on an nn.Conv1d whose weight is read."""


class ReadConv2d(ReadLayer, Conv2d):
    """Dual LoRA on an nn.Conv2d whose weight is read."""


class ReadConv3d(ReadLayer, Conv3d):
    """Dual LoRA on an nn.Conv3d whose weight is read."""


class ReadLinear(ReadLayer, Linear):
    """Dual LoRA on a linear layer whose weight is read. An attention merges its output projection itself."""

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


READ_LAYERS: dict[type[nn.Module], type[ReadLayer]] = {
    nn.Linear: ReadLinear,
    NonDynamicallyQuantizableLinear: ReadLinear,
    nn.Conv1d: ReadConv1d,
    nn.Conv2d: ReadConv2d,
    nn.Conv3d: ReadConv3d,
}
