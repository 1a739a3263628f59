"""Dual LoRA on nn.Conv1d, Conv2d and Conv3d: the weight [O, I/groups, k…] is the matrix [O, I/groups · k…].

Stride, padding (and its modes), dilation and groups are the base layer's: its own convolution is called with the
composed weight.
"""

import math
from typing import Any

from torch import Tensor, nn

from ...core.compose_op import recomposing
from ...core.dispatch import in_dtype_of
from ..layer import MapLayer


class _Conv(MapLayer):
    forwards = nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward

    def _matrix_shape(self) -> tuple[int, int]:
        O, *rest = self._stored_shape()
        return O, math.prod(rest)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._stored_shape())

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        base: Any = self.get_base_layer()
        x = in_dtype_of(base.weight, x)
        weight, bias = (base.weight, base.bias) if with_base else (None, None)
        composed = self._composed(weight, self._adapters(names), x)
        with recomposing(composed):
            return base._conv_forward(x, self._from_matrix(composed.result), bias)


class Conv1d(_Conv):
    """Dual LoRA on nn.Conv1d."""


class Conv2d(_Conv):
    """Dual LoRA on nn.Conv2d."""


class Conv3d(_Conv):
    """Dual LoRA on nn.Conv3d."""
