"""Dual LoRA by blocks of the weight: no temporary of the weight's size, nothing kept for backward.

Three products cannot be avoided (y, dx and the masked G = dyᵀ x). Everything else runs on tiles that stay in cache, in
reused buffers, in place (`tile`).

Several tiles make a block, a composed part of the weight large enough for an efficient product: whole rows in forward,
whole columns in backward, so that every block gives complete columns of y and of dx. The weight may be a tensor or
anything with `rows(start, stop) -> Tensor` (a quantised weight that is dequantised a few rows at a time); its blocks
are rows in backward too, as are those of a very tall weight (an output head), and dx is summed in fp32.

Sizes were chosen by `python -m benchmarks blocks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import scratch
from . import tile as tiles
from .product import addmm_, as_left_operand, mm, mm_columns
from .reference import PLAIN, Adapter, Factors, parts_of


class Sizes(NamedTuple):
    """Sizes of tiles and blocks on one kind of device."""

    tile: int  # elements
    block: int  # bytes of the composed weight
    narrow: int = 128  # columns; products with fewer are slow


CPU = Sizes(tile=1 << 18, block=8 << 20)
CUDA = Sizes(tile=1 << 24, block=64 << 20)


class RowSource(Protocol):
    """A weight [O, I] that can be read some rows at a time, as fp32, fp16 or bf16."""

    shape: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor: ...


class Gradients(NamedTuple):
    """The gradients that backward returns; None for those that `Needs` leaves out."""

    x: Tensor | None  # [T, I]
    weight: Tensor | None  # [O, I]
    factors: list[Factors] | None


class Needs(NamedTuple):
    """Which gradients backward has to compute."""

    x: bool
    weight: bool
    factors: bool


def forward(x: Tensor, weight: Tensor | RowSource | None, adapters: Sequence[Adapter]) -> Tensor:
    """y = x (W + ΣΔW)ᵀ for x [T, I], in x's dtype; without a weight, x (ΣΔW)ᵀ."""
    work = _Work(weight, adapters)
    y, x = x.new_empty(x.shape[0], work.O), as_left_operand(x)
    if x.shape[0] == 0:
        return y
    for block in work.blocks(x.dtype, by_rows=True):
        for tile in block.tiles():
            tile.write_composed(block.composed(tile))
        y = mm_columns(y, block.rows, x, block.composed().t())
    return y


def compose(
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Compose W + ΣΔW, [O, I]: the fp32 sum (for fp64, an fp64 sum), rounded to `dtype`. `out` may be the weight."""
    work = _Work(weight, parts_of(adapters))
    if out is None:
        out = torch.empty(work.O, work.I, dtype=dtype, device=work.device)
    for block in work.blocks(dtype, by_rows=True):
        for tile in block.tiles():
            tile.write_composed(out[tile.rows])
    return out


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | RowSource | None,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None,
    needs: Needs,
    G_rows: tuple[Tensor, Tensor] | None = None,
) -> Gradients:
    """Compute the gradients of `forward` for dy [T, O] and x [T, I]; those of the factors are fp32.

    G_rows: the rows of dy and x whose product is G, where these are not all rows.
    """
    work = _Work(weight, adapters)
    T = x.shape[0]
    by_rows = not (weight is None or isinstance(weight, Tensor)) or work.is_tall(x.dtype)
    dx = None
    if needs.x:
        wide = torch.promote_types(x.dtype, torch.float32)
        dx = x.new_zeros(T, work.I, dtype=wide) if by_rows else x.new_empty(T, work.I)
    dW = x.new_zeros(work.O, work.I) if needs.weight else None
    sums = [_FactorSums(a, loss_scale) for a in work.adapters] if needs.factors else None
    dyG, xG = G_rows or (dy, x)
    dyT = as_left_operand(dyG.t()) if needs.factors or needs.weight else None
    dy = as_left_operand(dy)
    for block in work.blocks(x.dtype, by_rows) if T else ():
        if dyT is not None:
            block.compute_gradient(dyT, xG)
        for tile in block.tiles():
            if dx is not None:
                tile.write_composed(block.composed(tile), spare=sums is None)
            if sums is None and dW is None:
                continue
            G = block.gradient(tile)
            if dW is not None:
                dW[tile.rows, tile.cols] = G
            for k, total in enumerate(sums or ()):
                kept = k < len(work.adapters) - 1 and work.adapters[k].form != PLAIN  # which leaves G as it is
                own = tile.buffer("T").copy_(G) if kept else G
                total.add(tile, *tile.products(k), own)
        if dx is not None and by_rows:
            dx += mm(dy[:, block.rows], block.composed())
        elif dx is not None:
            dx = mm_columns(dx, block.cols, dy, block.composed())
    grads = None if sums is None else [s.grads for s in sums]
    return Gradients(None if dx is None else dx.to(x.dtype), dW, grads)


def factor_gradients(G: Tensor, adapters: Sequence[Adapter], loss_scale: Tensor | None) -> list[Factors]:
    """Compute the factors' gradients, fp32, from a given G = ∂L/∂W [O, I]."""
    work = _Work(None, adapters)
    sums = [_FactorSums(a, loss_scale) for a in work.adapters]
    for block in work.blocks(work.dtype, by_rows=True):
        for tile in block.tiles():
            for k, total in enumerate(sums):
                total.add(tile, *tile.products(k), tile.buffer("G").copy_(G[tile.rows, tile.cols]))
    return [s.grads for s in sums]


class _Work:
    """The weight, the adapters in working precision, and the buffers that all tiles share."""

    def __init__(self, weight: Tensor | RowSource | None, adapters: Sequence[Adapter]):
        self.weight = weight
        self.adapters = [a.in_working_dtype() for a in adapters]
        factors = adapters[0].factors
        self.O, self.I = (factors.B.shape[0], factors.A.shape[1]) if weight is None else weight.shape
        self.device = self.adapters[0].scale.device
        self.dtype = self.adapters[0].scale.dtype
        self.sizes = CPU if self.device.type == "cpu" else CUDA
        # A weight stored as [I, O] wants its tiles laid out likewise.
        self.transposed = isinstance(weight, Tensor) and weight.stride(0) == 1 != weight.stride(1)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def is_tall(self, dtype: torch.dtype) -> bool:
        """Whether blocks of whole columns would be too narrow."""
        return min(self.sizes.narrow, self.I) * self.O * dtype.itemsize > self.sizes.block

    def blocks(self, dtype: torch.dtype, by_rows: bool) -> Iterator[_Block]:
        """Yield the blocks. They share their buffers: finish one before taking the next."""
        length, other = (self.O, self.I) if by_rows else (self.I, self.O)
        for span in _spans(length, self.sizes.block // dtype.itemsize // max(other, 1)):
            rows, cols = (span, slice(0, self.I)) if by_rows else (slice(0, self.O), span)
            yield _Block(self, rows, cols, dtype)

    def buffer(self, name: str, rows: slice, cols: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer of that name, in the shape of this part of the weight."""
        dtype = dtype or self.dtype
        r, c = rows.stop - rows.start, cols.stop - cols.start
        kept = self._buffers.get((name, dtype))
        if kept is None or kept.numel() < r * c:
            kept = self._buffers[name, dtype] = scratch.flat(name, r * c, dtype, self.device)
        return kept[: r * c].view(c, r).t() if self.transposed else kept[: r * c].view(r, c)

    def base(self, rows: slice, cols: slice) -> Tensor | None:
        if self.weight is None or isinstance(self.weight, Tensor):
            return None if self.weight is None else self.weight[rows, cols]
        return self.weight.rows(rows.start, rows.stop)


class _Block:
    """A part of the weight with one composed buffer."""

    def __init__(self, work: _Work, rows: slice, cols: slice, dtype: torch.dtype):
        self.work, self.rows, self.cols, self.dtype = work, rows, cols, dtype

    def tiles(self) -> Iterator[_Tile]:
        """Yield the block's tiles: some rows at a time."""
        width = max(self.cols.stop - self.cols.start, 1)
        for span in _spans(self.rows.stop - self.rows.start, self.work.sizes.tile // width):
            yield _Tile(self.work, slice(self.rows.start + span.start, self.rows.start + span.stop), self.cols, span)

    def composed(self, tile: _Tile | None = None) -> Tensor:
        """Return the buffer of the block's composed weight (or of one tile of it), which its tiles write."""
        whole = self.work.buffer("composed", self.rows, self.cols, self.dtype)
        return whole if tile is None else whole[tile.in_block]

    def compute_gradient(self, dyT: Tensor, x: Tensor) -> None:
        """Compute this block's part of G = dyᵀ x."""
        self.G = mm(dyT[self.rows], x[:, self.cols], self.work.buffer("gradient", self.rows, self.cols, self.dtype))

    def gradient(self, tile: _Tile) -> Tensor:
        """Return a tile of G in the working precision."""
        G = self.G[tile.in_block]
        return G if G.dtype == self.work.dtype else tile.buffer("G").copy_(G)


class _Tile:
    """Some rows of a block, with P and Q of every adapter."""

    def __init__(self, work: _Work, rows: slice, cols: slice, in_block: slice):
        self.work, self.rows, self.cols, self.in_block = work, rows, cols, in_block
        self._products: dict[int, tuple[Tensor, Tensor]] = {}
        self._base: Tensor | None = None

    def base(self) -> Tensor | None:
        """Return the base's weight, which is read only once."""
        if self._base is None:
            self._base = self.work.base(self.rows, self.cols)
        return self._base

    def buffer(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.work.buffer(name, self.rows, self.cols, dtype)

    def products(self, k: int) -> tuple[Tensor, Tensor]:
        """Return P and Q of adapter k, computed at the first call."""
        if k not in self._products:
            P, Q = self.buffer(f"P{k}"), self.buffer(f"Q{k}")
            adapter = self.work.adapters[k]
            base = self.base() if adapter.form.direction == "weight" else None
            self._products[k] = tiles.products(adapter, self.rows, self.cols, P, Q, base)
        return self._products[k]

    def write_composed(self, out: Tensor, spare: bool = True) -> None:
        """Write W + ΣΔW of this tile, rounded once, to `out`. spare: whether P may be overwritten."""
        total = out if out.dtype in (self.work.dtype, torch.float64) else self.buffer("G")
        base = self.base()
        if base is None:
            total.zero_()
        elif base.dtype != total.dtype:
            # Copying a block of columns first and converting it then costs a third of converting while copying.
            near = base if base.is_contiguous() or base.dtype != out.dtype else out.copy_(base)
            base = total.copy_(near)
        for k, (_, scale, form, _) in enumerate(self.work.adapters):
            P, Q = self.products(k)
            T = tiles.update(P, Q, form, P if spare else self.buffer("T"))
            tiles.add_update(total if base is None or k else base, T, scale, out=total)
        if total is not out:
            out.copy_(total)


class _FactorSums:
    """The four small gradients of one adapter, summed over tiles."""

    def __init__(self, adapter: Adapter, loss_scale: Tensor | None):
        adapter = adapter.with_mean_square()
        self.rule = tiles.estimator(adapter, loss_scale, G_is_scaled=False)
        self.grads = Factors(*map(torch.zeros_like, adapter.factors))
        self.factors = Factors(*(f * adapter.scale for f in adapter.factors))  # for the scale, which G does not carry

    def add(self, tile: _Tile, P: Tensor, Q: Tensor, G: Tensor) -> None:
        """Add a tile's gradients to the sums. Overwrites P, Q and G."""
        dP, dQ = self.rule.product_gradients(G, P, Q)
        A, B, C, D = self.factors
        rows, cols = tile.rows, tile.cols
        addmm_(self.grads.A[:, cols], B[rows].t(), dP)
        addmm_(self.grads.B[rows].t(), A[:, cols], dP.t())
        if dQ is None:
            return
        addmm_(self.grads.C[:, cols], D[rows].t(), dQ)
        addmm_(self.grads.D[rows].t(), C[:, cols], dQ.t())


def _spans(length: int, step: int) -> Iterator[slice]:
    """Split 0…length into equal parts of about `step`, which is at least 16."""
    count = -(-length // max(step, 16))
    for k in range(count):
        yield slice(length * k // count, length * (k + 1) // count)
