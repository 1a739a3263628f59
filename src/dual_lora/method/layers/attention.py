"""Dual LoRA on nn.MultiheadAttention: input projections, packed or separate, and the output projection.

The input projections are one stacked matrix [3E, I], as nn.MultiheadAttention packs them. With separate projections
(`kdim`, `vdim`), I is the largest of the three widths and each projection uses the first columns that it has. The
output projection is an adapted linear layer of its own, below `base_layer.out_proj`.

nn.MultiheadAttention calls none of its projections: its forward runs with the composed input weights in their places,
and reads the output projection's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...core import dispatch
from ...core.compose_op import recompose_in_backward
from ...core.dispatch import refuse_meta
from ...core.reference import Adapter, Factors
from ..config import DualLoraConfig
from ..layer import DualLoraLayer
from ..parallel import sharded
from ..replaced import original, replaced
from .read import ReadLinear

PACKED = ("in_proj_weight",)
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
# What PyTorch's encoder layers read off an attention.
READ_BY_ENCODERS = {
    *("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "head_dim", "dropout", "batch_first"),
    *("in_proj_weight", "in_proj_bias", "out_proj", "bias_k", "bias_v", "add_zero_attn", "merge_masks"),
}


class MultiheadAttention(DualLoraLayer):
    """Dual LoRA on nn.MultiheadAttention."""

    takes_dropout = False

    def update_layer(  # type: ignore[override]
        self, adapter_name: str, *, config: DualLoraConfig, key: str = "", **ranks: Any
    ) -> None:
        """Add an adapter to the input projections and the output projection."""
        if config.dropout:
            self.shared.warn_once(
                f"dropout={config.dropout} has no effect on nn.MultiheadAttention (nor has LoRA's): its projections "
                "are not called one by one, so that the adapter cannot see another input."
            )
        out, name = self._base.out_proj, f"{key}.out_proj"
        is_first = not isinstance(out, ReadLinear)  # the projection may have adapters that the attention lacks
        if is_first:
            self._base.out_proj = ReadLinear(out, adapter_name, config=config, shared=self.shared, key=name, **ranks)
        super().update_layer(adapter_name, config=config, key=key, **ranks)
        if not is_first:
            out.update_layer(adapter_name, config=config, key=name, **ranks)

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    @property
    def out_projection(self) -> ReadLinear:
        return self._base.out_proj

    def merge_parameters(self) -> dict[str, Any]:
        return {n: getattr(self._base, n) for n in (PACKED if self._base._qkv_same_embed_dim else SEPARATE)}

    def _matrix_shape(self) -> tuple[int, int]:
        shapes = [tuple(w.shape) for w in self.merge_parameters().values()]
        return sum(O for O, _ in shapes), max(I for _, I in shapes)

    def _parts(self, adapter: Adapter) -> dict[str, Adapter]:
        """Cut an adapter into one for each input projection."""
        adapter = adapter.with_mean_square()
        parts, start = {}, 0
        for name, weight in self.merge_parameters().items():
            O, I = weight.shape
            A, B, C, D = adapter.factors.rows(start, start + O)
            parts[name] = adapter._replace(factors=Factors(A[:, :I], B, C[:, :I], D))
            start += O
        return parts

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of the stacked input projections, fp32, [3E, I]; zero where a separate projection has no columns."""
        deltas = map(self._delta, self._parts(self.adapter(adapter)).values())
        return torch.cat([nn.functional.pad(d, (0, self.in_features - d.shape[1])) for d in deltas])

    # Merge: like every layer's, for one or three weights and the output projection.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge the input projections and the output projection; see DualLoraLayer.merge."""
        before = list(self.out_projection.merged_adapters)
        self.out_projection.merge(safe_merge, self.active_adapters if adapter_names is None else adapter_names)
        try:
            super().merge(safe_merge, adapter_names)
        except ValueError:
            self.out_projection.unmerge([name for name in self.out_projection.merged_adapters if name not in before])
            raise

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take adapters out of all projections, bit for bit."""
        super().unmerge(adapter_names)
        self.out_projection.unmerge(adapter_names)

    def _merged(self, originals: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        adapters = [self._parts(self.adapter(name)) for name in self.scaling if name in names]
        with torch.no_grad():
            return {n: dispatch.compose(W, [parts[n] for parts in adapters], W.dtype) for n, W in originals.items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain attention, with the adapters merged or left out."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base = self._base
        base.out_proj = self.out_projection.get_base_layer()
        return base

    # Forward.

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention, with the weights W + ΣΔW over the active adapters."""
        if "adapter_names" in kwargs:
            raise TypeError(
                "dual_lora.MultiheadAttention does not support mixed adapter batches: one attention has one weight. "
                "Run the samples of each adapter as a batch of their own."
            )
        self._check_forward_args(query)
        names = self._names_to_add()
        if (out_merged := self.known_names(self.out_projection.merged_adapters)) != self.merged_adapters:
            raise ValueError(
                f"The output projection has {out_merged} merged, the attention itself "
                f"{self.merged_adapters}: merge and unmerge the attention, which does both."
            )
        if not names:
            return self.base_layer(query, *args, **kwargs)
        weights = {name: original(self._base, name) for name in self.merge_parameters()}
        for weight in (*weights.values(), self.out_projection.get_base_layer().weight):
            sharded.refuse_sharded(self._base, weight)
            refuse_meta(query, weight)
        parts = {n: self._parts(adapter) for n, adapter in self._adapters(names).items()}
        keeps = self._base._qkv_same_embed_dim  # the cache holds one weight a layer, not three
        ins = {
            name: self._composed(weight, {n: p[name] for n, p in parts.items()}, weight, keeps)
            for name, weight in weights.items()
        }
        with recompose_in_backward(*ins.values()), replaced(self._base, {name: c.result for name, c in ins.items()}):
            return self.base_layer(query, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """As nn.Module; attributes that encoder layers read are the base's."""
        if name in READ_BY_ENCODERS:
            return self.out_projection.get_base_layer() if name == "out_proj" else getattr(self._base, name)
        return super().__getattr__(name)
