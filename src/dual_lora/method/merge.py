"""Exact merging: the merged weight is the rounding of W + ΣΔW of the kept original; unmerge puts the original back."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .._warning import warn
from ..core import dispatch
from ..core.compose_op import dual_lora_weight
from ..core.reference import Adapter
from .cache import composed_weights
from .checksum import checksum
from .factors import FactorsLayer
from .parallel import sharded
from .precision import warn_of_rounded
from .scaler import loss_scale
from .shared import Shared

_TORCH_TYPES = nn.Parameter, Tensor


class MergeLayer(FactorsLayer):
    """Adapters that merge into the base weight and come out of it again."""

    merges_sharded_weight = False  # whether a merge may write to a part of a weight that is sharded

    def __init__(self, base_layer: nn.Module, shared: Shared | None = None) -> None:
        super().__init__(base_layer, shared)
        self.merged_adapters: list[str] = []
        self.original_weights: dict[str, Tensor] | None = None  # the base weights' data while something is merged
        self._written: dict[str, int] = {}  # of the merged weights, by which a later change shows
        self.register_load_state_dict_pre_hook(_refuse_while_merged)
        self.register_load_state_dict_pre_hook(_warn_of_missing_factors)
        self.register_load_state_dict_pre_hook(_warn_of_rounded_factors)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        unchanged = self.original_weights is not None and self._written == self._checksums()
        result = super()._apply(fn, recurse)
        if self.original_weights is not None:
            self.original_weights = {name: fn(data) for name, data in self.original_weights.items()}
            self._written = self._checksums() if unchanged else {}
        return result

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW of an adapter at its present λ, fp32, in the layout of the stored weight.

        Differentiable in the factors, as LoRA's is: a penalty on ΔW trains them, by the method's own gradients.
        """
        return self._from_matrix(self._delta(self.adapter(adapter)))

    def _delta(self, adapter: Adapter) -> Tensor:
        """Return ΔW of an adapter, or of a part of its rows, as a matrix."""
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in adapter.factors):
            return dual_lora_weight(None, [adapter], loss_scale(adapter.factors.A.device))
        return self._compose(None, [adapter], torch.float32)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight.

        Batch and sequential merges give the same bits, in any order: the sum is always taken anew, in fp32, from the
        original weight, which is kept until `unmerge` (so a merged model holds two copies of the adapted weights).

        safe_merge: check the result for NaN and infinity first, and raise ValueError with the base untouched.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names or () if name in self.scaling]
        if names:
            self._write_merged([*self.merged_adapters, *names], safe_merge)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters out of the base weight (default: all), bit for bit."""
        if not self.merged:
            warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        gone = self.merged_adapters if adapter_names is None else adapter_names
        self._write_merged([name for name in self.merged_adapters if name not in gone], safe_merge=False)

    @torch.inference_mode(False)  # who merges in inference mode may train the model afterwards
    def _write_merged(self, names: list[str], safe_merge: bool) -> None:
        composed_weights.drop(self)
        if not self.merged_adapters:  # ReLoRA empties the list of what it merges for good, and begins anew
            self.original_weights = None
        if self._merges_with_embedding((*names, *self.merged_adapters)):
            for owner in set(self.tied.values()):
                apart = [name for name in owner.merged_adapters if name not in self.tied]
                owner._write_merged([*apart, *names], safe_merge)  # type: ignore[operator]
            self.merged_adapters = names
            return
        parameters = self.merge_parameters()
        for parameter in parameters.values():
            self.refuse_computed(parameter)
        if (originals := self.original_weights) is None:
            originals = {n: _kept(p) for n, p in parameters.items()}
        else:
            self._refuse_changed()
        merged = originals
        if names:
            merged = self._merged(originals, names)
            if safe_merge:
                self.refuse_broken([*merged.values()], names)
        for name, parameter in parameters.items():
            if sharded.is_sharded(parameter):
                with torch.no_grad():
                    parameter.to_local().copy_(merged[name])
            elif parameter.is_inference():
                parameter.data = merged[name]
            else:
                # In place, as PEFT's LoRA: a program or process that holds the same memory gets the merged weight too.
                parameter.data.copy_(merged[name])
                torch.autograd.graph.increment_version(parameter)  # a graph that waits for its backward raises an error
        self.original_weights = originals if names else None
        self._written = self._checksums() if names else {}
        self.merged_adapters = names

    def _merges_with_embedding(self, names: Iterable[str]) -> bool:
        """Whether these adapters are an embedding's, and this layer shares the embedding's weight, which merges them.

        A checkpoint may hold two weights although its configuration ties them; transformers then keeps both.
        """
        mine: Any = self.get_base_layer()
        embeddings: list[Any] = [name in self.tied and self.tied[name].get_base_layer() for name in names]
        return all(embedding and embedding.weight is mine.weight for embedding in embeddings)

    def _checksums(self) -> dict[str, int]:
        return {name: checksum(parameter) for name, parameter in self.merge_parameters().items()}

    def _refuse_changed(self) -> None:
        """Raise RuntimeError for a weight that was written to while something is merged: its change would be lost."""
        changed = [name for name, now in self._checksums().items() if now != self._written.get(name)]
        if changed:
            raise RuntimeError(
                f"The base's {changed[0]} was changed while {self.merged_adapters} were merged (it was trained, or "
                "written to), and unmerging would bring back what it was before. Unmerge first, and then change it; or "
                "keep the merged model (`unload()` after a copy of its weights)."
            )

    def refuse_computed(self, weight: Tensor) -> None:
        """Raise ValueError for a weight that a merge cannot be written to: computed at every call, foreign, or fp8."""
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"Cannot merge Dual LoRA into this {type(self.get_base_layer()).__name__}: its weight is no parameter "
                "but computed from others (weight_norm, spectral_norm or another parametrisation). Remove that first: "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or remove_weight_norm(layer)."
            )
        if is_bitnet(self.get_base_layer()):
            raise ValueError(
                "Cannot merge Dual LoRA into a BitNet layer, which would round the sum to three values or scale it, so "
                "that most of the update is lost. Serve the adapter unmerged."
            )
        if is_foreign_tensor(weight):
            raise ValueError(
                f"Cannot merge Dual LoRA into a {type(weight).__name__}, which was put in the weight's place after the "
                "adapter was added. Merge first and quantise the result, or load the adapter on a quantised base."
            )
        if weight.dtype.itemsize == 1:
            raise ValueError(
                f"Cannot merge Dual LoRA into a weight of {weight.dtype}, which is too coarse to hold the update, and "
                "may have a scale of its own. Load the base model in bf16 or fp32 and merge there."
            )

    def refuse_broken(self, merged: Sequence[Tensor], names: list[str]) -> None:
        """Raise ValueError for NaN or infinity in merged weights or in the factors of these adapters."""
        # Sign(NaN) is a number, so a NaN in C or D does not show in the weight.
        factors = [f for name in names for f in self.stored_factors(name)]
        finite = all(bool(torch.isfinite(sharded.local(t)).all()) for t in (*merged, *factors))
        if not sharded.all_processes(finite, (*self.merge_parameters().values(), *factors)):
            added = ", ".join(name for name in names if name not in self.merged_adapters)
            raise ValueError(f"NaNs detected in the merged weights. The adapter {added} seems to be broken")

    def merge_parameters(self) -> dict[str, Any]:
        """Return the parameters that a merge writes to, by name."""
        return {"weight": self._parameter()}

    def _merged(self, originals: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        """Compute the merged weights by name: W + ΣΔW, summed in the order in which the adapters were added."""
        parameter: Any = self._parameter()
        original = originals["weight"]
        if sharded.is_sharded(parameter) and not self.merges_sharded_weight:
            raise ValueError(
                f"Cannot merge Dual LoRA into a sharded {type(self.get_base_layer()).__name__}. Save the adapter, load "
                "it on the base model in one process, and merge there."
            )
        adapters = [self.adapter(name) for name in self.scaling if name in names]
        with torch.no_grad():
            if sharded.is_sharded(parameter):
                return {"weight": sharded.merged_part(parameter, original, adapters)}
            merged = self._compose(self._matrix(original), adapters, original.dtype)
            return {"weight": self._from_matrix(merged).contiguous()}

    def _compose(self, weight: Tensor | None, adapters: list[Adapter], dtype: torch.dtype) -> Tensor:
        """Compose W + ΣΔW as a matrix, by the implementation that forward uses too."""
        return dispatch.compose(weight, adapters, dtype)


def _kept(parameter: Any) -> Tensor:
    """Return a copy of a base weight, or of this process's part of it; an inference tensor itself: it is replaced."""
    if sharded.is_sharded(parameter):
        return parameter.to_local().clone()
    return parameter.data if parameter.is_inference() else parameter.data.clone()


def is_foreign_tensor(weight: Any) -> bool:
    """Whether a weight is a library's own kind of tensor, such as torchao's, and not one of torch's."""
    if weight is None or type(weight) in _TORCH_TYPES or torch.compiler.is_dynamo_compiling():
        return False
    return type(weight).__module__.partition(".")[0] != "torch"


def is_bitnet(base: Any) -> bool:
    """Whether a layer is transformers' BitNet: its forward rounds the weight to three values, or multiplies what a
    rounded one gives by its scale. In the weight's place ΔW would be rounded and scaled too, which leaves little."""
    return hasattr(base, "online_quant")


def rounds_its_weight(base: Any) -> bool:
    """Whether a layer's forward rounds its weight: BitNet, or simulated quantisation, whose part for the weight torch,
    torchao and others call `weight_fake_quant`, `weight_fake_quantizer`, `weight_quantizer`. With W, ΔW would be
    rounded too, or lost beyond the range that was seen."""
    return is_bitnet(base) or any("weight" in name and "quant" in name for name in base._modules)


def _refuse_while_merged(layer: MergeLayer, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before load_state_dict(): raise RuntimeError for a base weight that the next unmerge would overwrite, and for
    factors that are merged already."""
    merged = tuple(f"{prefix}dual_lora_B.{name}" for name in layer.merged_adapters)
    if any(key in state for key in merged):
        raise RuntimeError(
            f"Cannot load an adapter into a layer that has {layer.merged_adapters} merged: the merged weight would "
            "stay that of the old one. Call `unmerge_adapter()` first."
        )
    if layer.merged and any(key.startswith(f"{prefix}base_layer.") for key in state):
        raise RuntimeError(
            f"Cannot load a base weight into a layer that has {layer.merged_adapters} merged: unmerging would bring "
            "the old weight back. Call `unmerge_adapter()` first, and then load all again."
        )


def _warn_of_missing_factors(
    layer: MergeLayer, state: dict[str, Tensor], prefix: str, _: Any, __: bool, missing: list[str], *___: Any
) -> None:
    """Before load_state_dict(): warn of a state with some factors of an adapter, as scripts for LoRA save `lora_A` and
    `lora_B`, or with the names of a saved file. With strict=False the layer's others stay as they are. It warns once a
    load, to which the list `missing` belongs."""
    if layer.shared.last_load is missing:
        return
    for name in layer.states:
        parts = [part for part in layer.adapter_layer_names if name in getattr(layer, part)]
        absent = [key for key in (f"{prefix}{part}.{name}" for part in parts) if key not in state]
        if 0 < len(absent) < len(parts):
            layer.shared.last_load = missing
            warn(
                f"The loaded adapter lacks {' and '.join(absent)}: these keep their present values. All four factors "
                "of a layer belong together: save what has 'dual_lora_' in its name, not 'lora_A' and 'lora_B' alone.",
                stacklevel=3,
            )
            return
        if absent and (found := next((key for key in (prefix + part for part in parts) if key in state), None)):
            layer.shared.last_load = missing
            warn(
                f"The state has {found}, as a saved file names it, and the model's factor is called {found}.{name}: "
                "load_state_dict puts in neither this factor nor the others. Use peft.set_peft_model_state_dict(model, "
                "state), or append the adapter's name. (LoRA's names end in '.weight', these do not.)",
                stacklevel=3,
            )
            return


def _warn_of_rounded_factors(layer: MergeLayer, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before load_state_dict(): warn of factors that were saved in 16 or fewer bits."""
    for name in layer.states:
        warn_of_rounded((state.get(f"{prefix}{part}.{name}") for part in layer.adapter_layer_names), layer.shared)
