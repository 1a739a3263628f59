"""Dual LoRA on nn.Conv1d, Conv2d and Conv3d: the weight [O, I/groups, k…] is the matrix [O, I/groups · k…].

Stride, padding (and its modes), dilation and groups are the base layer's: its own convolution is called with the
composed weight.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core.compose_op import Composed, dual_lora_weight, recomposing
from ..core.dispatch import autocast_dtype, in_dtype_of
from .layer import MapLayer, is_plain


class _Conv(MapLayer):
    def _matrix_shape(self) -> tuple[int, int]:
        O, *rest = self._stored_shape()
        return O, math.prod(rest)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._stored_shape())

    def _is_plain(self) -> bool:
        return is_plain(self.base_layer, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def _fused(self, x: Tensor, names: list[str]) -> Tensor:
        base: Any = self.base_layer
        return self._convolve(x, base.weight, base.bias, names)

    def _adapter_branch(self, x: Tensor, name: str) -> Tensor:
        return self._convolve(self.dual_lora_dropout[name](x), None, None, [name])

    def _convolve(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, names: list[str]) -> Tensor:
        base: Any = self.get_base_layer()
        x = in_dtype_of(base.weight, x)
        dtype = autocast_dtype(x.device, x.dtype) or x.dtype
        adapters = [self.adapter(n) for n in names]
        matrix = None if weight is None else self._matrix(weight)
        if weight is not None and self._may_keep():
            W = self._kept_weight(weight, names, dtype, partial(dual_lora_weight, matrix, adapters, dtype=dtype))
            return base._conv_forward(x, self._from_matrix(W), bias)
        W = dual_lora_weight(matrix, adapters, self._loss_scale(names, x), dtype=dtype)
        with recomposing(Composed(W, matrix, adapters)):
            return base._conv_forward(x, self._from_matrix(W), bias)


class Conv1d(_Conv):
    """Dual LoRA on nn.Conv1d."""


class Conv2d(_Conv):
    """Dual LoRA on nn.Conv2d."""


class Conv3d(_Conv):
    """Dual LoRA on nn.Conv3d."""


_LAYERS: dict[type[nn.Module], type[_Conv]] = {nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def dispatch_conv(base: nn.Module, *args: Any, **kwargs: Any) -> nn.Module | None:
    """The adapted layer for nn.Conv1d, Conv2d and Conv3d, or None."""
    return next((layer(*args, **kwargs) for kind, layer in _LAYERS.items() if isinstance(base, kind)), None)
