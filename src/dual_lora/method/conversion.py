"""Convert a Dual LoRA adapter to a LoRA adapter, and report the error of each layer.

ΔW = ReLU(B A) ⊙ Sign(D C) is of high rank, so a LoRA of small rank keeps only a part of it. The best LoRA of a rank
(truncated SVD) has the error ‖ΔW - B A‖ / ‖ΔW‖ in the Frobenius norm. `peft.convert_to_lora` takes these layers too.
Here all layers get one rank and scale 1 (smaller ranks are padded with zeros), because servers of LoRA adapters have
no ranks or scales of single layers.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median_high
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .._warning import warn
from .layer import Linear, named_layers
from .saved import PEFT_PREFIX, named_as_saved

# Above this, look at the loss on data before a LoRA stands in for the adapter.
LARGE_ERROR = 0.3
WEIGHTS = "adapter_model.safetensors"


class LayerLoss(NamedTuple):
    """A layer's error ‖ΔW - B A‖ / ‖ΔW‖: 0 for an exact conversion, 1 if nothing of ΔW is kept."""

    layer: str
    rank: int
    error: float


class Conversion(NamedTuple):
    """A LoRA adapter, with the error of each layer."""

    config: LoraConfig
    state_dict: dict[str, Tensor]
    losses: list[LayerLoss]

    def __str__(self) -> str:
        lines = {loss.layer: f"rank {loss.rank:>4}  error {loss.error:6.1%}" for loss in self.losses}
        return table(lines | {"median": f"{'':9}  error {self.median:6.1%}"})

    @property
    def median(self) -> float:
        """The median layer's error."""
        return median_high(loss.error for loss in self.losses)


def table(lines: dict[str, str]) -> str:
    """Format a table with a line for each layer."""
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    advance: Callable[[int], object] = lambda layers: None,
) -> Conversion:
    """Convert an adapter, at its present λ, to the LoRA that is closest in the Frobenius norm.

    rank: the rank (int; a smaller layer takes its own full rank), or the share of ‖ΔW‖² to keep in every layer
        (float, above 0, to 1), which gives each layer a rank of its own.
    advance: called with 1 after every layer, for a progress bar.

    Warns when the median layer loses more than 30 % of its update. Raises TypeError where a layer is not linear, and
    ValueError for a rank that cannot be, for factors that are not finite, and for an adapter that changes biases: merge
    that one instead.
    """
    number = isinstance(rank, int | float) and not isinstance(rank, bool)
    if not number or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(
            f"rank is {rank!r}: give a whole number of at least 1 (the rank), or a number above 0 and up to 1.0 (the "
            "share of each update's energy to keep, e.g. 0.9)."
        )
    model = getattr(model, "_orig_mod", model)  # compiled, it has other names
    layers = _linear_layers(model, adapter_name)
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    refuse_biases(config)
    state: dict[str, Tensor] = {}
    losses = []
    for name, layer in layers.items():
        if not all(bool(f.isfinite().all()) for f in layer.factors(adapter_name)):
            raise ValueError(f"The layer {name!r} of adapter {adapter_name!r} holds NaN or infinity: it seems broken.")
        A, B, error = truncated_svd(layer._matrix(layer.get_delta_weight(adapter_name)), rank)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = A, B
        losses.append(LayerLoss(name.removeprefix(PEFT_PREFIX), A.shape[0], error))
        advance(1)
    widest = max(loss.rank for loss in losses)
    for key, factor in state.items():  # A [rank, I] or B [O, rank]
        rows, columns = (0, widest - factor.shape[1]) if "lora_B" in key else (widest - factor.shape[0], 0)
        state[key] = nn.functional.pad(factor, (0, columns, 0, rows))
    lora = LoraConfig(r=widest, lora_alpha=widest, **shared_options(model, config, layers))
    conversion = Conversion(lora, named_as_saved(state | other_saved_tensors(model, adapter_name)), losses)
    if conversion.median > LARGE_ERROR:
        what = f"LoRA of rank {rank}" if isinstance(rank, int) else f"LoRA with {rank:.0%} of the energy"
        warn(
            f"{what} loses {conversion.median:.0%} of the update of the median layer: ΔW is of high rank. "
            "Choose a larger rank, or merge the adapter (`merge_and_unload()`), which loses nothing.",
            stacklevel=2,
        )
    return conversion


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    advance: Callable[[int], object] = lambda layers: None,
) -> Conversion:
    """Convert (see `convert_to_lora`), and write the LoRA adapter's folder, which PEFT, vLLM and others load."""
    conversion = convert_to_lora(model, rank, adapter_name, advance)
    write_adapter(path, conversion.config, conversion.state_dict)
    return conversion


def truncated_svd(matrix: Tensor, rank: int | float) -> tuple[Tensor, Tensor, float]:
    """Return A [k, I], B [O, k] and the relative error of the best B A.

    rank: k, or the share of the energy ‖ΔW‖² to keep, for which k is the least rank.
    """
    with torch.no_grad():
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        energy = S.double().square().cumsum(0)
        k = rank if isinstance(rank, int) else int(torch.searchsorted(energy, rank * energy[-1])) + 1
        k = min(k, len(S))
        B, A = U[:, :k] * S[:k].sqrt(), S[:k].sqrt().unsqueeze(1) * V[:k]
        norm = matrix.norm()
        return A, B, float((matrix - B @ A).norm() / norm) if norm else 0.0


_SHARED_FIELDS = (
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "layer_replication",
    "task_type", "base_model_name_or_path", "revision",
)  # fmt: skip


def refuse_biases(config: Any) -> None:
    """Raise ValueError for an adapter that trains biases."""
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"This adapter trains biases (bias={config.bias!r}), which the converted adapter would not carry. "
            "Merge it instead (`merge_and_unload()`)."
        )


def shared_options(model: nn.Module, config: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a converted adapter's LoraConfig that both methods share."""
    same = {name: value for name in _SHARED_FIELDS if (value := getattr(config, name, None)) is not None}
    return same | {"target_modules": _targets(model, layers), "inference_mode": True}


def _targets(model: nn.Module, layers: dict[str, Any]) -> list[str] | str:
    """Return `target_modules` that match exactly these layers: short names if possible, full names, or a pattern."""
    whole, others = (
        {name.removeprefix(PEFT_PREFIX) for name in names} for names in (layers, dict(model.named_modules()))
    )
    for targets in ({name.rpartition(".")[2] for name in whole}, whole):
        if whole == {name for name in others if any(f".{name}".endswith(f".{target}") for target in targets)}:
            return sorted(targets)
    return "|".join(map(re.escape, sorted(whole)))  # PEFT matches a pattern with whole names


def other_saved_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return the tensors that PEFT saves with an adapter besides its factors: a classification head, trained tokens."""
    if not hasattr(model, "peft_config"):
        return {}
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value for key, value in state.items() if ".lora_" not in key and ".dual_lora_" not in key}


def write_adapter(path: str | os.PathLike[str], config: PeftConfig, state: dict[str, Tensor]) -> None:
    """Write an adapter folder that PEFT can load."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, folder / WEIGHTS)


def _linear_layers(model: nn.Module, adapter_name: str) -> dict[str, Linear]:
    found = named_layers(model, adapter_name)
    if not found:
        raise ValueError(f"The model has no Dual LoRA adapter {adapter_name!r}: there is nothing to convert.")
    others = [name for name, m in found.items() if not m.supports_lora_conversion(adapter_name)]
    if others:
        raise TypeError(
            f"{len(others)} of {len(found)} adapted layers are not linear, or are read and not called, and do not "
            f"support LoRA conversion, e.g. {others[0]!r} ({type(found[others[0]]).__name__}). Merge the adapter "
            "instead (`merge_and_unload()`)."
        )
    return found  # type: ignore[return-value]
