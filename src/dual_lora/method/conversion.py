"""A Dual LoRA adapter as a LoRA adapter, by PEFT's `convert_to_lora`, with what each layer loses.

ΔW = ReLU(B A) ⊙ Sign(D C) is of high rank, so a LoRA of small rank keeps a part of it: the report says how much.
The best LoRA of a rank (truncated SVD) loses ‖ΔW - B A‖ / ‖ΔW‖ in the Frobenius norm.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer import DualLoraLayer, Linear

# Above this, a LoRA that stands in for the adapter is likely to behave differently.
TOO_MUCH = 0.3
PREFIX = "base_model.model."


class LayerLoss(NamedTuple):
    """What a layer's update loses: `error` is ‖ΔW - B A‖ / ‖ΔW‖, 0 for an exact conversion and 1 for none."""

    layer: str
    rank: int
    error: float


class Conversion(NamedTuple):
    """A LoRA adapter and how close it comes, layer by layer."""

    config: Any  # LoraConfig
    state_dict: dict[str, Tensor]
    losses: list[LayerLoss]

    def __str__(self) -> str:
        width = max(len(loss.layer) for loss in self.losses)
        lines = [f"{loss.layer:<{width}}  rank {loss.rank:>4}  error {loss.error:6.1%}" for loss in self.losses]
        return "\n".join([*lines, f"{'median':<{width}}  {'':9}  error {self.median:6.1%}"])

    @property
    def median(self) -> float:
        """The middle layer's error."""
        return sorted(loss.error for loss in self.losses)[len(self.losses) // 2]


def to_lora(model: nn.Module, rank: int | float, adapter_name: str = "default") -> Conversion:
    """Convert an adapter to LoRA of a fixed rank (int), or of each layer's rank for a share of energy (float, 0 to 1).

    Warns when the median layer loses more than 30 % of its update. Raises TypeError where a layer is not linear: LoRA
    conversion in PEFT is for linear layers; merge such an adapter instead.
    """
    from peft import convert_to_lora

    config, state_dict = convert_to_lora(model, rank, adapter_name=adapter_name)
    conversion = Conversion(config, state_dict, losses(model, state_dict, adapter_name))
    if conversion.median > TOO_MUCH:
        warnings.warn(
            f"LoRA of rank {rank} loses {conversion.median:.0%} of the update of the median layer: ΔW is of high rank. "
            "Choose a larger rank, or merge the adapter (`merge_and_unload()`), which loses nothing.",
            UserWarning,
            stacklevel=2,
        )
    return conversion


def save_as_lora(path: str | Path, model: nn.Module, rank: int | float, adapter_name: str = "default") -> Conversion:
    """Convert, and write the LoRA adapter's folder, which PEFT, vLLM and others load."""
    from safetensors.torch import save_file

    conversion = to_lora(model, rank, adapter_name)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    conversion.config.save_pretrained(str(folder))
    save_file(
        {key: value.contiguous() for key, value in conversion.state_dict.items()}, folder / "adapter_model.safetensors"
    )
    return conversion


def losses(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str = "default") -> list[LayerLoss]:
    """What every layer loses in a LoRA state dict made from the model's adapter."""
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, DualLoraLayer) or adapter_name not in layer.scaling:
            continue
        A, B = _factor(state_dict, name, "A"), _factor(state_dict, name, "B")
        assert isinstance(layer, Linear)
        with torch.no_grad():
            exact = layer._matrix(layer.get_delta_weight(adapter_name))
            norm = exact.norm()
            error = float((exact - B.to(exact) @ A.to(exact)).norm() / norm) if norm else 0.0
        found.append(LayerLoss(name.removeprefix(PREFIX), A.shape[0], error))
    return found


def _factor(state_dict: dict[str, Tensor], name: str, letter: str) -> Tensor:
    for key in (f"{name}.lora_{letter}.weight", f"{PREFIX}{name}.lora_{letter}.weight"):
        if key in state_dict:
            return state_dict[key]
    raise KeyError(f"The LoRA state dict has no {letter} for the layer {name!r}.")
