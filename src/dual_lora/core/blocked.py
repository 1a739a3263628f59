"""Dual LoRA by blocks of the weight: no temporary of the weight's size, nothing kept for backward.

Three products cannot be avoided (y, dx and the masked G = dyᵀ x); everything else runs on blocks that stay in cache,
in three reused buffers, in place. The weight may be a tensor or anything with `rows(start, stop) -> Tensor` (a
quantised weight that is dequantised a few rows at a time).

For the paper's form the block holds T = copysign(ReLU(sP), Q - tiny), which carries magnitude, sign and mask at once:

    W_eff = W + T      dP = s · G ⊙ sgn(T)      H = G ⊙ |T| = (G ⊙ sgn(T)) ⊙ T

Measured: whole matrices with fresh temporaries are slower than naive autograd; blocks halve the time.
Other forms take the formula of `reference` block by block.

Legend for shapes: T tokens, I in, O out, r1 magnitude rank, r2 direction rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .reference import Factors, Form, direction, ieee_fp32, magnitude, product_gradients

# Sign(0) = -1: subtracting this from Q turns +0 into a negative number and changes no other sign. It has to be a normal
# number, because a subnormal one is flushed to zero on some machines.
TINY = 1e-37

# Elements of one block's buffer.
CPU_BLOCK = 1 << 19
CUDA_BLOCK = 1 << 24


@runtime_checkable
class RowSource(Protocol):
    """A weight [O, I] that can be read some rows at a time, as fp32, fp16 or bf16."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor: ...


class Adapter(NamedTuple):
    """One adapter's share of an update: its factors, its scale s (0-dim fp32 tensor) and its form."""

    factors: Factors
    scale: Tensor
    form: Form

    def working(self) -> Adapter:
        """The same with factors in the precision that P and Q are computed in: fp32, or fp64 for fp64 factors."""
        dtype = torch.float64 if self.factors.A.dtype == torch.float64 else torch.float32
        return Adapter(Factors(*(f.to(dtype) for f in self.factors)), self.scale.to(dtype), self.form)


class Gradients(NamedTuple):
    """What backward returns; None where it was not asked for."""

    x: Tensor | None  # [T, I]
    weight: Tensor | None  # [O, I]
    factors: list[Factors] | None


class Needs(NamedTuple):
    """What backward has to compute."""

    x: bool
    weight: bool
    factors: bool


def forward(x: Tensor, weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype; without a weight, x (ΣΔW)ᵀ."""
    O, I = _shape(weight, adapters)
    y = x.new_empty(x.shape[0], O)
    if x.shape[0] == 0:
        return y
    for block in _Blocks(weight, adapters, by_rows=True):
        torch.mm(x, block.composed(x.dtype).t(), out=y[:, block.rows])
    return y


def compose(
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """W + ΣΔW, [O, I], the rounding to `dtype` of the fp32 sum. `out` may be the weight itself."""
    if out is None:
        out = torch.empty(_shape(weight, adapters), dtype=dtype, device=adapters[0].scale.device)
    for block in _Blocks(weight, adapters, by_rows=True):
        out[block.rows].copy_(block.composed(None))
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Gradients of `forward` for dy [T, O] and x [T, I]; those of the factors in fp32.

    Blocks are columns of a plain weight, so that every block of dx is one complete product; a row source is read by
    rows, and dx is summed in fp32.
    """
    O, I = _shape(weight, adapters)
    T = x.shape[0]
    by_rows = weight is not None and not isinstance(weight, Tensor)
    summed = torch.float32 if by_rows else x.dtype
    dx = x.new_zeros(T, I, dtype=summed) if needs.x else None
    dW = x.new_zeros(O, I) if needs.weight else None
    blocks = _Blocks(weight, adapters, by_rows)
    grads = [Factors(*map(torch.zeros_like, a.factors)) for a in blocks.adapters] if needs.factors else None
    for block in blocks if T else ():
        if dx is not None:
            W = block.composed(x.dtype)
            if by_rows:
                dx += dy[:, block.rows] @ W
            else:
                torch.mm(dy, W, out=dx[:, block.cols])
        if grads is None and dW is None:
            continue
        G = block.weight_gradient(dy, x)
        if dW is not None:
            dW[block.rows, block.cols] = G
        for k, grad in enumerate(grads or ()):
            last = k == len(adapters) - 1
            block.add_factor_gradients(k, G if last else G.clone(), grad, loss_scale)
    return Gradients(None if dx is None else dx.to(x.dtype), dW, grads)


class _Blocks:
    """The blocks of W + ΣΔW in turn; they share their buffers, so a block is used up before the next is taken."""

    def __init__(self, weight: Tensor | RowSource | None, adapters: Sequence[Adapter], by_rows: bool):
        self.weight = weight
        self.adapters = [a.working() for a in adapters]
        self.by_rows = by_rows
        self.O, self.I = _shape(weight, adapters)
        self._buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[_Block]:
        device = self.adapters[0].scale.device.type
        limit = CPU_BLOCK if device == "cpu" else CUDA_BLOCK
        length, other = (self.O, self.I) if self.by_rows else (self.I, self.O)
        step = max(limit // max(other, 1), 16)
        count = -(-length // step)
        for k in range(count):
            span = slice(length * k // count, length * (k + 1) // count)
            if self.by_rows:
                yield _Block(self, span, slice(0, self.I))
            else:
                yield _Block(self, slice(0, self.O), span)

    def buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        n = shape[0] * shape[1]
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < n:
            kept = self._buffers[name] = torch.empty(n, dtype=dtype, device=self.adapters[0].scale.device)
        return kept[:n].view(shape)


class _Block:
    """One block of the weight: the update of every adapter, the composed weight, the masked gradient."""

    def __init__(self, parent: _Blocks, rows: slice, cols: slice):
        self.parent, self.rows, self.cols = parent, rows, cols
        self.shape = (rows.stop - rows.start, cols.stop - cols.start)
        self._products: dict[int, tuple[Tensor, Tensor]] = {}

    def _buffer(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.parent.adapters[0].scale.dtype
        return self.parent.buffer(f"{name} {dtype}", self.shape, dtype)

    def _base(self) -> Tensor | None:
        weight = self.parent.weight
        if weight is None:
            return None
        if isinstance(weight, Tensor):
            return weight[self.rows, self.cols]
        return weight.rows(self.rows.start, self.rows.stop)

    def products(self, k: int) -> tuple[Tensor, Tensor]:
        """(T, Q) of adapter k in the paper's form, with T = sΔW; (P, Q) in the others."""
        if k not in self._products:
            (A, B, C, D), scale, form = self.parent.adapters[k]
            B = B[self.rows] * scale if _is_paper(form) else B[self.rows]
            with ieee_fp32():
                P = torch.mm(B, A[:, self.cols], out=self._buffer(f"P{k}"))
                Q = torch.mm(D[self.rows], C[:, self.cols], out=self._buffer(f"Q{k}"))
            if _is_paper(form):
                torch.copysign(P.clamp_(min=0), Q.sub_(TINY), out=P)
            self._products[k] = P, Q
        return self._products[k]

    def _update(self, k: int) -> Tensor:
        first, Q = self.products(k)
        _, scale, form = self.parent.adapters[k]
        return first if _is_paper(form) else magnitude(first, form) * direction(Q, form) * scale

    def composed(self, dtype: torch.dtype | None) -> Tensor:
        """(W + ΣΔW) of this block in `dtype` (None: unrounded); valid until the next call on the block."""
        total = self._base()
        for k in range(len(self.parent.adapters)):
            T = self._update(k)
            total = T if total is None else torch.add(total, T, out=self._buffer("G"))
        assert total is not None
        if dtype is None or dtype == total.dtype:
            return total
        return self._buffer("low", dtype).copy_(total)

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dyᵀ x of this block, in the working precision; valid until the next call on the block."""
        dy, x, G = dy[:, self.rows], x[:, self.cols], self._buffer("G")
        if x.dtype == G.dtype:
            return torch.mm(dy.t(), x, out=G)
        return G.copy_(torch.mm(dy.t(), x, out=self._buffer("low", x.dtype)))

    def add_factor_gradients(self, k: int, G: Tensor, grad: Factors, loss_scale: Tensor | None) -> None:
        """Mask G in place and add its reductions to the four small gradients of adapter k."""
        (A, B, C, D), scale, form = self.parent.adapters[k]
        first, Q = self.products(k)
        if _is_paper(form):
            outside = Q.abs() > 1 if form.ste == "hardtanh" else None
            dP = G.mul_(torch.sign(first, out=Q))  # its factor s goes into the small products
            dQ = first.mul_(dP)
            if form.ste == "clip":
                dQ = dQ.clamp_(-1, 1) if loss_scale is None else dQ.clamp_(-loss_scale, loss_scale)
            elif outside is not None:
                dQ.masked_fill_(outside, 0)
            B, A = B * scale, A * scale
            del self._products[k]
        else:
            dP, dQ = product_gradients(G, first, Q, scale, form, loss_scale)
        rows, cols = self.rows, self.cols
        grad.A[:, cols].addmm_(B[rows].t(), dP)
        grad.B[rows].addmm_(dP, A[:, cols].t())
        grad.C[:, cols].addmm_(D[rows].t(), dQ)
        grad.D[rows].addmm_(dQ, C[:, cols].t())


def _is_paper(form: Form) -> bool:
    """Whether T = copysign(ReLU(sP), Q) carries all that backward needs."""
    return form.magnitude == "relu" and form.direction == "sign" and not form.live_zero


def _shape(weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> tuple[int, int]:
    if weight is not None:
        return tuple(weight.shape)
    return adapters[0].factors.B.shape[0], adapters[0].factors.A.shape[1]
