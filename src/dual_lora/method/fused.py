"""PEFT's own HiRA and LoHa layers, computed by this package's product: the same results in less time and memory.

    HiRA   y = x (W + Σ W ⊙ B A)ᵀ + bias                  LoHa   y = x (W + Σ α/r · (w1_a w1_b) ⊙ (w2_a w2_b))ᵀ + bias

PEFT computes x Wᵀ and x ΔWᵀ apart, and keeps matrices of the weight's size for backward. Here both are one product with
a weight that is composed by tiles, and nothing of its size is kept.

`fuse` gives a layer another class, which differs in its forward alone: parameters, files, merging and switching stay
PEFT's, and so does a call in which something asks for it (dropout, hooks, a base that trains, a weight that is
sharded). Below fp32, W + ΔW is rounded once, to the dtype of x, where PEFT adds two products. PEFT's LoHa draws a
random number in every call, which decides nothing without dropout; here none is drawn. `unfuse` gives the class back.

HiRA: Huang et al., ICLR 2025. LoHa: Hyeon-Woo et al., "FedPara", arXiv 2108.06098.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.hira import layer as hira
from peft.tuners.loha import layer as loha
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._warning import warn
from ..core.compose_op import Composed, dual_lora_weight, recompose_in_backward
from ..core.dispatch import autocast_dtype
from ..core.op import dual_lora_linear
from ..core.reference import Adapter, Factors, Form
from ..core.tokens import AUTO, EXACT
from .config import Sampling
from .config_checks import check_share
from .parallel import sharded
from .plain import is_plain, own

HIRA = Form(magnitude="identity", direction="weight")
LOHA = Form(magnitude="identity", direction="identity")


class _FusedLayer:
    """A PEFT layer whose forward uses the composed weight unless it has to be PEFT's own (`_fallback_reason`)."""

    forwards: tuple[Any, ...]
    frozen_base = False  # whether the base's weight must not train
    base_layer: Any
    disable_adapters: bool
    merged: bool
    active_adapters: list[str]
    _fused_share: float = EXACT

    def _has(self, name: str) -> bool:
        """Whether the layer has an adapter."""
        raise NotImplementedError

    def _has_dropout(self, name: str) -> bool:
        """Whether an adapter has dropout of any kind."""
        raise NotImplementedError

    def _adapter(self, name: str) -> Adapter:
        """An adapter as the operator takes it."""
        raise NotImplementedError

    def _product(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        """f(x; W + ΣΔW)."""
        raise NotImplementedError

    def _fallback_reason(self, names: list[str]) -> str | None:
        """Return why the forward of these adapters has to be PEFT's own for every input; None if it does not."""
        base = self.base_layer
        if not is_plain(base, self.forwards, function="linear"):
            return f"its base {type(base).__name__} is quantised, has hooks, or a forward of its own"
        weight = base.weight
        if sharded.is_sharded(weight) or weight.dtype.itemsize == 1:
            return f"its weight is sharded, or of {weight.dtype}, which is too coarse for a sum"
        if self.frozen_base and weight.requires_grad:
            return "its base trains, and the update is a multiple of it"
        if getattr(base, "padding_mode", "zeros") != "zeros":
            return f"padding_mode={base.padding_mode!r}, which PEFT's update has not"
        if any(map(self._has_dropout, names)):
            return "dropout, under which the update sees another input, or is another, than without"
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        names = [] if self.disable_adapters or self.merged else [n for n in self.active_adapters if self._has(n)]
        if not names or args or kwargs or not self._accepts(x) or self._fallback_reason(names):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return self._product(x, [self._adapter(name) for name in names])

    def _accepts(self, x: Tensor) -> bool:
        """Whether the fused product takes x: floating-point, in the weight's dtype or under autocast."""
        weight = self.base_layer._parameters.get("weight")
        if weight is None or weight.is_meta or not weight.numel():  # hooks load it
            return False
        floats = x.is_floating_point() and not x.is_nested
        return floats and (x.dtype == weight.dtype or autocast_dtype(x.device, x.dtype) is not None)


def _scale(x: Tensor, value: float) -> Tensor:
    # fp32, as in PEFT: fp64 layers then give PEFT's results too.
    return torch.full((), value, dtype=torch.float32, device=x.device)


class FusedHiraLinear(_FusedLayer, hira.Linear):
    """HiRA on nn.Linear and transformers' Conv1D."""

    forwards = own(nn.Linear.forward, Conv1D.forward)
    frozen_base = True

    def _has(self, name: str) -> bool:
        return name in self.hira_A

    def _has_dropout(self, name: str) -> bool:
        return isinstance(self.hira_dropout[name], nn.Dropout)

    def _adapter(self, name: str) -> Adapter:
        A, B = self.hira_A[name], self.hira_B[name]
        return Adapter(Factors(A, B, A[:0].detach(), B[:, :0].detach()), _scale(A, 1.0), HIRA)

    def _product(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        base = self.base_layer
        weight = base.weight.mT if self.fan_in_fan_out else base.weight
        return dual_lora_linear(x, weight, base.bias, adapters, share=self._fused_share)


class _FusedLoHa(_FusedLayer):
    hada_t1: nn.ParameterDict

    def _has(self, name: str) -> bool:
        return name in self._available_adapters  # type: ignore[attr-defined]

    def _has_dropout(self, name: str) -> bool:
        return bool(self.rank_dropout[name] or self.module_dropout[name])  # type: ignore[attr-defined]

    def _adapter(self, name: str) -> Adapter:
        layer: Any = self
        factors = Factors(*(d[name] for d in (layer.hada_w1_b, layer.hada_w1_a, layer.hada_w2_b, layer.hada_w2_a)))
        return Adapter(factors, _scale(factors.A, layer.scaling[name]), LOHA)


class FusedLoHaLinear(_FusedLoHa, loha.Linear):
    """LoHa on nn.Linear."""

    forwards = own(nn.Linear.forward)

    def _product(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        base = self.base_layer
        return dual_lora_linear(x, base.weight, base.bias, adapters, share=self._fused_share).to(x.dtype)


class _FusedLoHaConv(_FusedLoHa):
    forwards = own(nn.Conv1d.forward, nn.Conv2d.forward)

    def _fallback_reason(self, names: list[str]) -> str | None:
        if any(name in self.hada_t1 for name in names):
            return "an effective convolution (use_effective_conv2d), whose factors are no matrices"
        return super()._fallback_reason(names)

    def _product(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        base = self.base_layer
        dtype = autocast_dtype(x.device, x.dtype) or x.dtype
        weight = base.weight.flatten(1)
        composed = Composed(dual_lora_weight(weight, adapters, dtype=dtype), weight, adapters)
        with recompose_in_backward(composed):
            return base._conv_forward(x, composed.result.view(base.weight.shape), base.bias).to(x.dtype)


class FusedLoHaConv1d(_FusedLoHaConv, loha.Conv1d):
    """LoHa on nn.Conv1d."""


class FusedLoHaConv2d(_FusedLoHaConv, loha.Conv2d):
    """LoHa on nn.Conv2d."""


FUSED: dict[type[nn.Module], type[Any]] = {
    hira.Linear: FusedHiraLinear,
    loha.Linear: FusedLoHaLinear,
    loha.Conv1d: FusedLoHaConv1d,
    loha.Conv2d: FusedLoHaConv2d,
}


class Fused(NamedTuple):
    """The result of `fuse`: the layers that use this package's product, and for each other layer the reason."""

    layers: list[str]
    left: dict[str, str]


def fuse(model: nn.Module, token_sampling: Sampling = None) -> Fused:
    """Make PEFT's HiRA and LoHa layers of a model compute one product with the composed weight.

    token_sampling: as `DualLoraConfig` has it, for linear layers: the share of the tokens from which the adapters'
        gradients are estimated, "auto", or None for all of them.

    Returns the names of the layers that do, and why the others do not, of which it warns as well. Call it again for
    layers that were added since, or with another `token_sampling`. Raises ValueError for a model without a layer of
    HiRA or LoHa.
    """
    check_share("token_sampling", token_sampling)
    share = EXACT if token_sampling is None else AUTO if token_sampling == "auto" else float(token_sampling)
    theirs: dict[str, Any] = {
        name: m for name, m in model.named_modules() if isinstance(m, hira.HiraLayer | loha.LoHaLayer)
    }
    if not theirs:
        raise ValueError(
            "This model has no layer of PEFT's HiRA or LoHa: pass what `get_peft_model(model, HiraConfig(…))` returns. "
            "Dual LoRA's own layers need no `fuse`."
        )
    left: dict[str, str] = {}
    for name, layer in theirs.items():
        before = type(layer)
        ours = before if isinstance(layer, _FusedLayer) else FUSED.get(before)
        if ours is None:
            left[name] = f"PEFT's {before.__module__.split('.')[-2]}.{before.__name__} has no other form here"
            continue
        layer.__class__ = ours
        reason = layer._fallback_reason([n for n in layer._all_available_adapter_names() if layer._has(n)])
        if reason:
            layer.__class__ = _plain_class(ours)
            left[name] = reason
        else:
            layer._fused_share = share
    if left:
        some = "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3])
        more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
        warn(f"{len(left)} of {len(theirs)} layers compute as PEFT has it. {some}{more}.", stacklevel=2)
    return Fused([name for name in theirs if name not in left], left)


def unfuse(model: nn.Module) -> list[str]:
    """Restore PEFT's forward in the layers that `fuse` has changed. Returns their names."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _FusedLayer)}
    for layer in found.values():
        layer.__class__ = _plain_class(type(layer))  # type: ignore[assignment]
        vars(layer).pop("_fused_share", None)
    return list(found)


def _plain_class(ours: type[Any]) -> type[Any]:
    return next(theirs for theirs, other in FUSED.items() if other is ours)
