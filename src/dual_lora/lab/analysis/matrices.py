"""An update ΔW [O, I] that is read a few rows at a time, so that a 7B model's layers fit together.

O out features, I in features. Every block is fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from dual_lora.core import blocked
from dual_lora.core.reference import Adapter, Factors, Form

BLOCK = 1 << 22  # elements of a block: 16 MiB of fp32

Group = Literal["magnitude", "direction"]


class Matrix:
    """A matrix [O, I] whose rows can be had a few at a time, in fp32."""

    shape: tuple[int, int]
    device: torch.device

    def rows(self, start: int, stop: int) -> Tensor:
        raise NotImplementedError


def row_spans(matrix: Matrix) -> Iterator[tuple[int, int]]:
    """Spans of rows that make up blocks of at most `BLOCK` elements."""
    O, I = matrix.shape
    step = max(BLOCK // max(I, 1), 1)
    for start in range(0, O, step):
        yield start, min(start + step, O)


def blocks(*matrices: Matrix) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each matrix, block by block; all have one shape."""
    for span in row_spans(matrices[0]):
        yield tuple(matrix.rows(*span) for matrix in matrices)


class Dense(Matrix):
    """A matrix that lies in memory; higher dimensions than two (convolutions) are flattened to [O, rest]."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach().flatten(1)
        self.shape, self.device = (self.tensor.shape[0], self.tensor.shape[1]), tensor.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].float()


class Difference(Matrix):
    """new - old, where both are read a block at a time; differences of low precisions are taken in fp32."""

    def __init__(self, new: Matrix, old: Matrix):
        if new.shape != old.shape:
            raise ValueError(f"A weight {list(new.shape)} cannot be compared with one of {list(old.shape)}.")
        self.new, self.old = new, old
        self.shape, self.device = old.shape, old.device

    def rows(self, start: int, stop: int) -> Tensor:
        return self.new.rows(start, stop) - self.old.rows(start, stop)


class Sum(Difference):
    """new + old."""

    def rows(self, start: int, stop: int) -> Tensor:
        return self.new.rows(start, stop) + self.old.rows(start, stop)


class Saved(Matrix):
    """A tensor in a safetensors file: only the rows that are asked for are read."""

    def __init__(self, opened: Any, key: str, device: torch.device, transposed: bool = False):
        self._slice, self._transposed = opened.get_slice(key), transposed
        O, I = self._slice.get_shape()
        self.shape, self.device = (I, O) if transposed else (O, I), device

    def rows(self, start: int, stop: int) -> Tensor:
        part: Tensor = self._slice[:, start:stop].t() if self._transposed else self._slice[start:stop]
        return part.to(self.device).float()


class Factored(Matrix):
    """Dual LoRA's update, computed from its four factors by `core` whenever a block is asked for."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter.in_working_dtype()
        self.shape = self.adapter.factors.B.shape[0], self.adapter.factors.A.shape[1]
        self.device = self.adapter.scale.device

    def rows(self, start: int, stop: int) -> Tensor:
        part = self.adapter._replace(factors=self.adapter.factors.rows(start, stop))
        with torch.no_grad():
            return blocked.compose(None, [part], torch.float32)

    def group(self, group: Group) -> Factored:
        """One group's share alone, at scale 1: ReLU(BA) or Sign(DC) (in the ablations: BA or DC)."""
        return self._with_other_product_at_one(group, self.adapter.form)

    def product(self, group: Group) -> Factored:
        """The group's plain product: P = BA or Q = DC."""
        return self._with_other_product_at_one(group, Form(magnitude="identity", direction="identity"))

    def _with_other_product_at_one(self, group: Group, form: Form) -> Factored:
        A, B, C, D = self.adapter.factors
        across, down = torch.ones_like(A[:1]), torch.ones_like(B[:, :1])
        if group == "magnitude":
            factors, form = Factors(A, B, across, down), form._replace(direction="identity")
        else:
            factors, form = Factors(across, down, C, D), form._replace(magnitude="identity")
        # Without the paper's form the live zero plays no part in the value, and the general path is taken.
        return Factored(Adapter(factors, torch.ones_like(self.adapter.scale), form._replace(live_zero=False)))


Update = Callable[[], Matrix]
"""Where an update comes from: called when its layer's turn has come, so that one dense update lives at a time."""
