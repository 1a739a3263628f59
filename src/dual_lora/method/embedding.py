"""Dual LoRA on nn.Embedding: the weight [num_embeddings, embedding_dim] is the matrix [O, I].

Only the rows in use are composed. The row of `padding_idx` stays the base's, as nn.Embedding does not train it.
Dropout of the adapter plays no part: indices cannot be dropped out.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..core import blocked
from ..core.blocked import Adapter
from ..core.embedding_op import dual_lora_embedding
from . import sharded
from .config import DualLoraConfig
from .layer import MapLayer, is_plain
from .quantized import find_backend


class Embedding(MapLayer):
    """Dual LoRA on nn.Embedding and its scaled kin (`embed_scale`)."""

    takes_parts = True  # transformers' plans give whole rows, to which the adapter's own are added

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As for every layer, without dropout."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.dual_lora_dropout[adapter_name] = nn.Identity()

    def _matrix_shape(self) -> tuple[int, int]:
        weight: Any = self.get_base_layer().weight
        shape = getattr(weight, "ds_shape", None) or weight.shape
        return shape[0], shape[1]

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight

    _from_matrix = _matrix  # type: ignore[assignment]

    def _is_plain(self) -> bool:
        # A scaled embedding (Gemma's) has a forward of its own: the base's rows times `embed_scale`.
        base: Any = self.base_layer
        scaled = hasattr(base, "embed_scale") and isinstance(base, nn.Embedding)
        # The fused rows give the base's weight no gradient, which somebody may have thawed.
        frozen = not base.weight.requires_grad
        return frozen and is_plain(base, type(base).forward if scaled else nn.Embedding.forward)

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self.base_layer
        return self._lookup(x, base.weight, names)

    def _adapter_branch(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.get_base_layer()
        if base.max_norm is not None:
            raise ValueError(
                f"Dual LoRA cannot add its rows to those of an embedding with max_norm={base.max_norm}, which shortens "
                "the sum of both. Leave hooks and subclasses off this embedding, its weight frozen, and run samples "
                "of each adapter as a batch of their own; or leave it out of `target_modules`."
            )
        if sharded.is_sharded(base.weight):
            if "forward" not in vars(base):
                sharded.refuse(base, base.weight)
            sharded.agree(base.weight, self._stored(name))
        return self._lookup(x, None, [name])

    def _lookup(self, x: Tensor, weight: Tensor | None, names: list[str]) -> Tensor:
        base: Any = self.get_base_layer()
        y = dual_lora_embedding(
            x,
            weight,
            [self.adapter(n) for n in names],
            self._loss_scale(names, base.weight),
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            dtype=base.weight.dtype,
        )
        scale = self._get_embed_scale()
        return y if scale is None else y * scale.to(y.dtype)

    # Merge and ΔW leave the row of the padding alone, as the forward does.

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter at its present λ, fp32, [num_embeddings, embedding_dim]."""
        with torch.no_grad():
            return blocked.compose(None, [self._without_padding(self.adapter(adapter))], torch.float32)

    def _merged_weight(self, original: Tensor, names: list[str]) -> Tensor:
        adapters = [self._without_padding(self.adapter(name)) for name in self.scaling if name in names]
        with torch.no_grad():
            return blocked.compose(original, adapters, original.dtype)

    def _without_padding(self, adapter: Adapter) -> Adapter:
        base: Any = self.get_base_layer()
        if base.padding_idx is None:
            return adapter
        B = adapter.factors.B.detach().clone()
        B[base.padding_idx] = 0
        return adapter._replace(factors=adapter.factors._replace(B=B))


def dispatch_embedding(target: nn.Module, adapter_name: str, config: DualLoraConfig, **kwargs: Any) -> nn.Module | None:
    """The adapted layer for nn.Embedding, or None; ValueError for a quantised one, whose rows take no sum."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, nn.Embedding):
        return None
    coded = not base.weight.is_floating_point() or base.weight.dtype.itemsize == 1
    if coded or find_backend(base) is not None:
        raise ValueError(
            f"Dual LoRA cannot work on a quantised embedding ({type(base).__name__}, weight {base.weight.dtype}). "
            "Leave it out of `target_modules`, or out of the quantisation."
        )
    return Embedding(target, adapter_name, config=config, **kwargs)
