"""An operator that gives a foreign y = x Wᵀ the gradient dx = dy W, for a W that is read by rows.

For quantised layers whose own forward has no backward (int8 activations): y is theirs, the gradient goes through the
dequantised rows, some at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import refuse_double_backward
from .op import _rows
from .ticket import Ticket, source_of

# Entries of W that are read at a time.
ROW_BLOCK = 1 << 19

torch.library.define("dual_lora::through_rows", "(Tensor x, Tensor y, Tensor weight) -> Tensor")
torch.library.define("dual_lora::through_rows_backward", "(Tensor dy, Tensor weight, int I) -> Tensor")


def through_rows(x: Tensor, y: Tensor, weight: Ticket) -> Tensor:
    """y [..., O], of which x [..., I] gets the gradient dy W; y is computed without one."""
    return torch.ops.dual_lora.through_rows(x, y, weight.number)


@torch.library.impl("dual_lora::through_rows", "default")
def _through_rows(x, y, weight):
    return y.clone()


@torch.library.impl("dual_lora::through_rows_backward", "default")
def _through_rows_backward(dy, weight, I):
    source = source_of(weight)
    O, rows = dy.shape[-1], _rows(dy)
    dx = torch.zeros(rows.shape[0], I, dtype=torch.float32, device=dy.device)
    step = max(ROW_BLOCK // I, 16)
    for start in range(0, O, step):
        W = source.rows(start, min(start + step, O))
        dx += rows[:, start : start + step] @ W.to(dy.dtype)
    return dx.to(dy.dtype).view(*dy.shape[:-1], I)


@torch.library.register_fake("dual_lora::through_rows")
def _(x, y, weight):
    return torch.empty_like(y)


@torch.library.register_fake("dual_lora::through_rows_backward")
def _(dy, weight, I):
    return dy.new_empty(*dy.shape[:-1], I)


def _setup(ctx, inputs, output):
    x, _, weight = inputs
    ctx.save_for_backward(weight)
    ctx.I = x.shape[-1]


def _backward(ctx, dy):
    (weight,) = ctx.saved_tensors
    return torch.ops.dual_lora.through_rows_backward(dy, weight, ctx.I), None, None


torch.library.register_autograd("dual_lora::through_rows", _backward, setup_context=_setup)
torch.library.register_autograd("dual_lora::through_rows_backward", refuse_double_backward)
