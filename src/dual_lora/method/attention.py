"""Dual LoRA on nn.MultiheadAttention: input projections, packed or separate, and the output projection.

The input projections are one stacked matrix [3E, I], as nn.MultiheadAttention packs them. With separate projections
(`kdim`, `vdim`), I is the largest of the three widths and each projection uses the first columns that it has. The
output projection is an adapted linear layer of its own, below `base_layer.out_proj`.

nn.MultiheadAttention calls none of its projections: its forward runs with the composed weights in their places.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core import composing
from ..core.blocked import Adapter
from ..core.compose_op import Composed, dual_lora_weight, recomposing
from ..core.dispatch import autocast_dtype, refuse_meta
from ..core.reference import Factors
from . import sharded
from .cache import composed_weights
from .config import DualLoraConfig
from .layer import DualLoraLayer, Linear
from .swapped import swapped

PACKED = ("in_proj_weight",)
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _of_base(name: str) -> Any:
    return property(lambda self: getattr(self._base, name), doc=f"The base's `{name}`.")


class OutProjection(Linear):
    """The output projection; merged together with the attention that it belongs to."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge, without a word about what the attention has merged already."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name not in self.merged_adapters]
        if names:
            super().merge(safe_merge, names)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Unmerge, without a word about what the attention has unmerged already."""
        if self.merged:
            super().unmerge(adapter_names)


class MultiheadAttention(DualLoraLayer):
    """Dual LoRA on nn.MultiheadAttention."""

    def __init__(
        self,
        base_layer: nn.MultiheadAttention,
        adapter_name: str,
        config: DualLoraConfig,
        r1: int,
        r2: int,
        alpha: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        base_layer.out_proj = OutProjection(  # type: ignore[assignment]
            base_layer.out_proj, adapter_name, config=config, r1=r1, r2=r2, alpha=alpha, told=self.told
        )
        self._active_adapter = adapter_name
        self._update_projections(adapter_name, r1, r2, alpha, config=config)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the input projections and the output projection."""
        self._update_projections(*args, **kwargs)
        self._out.update_layer(*args, **kwargs)

    def _update_projections(self, adapter_name: str, r1: int, r2: int, alpha: float | None, config: Any) -> None:
        if config.dropout:
            self.told.once(
                f"dropout={config.dropout} has no effect on nn.MultiheadAttention (nor has LoRA's): its projections "
                "are not called one by one, so that the adapter cannot see another input."
            )
        super().update_layer(adapter_name, r1, r2, alpha, config)
        self.dual_lora_dropout[adapter_name] = nn.Identity()

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    @property
    def _out(self) -> OutProjection:
        return self._base.out_proj

    def _names(self) -> tuple[str, ...]:
        return PACKED if self._base._qkv_same_embed_dim else SEPARATE

    def _parameters_in(self) -> dict[str, Tensor]:
        return {name: getattr(self._base, name) for name in self._names()}

    def _matrix_shape(self) -> tuple[int, int]:
        shapes = [tuple(w.shape) for w in self._parameters_in().values()]
        return sum(O for O, _ in shapes), max(I for _, I in shapes)

    def _parts(self, adapter: Adapter) -> dict[str, Adapter]:
        """An adapter's share of every input projection."""
        parts, start = {}, 0
        A, B, C, D = adapter.factors
        for name, weight in self._parameters_in().items():
            O, I = weight.shape
            rows = slice(start, start + O)
            parts[name] = adapter._replace(factors=Factors(A[:, :I], B[rows], C[:, :I], D[rows]))
            start += O
        return parts

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of the stacked input projections, fp32, [3E, I]; zero where a separate projection has no columns."""
        out = torch.zeros(self.out_features, self.in_features)
        start = 0
        with torch.no_grad():
            for part in self._parts(self.adapter(adapter)).values():
                delta = composing.compose(None, [part], torch.float32)
                out[start : start + delta.shape[0], : delta.shape[1]] = delta
                start += delta.shape[0]
        return out

    # Merge: like every layer's, for one or three weights and the output projection.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the input projections and the output projection; see DualLoraLayer.merge."""
        before = list(self._out.merged_adapters)
        self._out.merge(safe_merge, self.active_adapters if adapter_names is None else adapter_names)
        try:
            super().merge(safe_merge, adapter_names)
        except ValueError:
            self._out.unmerge([name for name in self._out.merged_adapters if name not in before])
            raise

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters out of all projections, bit for bit."""
        super().unmerge(adapter_names)
        self._out.unmerge(adapter_names)

    def _write_merged(self, names: list[str], safe_merge: bool) -> None:
        composed_weights.drop(self)
        parameters = self._parameters_in()
        for weight in parameters.values():
            self._refuse_computed(weight)
        kept: Any = self._original
        originals = {name: p.data for name, p in parameters.items()} if kept is None else kept
        merged = originals
        if names:
            adapters = [self._parts(self.adapter(name)) for name in self.scaling if name in names]
            with torch.no_grad():
                merged = {
                    name: composing.compose(W, [parts[name] for parts in adapters], W.dtype)
                    for name, W in originals.items()
                }
            if safe_merge:
                self._refuse_broken(list(merged.values()), names)
        for name, parameter in parameters.items():
            self._put(parameter, merged[name])
        self._original = originals if names else None  # type: ignore[assignment]
        self.merged_adapters = names

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain attention, with the adapters merged or left out."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self._base
        base.out_proj = self._out.get_base_layer()
        return base

    # Forward.

    def _check_forward_args(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(
                "dual_lora.MultiheadAttention does not support mixed adapter batches: one attention has one weight. "
                "Run the samples of each adapter as a batch of their own."
            )
        super()._check_forward_args(x, *args, **kwargs)

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention, with the weights W + ΣΔW over the active adapters."""
        self._check_forward_args(query, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(query, *args, **kwargs)
        if self._out.merged_adapters != self.merged_adapters:
            raise ValueError(
                f"The output projection has {self._out.merged_adapters} merged, the attention itself "
                f"{self.merged_adapters}: merge and unmerge the attention, which does both."
            )
        names = self._present(self.active_adapters)
        if self.merged or not names:
            return self.base_layer(query, *args, **kwargs)
        out: Any = self._out.get_base_layer()
        for weight in (*self._parameters_in().values(), out.weight):
            sharded.refuse(self._base, weight)
            refuse_meta(query, weight)
        scale = self._loss_scale(names, query)
        parts = [self._parts(self.adapter(n)) for n in names]
        owner = self if self._base._qkv_same_embed_dim else None
        ins = {
            name: self._composed(owner, weight, [p[name] for p in parts], scale)
            for name, weight in self._parameters_in().items()
        }
        outs = {"weight": self._composed(self._out, out.weight, [self._out.adapter(n) for n in names], scale)}
        with (
            recomposing(*ins.values(), *outs.values()),
            swapped(self._base, {name: c.result for name, c in ins.items()}),
            swapped(out, {name: c.result for name, c in outs.items()}),
        ):
            return self.base_layer(query, *args, **kwargs)

    def _composed(
        self, owner: nn.Module | None, weight: Tensor, adapters: list[Adapter], scale: Tensor | None
    ) -> Composed:
        """A composed weight, kept under `owner` in inference."""
        dtype = autocast_dtype(weight.device, weight.dtype) or weight.dtype

        def make() -> Tensor:
            return dual_lora_weight(weight, adapters, scale, dtype=dtype)

        if owner is None or not self._may_keep():
            return Composed(make(), weight, adapters)
        # Parts of a factor are new views at every call; the tensor that they look at tells whether it is the same.
        factors = [f if f._base is None else f._base for a in adapters for f in a.factors]
        sources = [weight, *factors, *(a.scale for a in adapters)]
        return Composed(composed_weights.get(owner, sources, (dtype,), make), weight, adapters)

    # What PyTorch's encoder layers read off an attention.

    embed_dim, kdim, vdim, num_heads, dropout = map(_of_base, ("embed_dim", "kdim", "vdim", "num_heads", "dropout"))
    batch_first, head_dim, add_zero_attn = map(_of_base, ("batch_first", "head_dim", "add_zero_attn"))
    in_proj_weight, in_proj_bias, bias_k, bias_v = map(_of_base, ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"))
    _qkv_same_embed_dim = _of_base("_qkv_same_embed_dim")

    @property
    def out_proj(self) -> nn.Module:
        """The base's output projection."""
        return self._out.get_base_layer()

    def merge_masks(self, *args: Any, **kwargs: Any) -> Any:
        """The base's way to merge masks."""
        return self._base.merge_masks(*args, **kwargs)

    def __repr__(self) -> str:
        return "dual_lora." + super().__repr__()


def dispatch_attention(target: nn.Module, adapter_name: str, config: DualLoraConfig, **kwargs: Any) -> nn.Module | None:
    """The adapted layer for nn.MultiheadAttention, or None."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, nn.MultiheadAttention):
        return None
    return MultiheadAttention(target, adapter_name, config=config, **kwargs)  # type: ignore[arg-type]
