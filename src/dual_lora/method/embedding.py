"""Dual LoRA on nn.Embedding: the weight [num_embeddings, embedding_dim] is the matrix [O, I].

Only the rows in use are composed. The row of `padding_idx` stays the base's, as nn.Embedding does not train it.
Dropout of the adapter plays no part: indices cannot be dropped out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import blocked
from ..core.embedding_op import dual_lora_embedding
from ..core.reference import Adapter
from . import sharded
from .layer import MapLayer, is_plain
from .quantized import find_backend


class Embedding(MapLayer):
    """Dual LoRA on nn.Embedding and its scaled kin (`embed_scale`)."""

    takes_dropout = False
    takes_parts = True  # transformers' plans give whole rows, to which the adapter's own are added

    def _matrix_shape(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        coded = not base.weight.is_floating_point() or base.weight.dtype.itemsize == 1
        if coded or find_backend(base) is not None:  # its rows take no sum
            raise ValueError(
                f"Dual LoRA cannot work on a quantised embedding ({type(base).__name__}, weight {base.weight.dtype}). "
                "Leave it out of `target_modules`, or out of the quantisation."
            )
        return super()._matrix_shape()

    def _is_plain(self) -> bool:
        # A scaled embedding (Gemma's) has a forward of its own: the base's rows times `embed_scale`.
        base: Any = self.base_layer
        scaled = hasattr(base, "embed_scale") and isinstance(base, nn.Embedding)
        # The fused rows give the base's weight no gradient, which somebody may have thawed.
        frozen = not base.weight.requires_grad
        return frozen and is_plain(base, type(base).forward if scaled else nn.Embedding.forward)

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        return self._lookup(x, self._parameter(), names)

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

    def _compose(self, weight: Tensor | None, adapters: list[Adapter], dtype: torch.dtype) -> Tensor:
        base: Any = self.get_base_layer()
        return blocked.compose(weight, [a.without_row(base.padding_idx) for a in adapters], dtype)
