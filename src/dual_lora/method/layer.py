"""Dual LoRA on one layer: y = x (W + λ · α/√(r1 r2) · ReLU(B A) ⊙ Sign(D C))ᵀ + bias.

Xu et al., arXiv 2512.03402. The mathematics is in `core`. This file chooses between the fused product and the sum of
base and adapter (dropout, hooks). `factors` holds the adapters and their warm-up, `merge` writes them into the base.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._warning import warn
from ..core import dispatch
from ..core.compose_op import Composed, dual_lora_weight
from ..core.dispatch import autocast_dtype, in_dtype_of
from ..core.handle import Handle
from ..core.op import dual_lora_linear
from ..core.sampled import SampledProducts
from ..core.tokens import AUTO, EXACT
from ..core.traced import is_traced
from .cache import composed_weights
from .config import DualLoraConfig
from .factors import Adapters
from .merge import MergeLayer, is_foreign_tensor, rounds_its_weight
from .parallel import sharded
from .plain import is_plain, is_replaced, own
from .replaced import original, replaced, turn
from .scaler import loss_scale

# Up to so many rows of x, composing the weight costs more than its product, and decoding keeps the composed weight.
CACHED_ROWS = 256
# Up to so many tokens of a sequence at once are decoding, by the device's type: some that a draft model proposes, and
# elsewhere one. More are a prompt or an evaluation: then all weights of the model are composed again, because a write
# to them may have gone unnoticed.
DECODED_TOKENS = {"cpu": 16}


def _is_decoded(x: Tensor) -> bool:
    """Whether an input [batch, tokens, features] has so few tokens a sequence that the model decodes."""
    return x.shape[1] <= DECODED_TOKENS.get(x.device.type, 1)


class DualLoraLayer(MergeLayer):
    """The base class of all adapted layers: factors, warm-up, merge, and the checks of a forward pass."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DualLoraConfig, **options: Any) -> None:
        super().__init__(base_layer, options.pop("shared", None))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **options)

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if x.dtype.is_complex:
            raise ValueError(f"Dual LoRA takes real inputs, but got {x.dtype}: pass real and imaginary part apart.")
        if not kwargs or (adapter_names := kwargs.get("adapter_names")) is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _names_to_add(self) -> list[str]:
        """Return the active adapters that are not merged. If adapters are disabled, unmerges them and returns none."""
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return []
        active = self._active_adapter  # `active_adapters` would be two more calls
        names = self.known_names([active] if isinstance(active, str) else active)
        if names and torch._C._get_tracing_state() and torch.onnx.is_in_onnx_export():
            raise NotImplementedError(
                "torch.onnx.export(…, dynamo=False) knows no operator of Dual LoRA's. Export with dynamo=True, or "
                "merge the adapter first (`merge_and_unload()`)."
            )
        return names

    def _may_keep(self, x: Tensor | None = None) -> bool:
        """Whether a composed weight may be kept: while a model decodes, but not in a graph, whose constant it would be.

        x: an input that shows whether the model decodes, [batch, tokens, features]. One token a sequence is decoding in
        training mode too, because trainers generate there.
        """
        if torch.is_grad_enabled() or is_traced() or torch._C._len_torch_dispatch_stack():  # make_fx, fake tensors
            return False
        if x is not None and x.dim() == 3:
            self.shared.decoding, self.shared.several = _is_decoded(x), x.shape[1] > 1
            self.shared.longer += not self.shared.decoding
        if not self.shared.decoding or sharded.is_gathered(self):
            return False
        return not self.training or (x is not None and x.dim() == 3 and x.shape[1] == 1)

    def _cached_weight(
        self, weight: Tensor, chosen: Adapters, dtype: torch.dtype, make: Callable[[], Tensor]
    ) -> Tensor:
        """Return the cached composed weight; call `make` if there is none for this `weight` and these adapters."""
        own = [t for n in chosen for t in (*self.stored_factors(n), self.dual_lora_scale[n])]
        counts = [self.left(n) for n in chosen if self.states[n].warmup]
        extra = tuple(chosen), dtype, self.shared.longer
        return composed_weights.get(self, [weight, *own, *counts], extra, make, wholly=self.shared.several)

    def _composed(
        self, weight: Tensor | None, chosen: Adapters, operand: Tensor, keeps: bool = True, dtype: Any = None
    ) -> Composed:
        """Compose the weight for a layer that passes it to a function of its own.

        operand: the function's input, whose dtype (or autocast's) the composed weight gets, unless `dtype` is given.
        keeps: whether inference may cache the composed weight.
        """
        dtype = dtype or autocast_dtype(operand.device, operand.dtype) or operand.dtype
        matrix, adapters = None if weight is None else self._matrix(weight), [*chosen.values()]
        make = partial(dual_lora_weight, matrix, adapters, loss_scale(operand.device), dtype=dtype)
        if keeps and weight is not None and self._may_keep():
            return Composed(self._cached_weight(weight, chosen, dtype, make), matrix, adapters)
        return Composed(make(), matrix, adapters)

    def _token_share(self, names: Iterable[str]) -> float:
        """Return the share of the tokens that gradients are estimated from: the largest, as adapters share one G."""
        shares = [self.states[name].share for name in names]
        return AUTO if AUTO in shares and EXACT not in shares else max(shares)


def named_layers(model: nn.Module, adapter: str | None = None) -> dict[str, DualLoraLayer]:
    """Return the adapted layers of a model by name; with `adapter`, only those that have it."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, DualLoraLayer))
    return {name: layer for name, layer in found if adapter is None or adapter in layer.scaling}


def layers_of(model: nn.Module, adapter: str | None = None) -> list[DualLoraLayer]:
    """Return the adapted layers of a model, as `named_layers` without the names."""
    return list(named_layers(model, adapter).values())


class MapLayer(DualLoraLayer):
    """A layer whose output is linear in its weight: f(x; W + ΣΔW) = f(x; W) + Σ f(x; ΔW).

    Subclasses define `forwards` and `_map`, which computes f without calling the base layer.
    """

    supports_sharded_weight = False  # whether the weight may be sharded by tensor parallelism
    reads_foreign_tensors = False  # whether the fused product reads weights of a library's own tensor class
    forwards: tuple[Any, ...] = ()  # the forward methods of base layers that compute f and nothing else
    function = ""  # of torch.nn.functional, which those forwards call, and which `_map` would pass by

    def _is_plain(self) -> bool:
        """Whether calling the base layer only computes f(x; W), so that the fused product may replace the call."""
        return is_plain(self.base_layer, self.forwards, self.reads_foreign_tensors, self.function)

    def _has_own_forward(self) -> bool:
        """Whether the base has its own forward (a norm, a scale, a padding, other indices), or a replaced function.

        Such a forward is called with W + ΣΔW in the weight's place, which needs a plain floating-point weight.
        """
        if type(self.base_layer).forward in self.forwards and not (self.function and is_replaced(self.function)):
            return False
        weight: Any = self.base_layer._parameters.get("weight")
        if weight is None or weight.is_meta or not weight.numel() or sharded.is_sharded(weight):  # offloaded, ZeRO-3
            return False
        if rounds_its_weight(self.base_layer):
            return False
        if "_diffusers_hook" in vars(self.base_layer):  # which may load the weight only once the layer is called
            return False
        # Of a weight of its own kind a library's forward would quantise the sum again (optimum-quanto).
        return weight.is_floating_point() and weight.dtype.itemsize > 1 and not is_foreign_tensor(weight)

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        """Compute f(x; W + ΣΔW), or without the base f(x; ΣΔW)."""
        raise NotImplementedError

    def _adapter_branch(self, x: Tensor, name: str) -> Tensor:
        """f(dropout(x); ΔW)."""
        return self._map(self.dual_lora_dropout[name](x), [name], with_base=False)

    def _call_with_composed_weight(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Any:
        """The base's own forward with W + ΣΔW in its weight's place."""
        base: Any = self.base_layer
        weight = original(base, "weight")
        composed = self._composed(weight, self._adapters(names), weight, dtype=weight.dtype)
        products = SampledProducts(self._token_share(names))
        products.add(composed.result)
        # Not composed again in backward: such a forward may write into its weight (a mask), which dx has to see.
        with replaced(base, {"weight": self._from_matrix(composed.result)}), products.context():
            return base(x, *args, **kwargs)

    def _branch(self, x: Tensor, name: str, own: bool, *args: Any, **kwargs: Any) -> Tensor:
        """Return what an adapter adds to f(x; W). own: whether the base has its own forward."""
        if not own:
            return self._adapter_branch(x, name)
        x = self.dual_lora_dropout[name](x)
        return self._call_with_composed_weight(x, [name], *args, **kwargs) - self._base_call(x, own, *args, **kwargs)

    def _base_call(self, x: Tensor, own: bool, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; W), to which adapters' outputs are added. own: whether the base has its own forward."""
        if not own:
            return self.base_layer(x, *args, **kwargs)
        with turn(self.base_layer):
            return self.base_layer(x, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """f(x; W + ΣΔW) over the active adapters; for a linear layer, x [..., I] -> y [..., O]."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None) if kwargs else None
        active = self._names_to_add()
        if self._disable_adapters or (adapter_names is None and not active):
            return self.base_layer(x, *args, **kwargs)
        if not self.supports_sharded_weight:
            sharded.refuse_sharded(self.get_base_layer(), getattr(self.get_base_layer(), "weight", None))
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

        # An adapter with dropout sees another input than the base, so that it needs a product of its own. A class of
        # somebody else's (Monte Carlo dropout) may act in eval mode too.
        held: Any = self._modules
        dropouts = held["dual_lora_dropout"]._modules
        fused = [
            n
            for n in active
            if type(dropouts[n]) is nn.Identity or (type(dropouts[n]) is nn.Dropout and not dropouts[n].training)
        ]
        plain = not (args or kwargs) and self._is_plain()
        own = not plain and self._has_own_forward()
        if not (plain or own):
            fused = []
        if fused:
            y = (
                self._call_with_composed_weight(x, fused, *args, **kwargs)
                if own
                else self._map(x, fused, with_base=True)
            )
        else:
            y = self._base_call(x, own, *args, **kwargs)
        for name in active:
            if name not in fused:
                y = y + self._branch(x, name, own, *args, **kwargs).to(y.dtype)
        return y

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        """Every sample with its own adapter ("__base__": none)."""
        own = self._has_own_forward()
        y = self._base_call(x, own, *args, **kwargs)
        for name in self.known_names(sorted(set(adapter_names))):
            index = [k for k, item in enumerate(adapter_names) if item == name]
            y[index] = y[index] + self._branch(x[index], name, own, *args, **kwargs).to(y.dtype)
        return y


class Linear(MapLayer):
    """Dual LoRA on nn.Linear (weight [O, I]) and transformers' Conv1D (weight [I, O])."""

    supports_sharded_weight = samples_tokens = True
    forwards: tuple[Any, ...] = own(nn.Linear.forward, Conv1D.forward)
    function = "linear"

    def __init__(self, base_layer: nn.Module, *args: Any, fan_in_fan_out: bool = False, **kwargs: Any) -> None:
        self.fan_in_fan_out, self.merges_sharded_weight = fan_in_fan_out, not fan_in_fan_out
        super().__init__(base_layer, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may use ΔW; it is then an approximation, as ΔW is of high rank."""
        return True

    def _matrix_shape(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if isinstance(base, nn.Linear) and not base.weight.is_floating_point():  # packed, as GGUF's codes are
            return base.out_features, base.in_features
        return super()._matrix_shape()

    def _is_plain(self) -> bool:
        base: Any = self._modules["base_layer"]
        plain = is_plain(base, self.forwards, self.reads_foreign_tensors, self.function)
        return plain or sharded.takes_product(base)

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        """One product with the composed weight: x (W + ΣΔW)ᵀ + bias, or x ΣΔWᵀ."""
        if x.is_nested:
            if x.layout == torch.jagged:
                return nested_like(x, self._map(x.values(), names, with_base))
            return torch.nested.as_nested_tensor([self._map(part, names, with_base) for part in x.unbind()])
        base: Any = self.get_base_layer()
        weight = base.weight  # once: a parametrisation computes it
        if sharded.is_sharded(weight):
            return sharded.product(self, x, names, with_base)
        adapters = self._adapters(names)
        if not with_base:  # whose call may compute in another dtype than its weight has (diffusers' layerwise casting)
            return self.product(x, None, None, adapters)
        return self.product(in_dtype_of(weight, x), self._matrix(weight), base.bias, adapters, weight)

    def product(
        self, x: Tensor, weight: Tensor | Handle | None, bias: Tensor | None, chosen: Adapters, source: Any = None
    ) -> Tensor:
        """x (W + ΣΔW)ᵀ + bias; in inference by a composed weight that is kept while `source`, which W is of, stays."""
        keeps = source is not None and self._may_keep(x) and x.numel() <= CACHED_ROWS * self.in_features
        # A prompt, an evaluation or a training step begins. (Not in a graph, which would depend on the lengths.)
        begins = not torch.compiler.is_compiling() and (
            (x.ndim == 3 and not _is_decoded(x)) or (self.training and not keeps)
        )
        if begins:
            composed_weights.drop(self)
        adapters = [*chosen.values()]
        if source is None or not keeps:
            return dual_lora_linear(x, weight, bias, adapters, loss_scale(x.device), self._token_share(chosen))
        dtype = autocast_dtype(x.device, x.dtype) or x.dtype
        composed = self._cached_weight(source, chosen, dtype, partial(dispatch.compose, weight, adapters, dtype))
        return nn.functional.linear(x.to(dtype), composed, None if bias is None else bias.to(dtype))


def nested_like(x: Any, values: Tensor) -> Tensor:
    """A jagged nested tensor of the lengths of `x` with other values."""
    lengths = x.lengths() if hasattr(x, "lengths") else None
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), lengths)


def dispatch_default(base: nn.Module, *args: Any, config: DualLoraConfig, **kwargs: Any) -> nn.Module | None:
    """The adapted layer for nn.Linear and Conv1D, or None."""
    if not isinstance(base, nn.Linear | Conv1D):
        return None
    transposed = isinstance(base, Conv1D)
    if config.fan_in_fan_out != transposed:
        warn(
            f"fan_in_fan_out is set to {not transposed} but the target module is "
            f"{'`Conv1D`' if transposed else '`torch.nn.Linear`'}. Setting fan_in_fan_out to {transposed}.",
            stacklevel=2,
        )
    return Linear(*args, config=config, fan_in_fan_out=transposed, **kwargs)
