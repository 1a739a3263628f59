"""Dual LoRA on nn.Conv1d, Conv2d and Conv3d: the weight [O, I/groups, k…] is the matrix [O, I/groups · k…].

Stride, padding (and its modes), dilation and groups are the base layer's: its own convolution is called with the
composed weight.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...core.compose_op import recompose_in_backward
from ...core.dispatch import in_dtype_of
from ...core.sampled import Geometry, with_sampled_gradient
from ...core.tokens import EXACT
from ..layer import MapLayer
from ..plain import own


class _Conv(MapLayer):
    samples_tokens = True
    forwards = own(nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def __getattr__(self, name: str) -> Any:
        """Return the convolution's kernel size, stride and so on, which some models read."""
        if name in nn.Conv1d.__constants__:
            return getattr(self.get_base_layer(), name)
        return super().__getattr__(name)

    def _matrix_shape(self) -> tuple[int, int]:
        O, *rest = self._stored_shape()
        return O, math.prod(rest)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1)

    def _from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self._stored_shape())

    def _map(self, x: Tensor, names: list[str], with_base: bool) -> Tensor:
        base: Any = self.get_base_layer()
        weight = bias = None
        if with_base:
            weight, bias, x = base.weight, base.bias, in_dtype_of(base.weight, x)
        composed = self._composed(weight, self._adapters(names), x)
        W, share = self._from_matrix(composed.result), self._token_share(names)
        with recompose_in_backward(composed):
            if share == EXACT or not torch.is_grad_enabled():
                return base._conv_forward(x, W, bias)
            seen, geometry = _input_and_geometry(base, x)
            return with_sampled_gradient(lambda W: base._conv_forward(x, W, bias), seen, W, share, geometry=geometry)


def _input_and_geometry(base: Any, x: Tensor) -> tuple[Tensor, Geometry]:
    """Return the convolution's input and geometry, with other padding than zeros on both sides applied to the input."""
    if base.padding_mode == "zeros" and not isinstance(base.padding, str):
        return x, Geometry(base.stride, base.padding, base.dilation)
    mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
    x = nn.functional.pad(x.detach(), base._reversed_padding_repeated_twice, mode=mode)
    return x, Geometry(base.stride, [0] * len(base.stride), base.dilation)


class Conv1d(_Conv):
    """Dual LoRA on nn.Conv1d."""


class Conv2d(_Conv):
    """Dual LoRA on nn.Conv2d."""


class Conv3d(_Conv):
    """Dual LoRA on nn.Conv3d."""
