"""Dual LoRA on nn.Embedding: the weight [num_embeddings, embedding_dim] is the matrix [O, I].

Only the rows in use are composed. The row of `padding_idx` stays the base's, as nn.Embedding does not train it.
Dropout of the adapter plays no part: indices cannot be dropped out.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...core import blocked
from ...core.embedding_op import dual_lora_embedding
from ...core.reference import Adapter
from ..layer import MapLayer
from ..parallel import sharded
from ..plain import own
from ..replaced import original, replaced
from ..scaler import loss_scale
from ..start import OTHER_STD
from .quantized import find_backend


class Embedding(MapLayer):
    """Dual LoRA on nn.Embedding and its scaled kin (`embed_scale`)."""

    takes_dropout = False
    forwards: tuple[Any, ...] = own(nn.Embedding.forward)
    function = "embedding"
    start_std, start_gain = OTHER_STD, 1.0  # with those of other layers a step gains twice what LoRA's gains
    supports_sharded_weight = True  # transformers' plans give whole rows, to which the adapter's own are added

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(base_layer, nn.Embedding) and hasattr(base_layer, "embed_scale"):  # Gemma's: rows times it
            self.forwards = (*self.forwards, type(base_layer).forward)
        super().__init__(base_layer, *args, **kwargs)

    def _matrix_shape(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        coded = not base.weight.is_floating_point() or base.weight.dtype.itemsize == 1
        if coded or find_backend(base) is not None:  # its rows take no sum
            raise ValueError(
                f"Dual LoRA cannot work on a quantised embedding ({type(base).__name__}, weight {base.weight.dtype}). "
                "Leave it out of `target_modules`, or out of the quantisation."
            )
        return super()._matrix_shape()

    def _draw_A(self, A: Tensor, gain: float) -> None:
        """As LoRA draws the factor of an embedding's columns, `gain` times as wide: from N(0, 1)."""
        nn.init.normal_(A, std=gain)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As for every layer. With `max_norm`, nn.Embedding would shorten rows of W itself, and so change W + ΔW."""
        base: Any = self.get_base_layer()
        if base.max_norm is None or base.weight.is_meta:
            return super().forward(x, *args, **kwargs)
        with replaced(base, {"weight": original(base, "weight").clone()}):
            return super().forward(x, *args, **kwargs)

    def _is_plain(self) -> bool:
        # The fused rows give the base's weight no gradient, which somebody may have thawed.
        return not self._parameter().requires_grad and super()._is_plain()

    def adapter(self, name: str) -> Adapter:
        """As every layer's, without an update of the padding's row."""
        return super().adapter(name).without_row(self.get_base_layer().padding_idx)  # type: ignore[arg-type]

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
                sharded.refuse_sharded(base, base.weight)
            sharded.broadcast_factors(base.weight, self.stored_factors(name))
        return super()._adapter_branch(x, name)

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        base: Any = self.get_base_layer()
        y = dual_lora_embedding(
            x,
            base.weight if with_base else None,
            list(map(super().adapter, names)),  # the operator itself leaves the padding out
            loss_scale(base.weight.device),
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            # Alone in full, as the base's call may look up rows of another dtype than it stores.
            dtype=base.weight.dtype if with_base or base.weight.dtype == torch.float64 else torch.float32,
        )
        if isinstance(getattr(base, "embed_scale", None), int | float):  # as a tensor it would be rounded first
            return y * base.embed_scale
        scale = self._get_embed_scale()
        return y if scale is None else y * scale.to(base.weight.dtype)

    def _compose(self, weight: Tensor | None, adapters: list[Adapter], dtype: torch.dtype) -> Tensor:
        return blocked.compose(weight, adapters, dtype)
