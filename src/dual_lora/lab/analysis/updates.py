"""The updates of a model's layers, by layer name, for any PEFT method and for full fine-tuning.

A layer's name is that of the module in the base model ("model.layers.0.self_attn.q_proj"), so that runs of different
methods meet on it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dual_lora.core.reference import Factors
from dual_lora.lab.analysis.matrices import Dense, Difference, Factored, Matrix, Saved, Update
from dual_lora.lab.data.batches import unwrapped
from dual_lora.lab.errors import UserError, described

ROUNDING = 2 * torch.finfo(torch.float32).eps
GROUPS = {"magnitude": ("dual_lora_A", "dual_lora_B"), "direction": ("dual_lora_C", "dual_lora_D")}


class LayerUpdate(NamedTuple):
    """A layer's update at one moment. strength: the warm-up's λ, by which `update` is not yet multiplied."""

    update: Update
    strength: float = 1.0


def adapted_layers(model: Any) -> dict[str, Any]:
    """The tuner layers of a PEFT model by their names in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = unwrapped(model)
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and not _is_inner(name, base)
    }


def _is_inner(name: str, base: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not (parent := name.rpartition(".")[0]):
        return False
    own, outer = (getattr(base.get_submodule(n), "parameter_name", None) for n in (name, parent))
    return isinstance(base.get_submodule(parent), BaseTunerLayer) and own == outer  # else of another parameter


def snapshot(model: nn.Module, adapter: str = "default") -> dict[str, LayerUpdate]:
    """Return the adapter's present update of every layer; it does not change when the model trains on.

    Holds copies of the adapter's own tensors, never of a weight. Dual LoRA's updates are at full strength, with the
    warm-up's λ with them: the pattern of signs and zeros is there before λ lets it act. Layers whose update is not
    one matrix (`is_matrix`) are left out.
    """
    from dual_lora.method.layer import DualLoraLayer

    result = {}
    for name, layer in adapted_layers(model).items():
        if not is_matrix(layer):
            continue
        if isinstance(layer, DualLoraLayer) and adapter in layer.scaling:
            full = layer.adapter(adapter)
            copies = Factors(*(f.detach().clone() for f in full.factors))
            matrix = Factored(full._replace(factors=copies, scale=torch.full_like(full.scale, layer.strength(adapter))))
            result[name] = LayerUpdate(partial(_itself, matrix), float(layer.warmup_factor(adapter)))
        elif adapter in getattr(layer, "active_adapters", []):
            tensors = {n: p.detach().clone() for n, p in _own_tensors(layer)}
            result[name] = LayerUpdate(partial(_merge_difference, layer, tensors, adapter))
    return result


def is_matrix(layer: Any) -> bool:
    """Whether the update is one matrix: not of experts [E, O, I], nor of projections of unequal widths stacked."""
    inner, weight = _adapter_layers(layer)
    experts = hasattr(layer, "parameter_name") and weight is not None and weight.dim() > 2
    return not experts and bool(getattr(inner, "_qkv_same_embed_dim", True))


def _adapter_layers(layer: Any) -> tuple[Any, Tensor | None]:
    """The module that an adapter is on, and the parameter that it changes."""
    inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return inner, getattr(inner, getattr(layer, "parameter_name", "weight"), None)


def _itself(matrix: Matrix) -> Matrix:
    return matrix


def base_matrix(layer: Any) -> Matrix | None:
    """The base weight as [O, I], or None where it is no plain tensor (quantised; fp8, with its scales elsewhere)."""
    inner, weight = _adapter_layers(layer)
    if weight is None or not weight.dtype.is_floating_point or weight.dtype.itemsize == 1 or weight.dim() < 2:
        return None
    return Dense(_matrix(inner, weight))


def _matrix(inner: nn.Module, weight: Tensor) -> Tensor:
    """A stored weight as [O, I]: transformers' Conv1D keeps the transpose."""
    return weight.t() if type(inner).__name__ == "Conv1D" else weight


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if not name.startswith("base_layer."):
            yield name, tensor


def _merge_difference(layer: Any, tensors: dict[str, Tensor], adapter: str) -> Matrix:
    """Merged weight - base weight, by the layer's own merge, with the adapter's tensors as they were.

    `get_delta_weight` is the update for some methods and something else for others (DoRA leaves the magnitudes out,
    OFT gives a rotation); what merging does is what the adapter does. In fp64, so that the base rounds nothing away;
    changes within fp32's rounding of the weight count as none, or a DoRA that has not moved would seem to.
    """
    now = {n: t.data for n, t in _own_tensors(layer)}
    inner = layer.get_base_layer()
    weight = inner.weight
    original, bias = weight.data, getattr(inner, "bias", None)
    kept_bias = None if bias is None else bias.data.clone()
    try:
        for name, tensor in _own_tensors(layer):
            tensor.data = tensors[name].to(tensor.device)
        if not original.dtype.is_floating_point:
            with torch.no_grad():
                return Dense(_matrix(inner, layer.get_delta_weight(adapter)))
        weight.data = original.double()
        with torch.no_grad():
            layer.merge(adapter_names=[adapter])
            change = inner.weight.data.double() - original.double()
            change.masked_fill_(change.abs() <= ROUNDING * original.abs(), 0)
            return Dense(_matrix(inner, change).float())
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{type(layer).__name__} of {type(layer).__module__} can neither be merged nor give its update: "
            f"{described(error, Exception)}"
        ) from error
    finally:
        weight.data = original
        inner.weight = weight
        if bias is not None:
            bias.data = kept_bias
        layer.merged_adapters.clear()
        for name, tensor in _own_tensors(layer):
            tensor.data = now[name]


@contextmanager
def full_updates(files: list[Any], base: Any, names: list[str] | None = None) -> Iterator[dict[str, LayerUpdate]]:
    """The updates of full fine-tuning: saved weights minus the base model's, while the files are open.

    files: the safetensors files of one state. base: the untrained model, with an adapter on it or without.
    names: the layers to look at; left out, all linear ones.
    """
    from safetensors import safe_open

    plain = unwrapped(base)
    where: dict[str, Any] = {}
    result = {}
    with ExitStack() as stack:
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            where |= dict.fromkeys(opened.keys(), opened)
        for name in linear_layers(plain) if names is None else names:
            key = f"{name}.weight"
            if key not in where:
                raise UserError(f"{files[0].parent} holds no weight {key}: is it of another model?")
            module: Any = plain.get_submodule(name)
            old = base_matrix(module)
            if old is None:
                raise UserError(f"The base weight {key} is quantised: full fine-tuning cannot be compared with it.")
            inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            saved = Saved(where[key], key, old.device, transposed=type(inner).__name__ == "Conv1D")
            result[name] = LayerUpdate(partial(Difference, saved, old))
        yield result


def linear_layers(base: Any) -> list[str]:
    """The layers that "all-linear" adapts: every linear layer but the output layer."""
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    heads = ("classifier", "score", "lm_head")
    return [
        name
        for name, module in base.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not output
        and not name.startswith(heads)
    ]
