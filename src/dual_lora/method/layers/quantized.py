"""Dual LoRA on quantised linear layers, by PEFT's generic QuantizationBackend.

Where the base's forward is the dequantised product, one product with the composed weight replaces it, and the operator
dequantises a block of rows at a time: the whole weight never stands in memory. Where the base computes something else
(int8 activations, a kernel without dequantisation), its forward is kept and the adapter's product is added.

A merge dequantises, adds and quantises again (`merge_error`); unmerge puts the old weight back, bit for bit.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.utils.quantization_utils import (
    Bnb4bitBackend,
    ForwardOnlyQuantizationBackend,
    HqqBackend,
    QuantizationBackend,
    TorchaoBackend,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor, nn

from ..._warning import warn
from ...core import dispatch
from ...core.dispatch import autocast_dtype
from ...core.handle import Handle, handle
from ...core.op import through_rows
from ...core.traced import is_exporting
from ..cache import composed_weights
from ..config import DualLoraConfig
from ..layer import Linear
from .quantized_rows import row_source, undo_packing_for_cpu

# Stands for a missing `get_apply_tensor_subclass` (the model was quantised without transformers): then no merge.
_UNKNOWN = object()


class QuantizedLinear(Linear):
    """Dual LoRA on a linear layer that a quantisation library has made."""

    reads_foreign_tensors = True
    function = ""  # the library's kernels are in its place anyway

    supports_sharded_weight = False

    def __init__(self, base_layer: nn.Module, *args: Any, quantization_backend: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.quantization_backend: Any = quantization_backend
        self.merge_error: float | None = None  # ‖requantised - exact‖ / ‖ΣΔW‖ of what is merged
        self._quantised_original: Any = None
        self._handle = self._new_handle()

    @torch.inference_mode(False)
    def _new_handle(self) -> Handle:
        """Make a handle that opens the weight at each pass, because libraries repack and replace it."""
        base: Any = self.base_layer
        self._opened = (base,)  # in a tuple, or it would be a second child
        return handle(partial(row_source, base, self.quantization_backend), (base.out_features, base.in_features))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_handle", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = self._new_handle()  # a copy has a weight of its own

    @property
    def _base_was_exchanged(self) -> bool:
        return self.base_layer is not self._opened[0] and not self.merged_adapters

    @torch._dynamo.disable
    def _follow_base(self) -> None:
        """Read from another base layer, which a script has put in the first one's place: one that it quantised in
        another way, or one with the full weights, by which this becomes an ordinary linear layer."""
        composed_weights.drop(self)
        backend = find_backend(self.get_base_layer())
        if backend is None:
            del self._handle, self._opened
            self.__class__ = Linear  # type: ignore[assignment]
            return
        if type(backend) is not type(self.quantization_backend):
            self.quantization_backend = backend
        self._handle = self._new_handle()

    def _matrix_shape(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        return base.out_features, base.in_features

    # Forward.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As for every layer; raises NotImplementedError where an exported graph would have to dequantise."""
        if self._base_was_exchanged:
            self._follow_base()
            return type(self).forward(self, x, *args, **kwargs)
        if is_exporting() and not isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            raise NotImplementedError(
                f"A {self.quantization_backend.backend_name} layer cannot be exported with Dual LoRA on it: the graph "
                "would need the library's dequantisation. Load the base model in bf16 or fp32, load the adapter on it, "
                "and export that, merged (`merge_and_unload()`) or not; then quantise with the target's own tools."
            )
        return super().forward(x, *args, **kwargs)

    def _is_plain(self) -> bool:
        """As for every layer, where the base's forward is x times the dequantised weight."""
        # torch 2.6 compiles no `A | B` in here.
        known = isinstance(self.quantization_backend, (Bnb4bitBackend, HqqBackend, TorchaoBackend))
        own = self._quantises_activations() or self._pre_scale() is not None
        return super()._is_plain() and known and not own

    @property
    def forwards(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (type(self.base_layer).forward,)  # whatever the library has put there

    def _quantises_activations(self) -> bool:
        weight: Any = self.base_layer.weight if isinstance(self.quantization_backend, TorchaoBackend) else None
        named = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "activation_quantization"))
        return named or "Activation" in type(weight).__name__

    def _pre_scale(self) -> Tensor | None:
        """Return the factor by which torchao multiplies x before its product (SmoothQuant)."""
        return getattr(getattr(self.base_layer, "weight", None), "act_pre_scale", None)

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        base: Any = self.base_layer
        adapters = self._adapters(names)
        if not with_base:
            return self.product(x, None, None, adapters)
        given, autocast = x.dtype, autocast_dtype(x.device, x.dtype)
        if autocast is None:
            x = x.to(getattr(base, "compute_dtype", None) or x.dtype)  # the library's own, where it says so
        bias = None if base.bias is None else base.bias.to(autocast or x.dtype)
        stored = base.W_q if isinstance(self.quantization_backend, HqqBackend) else base.weight
        y = self.product(x, self._handle, bias, adapters, stored)
        return y if autocast is not None else y.to(given)

    def _base_call(self, x: Tensor, own: bool, *args: Any, **kwargs: Any) -> Tensor:
        """Call the base's forward; where the library has no backward, x gets the dequantised weight's gradient.

        Raises RuntimeError where the gradient would stop without an error.
        """
        base: Any = self.base_layer
        if self._quantises_activations() and torch.is_grad_enabled() and x.requires_grad:
            y, scale = base(x.detach(), *args, **kwargs), self._pre_scale()
            return through_rows(x if scale is None else x * scale, y, self._handle)
        y = self.quantization_backend.maybe_clone_base_result(base(x, *args, **kwargs))
        if torch.is_grad_enabled() and x.requires_grad and not y.requires_grad:
            raise RuntimeError(
                f"The base layer {type(base).__name__} passes no gradient to its input, so all adapters below it "
                "would get wrong gradients. Kernels of gptqmodel do so after a use without gradients: load "
                "the model with the backend 'gptq_torch' (AWQ: 'torch_awq'), or train before you evaluate."
            )
        return y

    # Merge.

    def merge_parameters(self) -> dict[str, Any]:
        """As for every layer, where the library keeps its codes in a weight: HQQ has none."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return {} if weight is None else {"weight": weight}

    def _write_merged(self, names: list[str], safe_merge: bool) -> None:
        if self._base_was_exchanged:
            self._follow_base()
            type(self)._write_merged(self, names, safe_merge)
            return
        backend: Any = self.quantization_backend
        if not self.merged_adapters:
            self._quantised_original = None
        if (
            self._quantised_original is None and find_backend(self.get_base_layer(), _UNKNOWN) is None
        ):  # `model.dequantize()`
            super()._write_merged(names, safe_merge)
            return
        if names and (not backend.supports_merge or self._pre_scale() is not None):
            raise ValueError(
                f"Cannot merge Dual LoRA into a {backend.backend_name} layer: its weight cannot be dequantised and "
                "quantised again here. Keep the adapter unmerged, or load the base model without quantisation, load "
                "the adapter on it and merge there."
            )
        composed_weights.drop(self)
        torch.autograd.graph.increment_version(self._handle.number)  # a graph that waits for its backward would read on
        kept = _Original.of(self) if self._quantised_original is None else self._quantised_original
        kept.restore(self)
        self._quantised_original, self.merge_error = None, None
        if names:
            with torch.no_grad():
                weight = self._weight()
                adapters = [self.adapter(name) for name in self.scaling if name in names]
                exact = dispatch.compose(weight, adapters, torch.float32)
                if safe_merge:
                    try:
                        self.refuse_broken([exact], names)
                    except ValueError:
                        self._write_merged(self.merged_adapters, safe_merge=False)
                        raise
                moved = (exact - weight).norm()
                backend.set_base_weight(self, exact.to(weight.dtype))
                kept.repair(self)
                lost = self._weight().float() - exact
                self.merge_error = float(lost.norm() / moved) if moved else 0.0
            self._quantised_original = kept
        self.merged_adapters = names

    def _weight(self) -> Tensor:
        """Return the dequantised weight, read by rows as in forward (bitsandbytes misreads matrices on some CPUs)."""
        return row_source(self.get_base_layer(), self.quantization_backend).rows(0, self._matrix_shape()[0])

    def extra_repr(self) -> str:
        """Shape and kind of quantisation."""
        return ", ".join(filter(None, (super().extra_repr(), quantization_extra_repr(self))))


class _Original(NamedTuple):
    """The state that a merge overwrites: the quantised weight itself, never one that was quantised again."""

    base: nn.Module
    weight: Any
    attributes: dict[str, Any]
    state: Any
    quant_state: Any  # of bitsandbytes, which has it on the layer as well

    @classmethod
    def of(cls, layer: QuantizedLinear) -> _Original:
        base: Any = layer.get_base_layer()
        if isinstance(layer.quantization_backend, Bnb4bitBackend):
            undo_packing_for_cpu(base)
        weight = None if isinstance(layer.quantization_backend, HqqBackend) else base.weight
        attributes = {} if weight is None else dict(vars(weight))
        state, quant_state = copy.copy(getattr(base, "state", None)), getattr(base, "quant_state", None)
        return cls(base, weight, attributes, state, quant_state)

    def restore(self, layer: QuantizedLinear) -> None:
        """Restore the quantised weight."""
        base: Any = self.base
        if self.weight is None:
            layer.base_layer = base
            return
        if base.weight is not self.weight:
            del base.weight
            base.weight = self.weight
        self.repair(layer)
        if self.state is not None:
            base.state = copy.copy(self.state)
        if self.quant_state is not None:
            base.quant_state = self.quant_state

    def repair(self, layer: QuantizedLinear) -> None:
        """Restore the old weight's attributes, which PEFT's backend changes, and the bias of HQQ's new layer."""
        if self.weight is not None:
            vars(self.weight).clear()
            vars(self.weight).update(self.attributes)
        elif layer.base_layer is not self.base:  # HQQ makes a new layer, without a bias
            layer.base_layer.bias = self.base.bias  # type: ignore[union-attr]


def find_backend(base: nn.Module, get_apply_tensor_subclass: Any = None) -> QuantizationBackend | None:
    """Return PEFT's backend for a quantised layer, None for a plain one."""
    backend = resolve_quantization_backend(base, get_apply_tensor_subclass=get_apply_tensor_subclass or _UNKNOWN)
    if isinstance(backend, TorchaoBackend) and get_apply_tensor_subclass is None:
        backend.supports_merge = False
    return backend


def dispatch_quantized(
    base: nn.Module, *args: Any, config: DualLoraConfig, get_apply_tensor_subclass: Any = None, **kwargs: Any
) -> nn.Module | None:
    """The adapted layer for a quantised linear layer, or None."""
    backend = find_backend(base, get_apply_tensor_subclass)
    if backend is None or backend.layer_type != "linear":
        return None
    if config.fan_in_fan_out:
        warn(
            f"fan_in_fan_out is set to True but the target module is a quantised linear layer "
            f"({backend.backend_name}). Setting fan_in_fan_out to False.",
            stacklevel=2,
        )
    return QuantizedLinear(*args, config=config, quantization_backend=backend, **kwargs)
