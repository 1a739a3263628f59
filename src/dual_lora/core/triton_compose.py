"""W + ΔW, tile by tile: weight and factors in, composed weight out, nothing in between in memory.

    out = round(W + Σ s_n · ReLU(B_n A_n) ⊙ Sign(D_n C_n))

The sum is made in fp32 and rounded once, to the output's dtype. W may be dense (any float dtype, any strides), NF4
as bitsandbytes packs it, int8 with a scale for each row, or absent (ΔW alone). Several adapters go in one launch; a
leading batch dimension [E, O, I] composes all experts in one launch. On the CPU this runs in Triton's interpreter only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_launch
from .blocked import Adapter
from .triton_launch import RANK_CHUNK, Tile
from .triton_product import displacement, product

# 64 × 64 on four warps is the largest tile that needs at most 128 registers on sm_80 and sm_90 at every rank, which
# lets 16 warps share a multiprocessor: one program's loads then hide under another's products.
TILES = {
    "sm_80": Tile(rows=64, cols=64, tokens=0, warps=4, stages=1),
    "sm_90": Tile(rows=64, cols=64, tokens=0, warps=4, stages=1),
    "gfx942": Tile(rows=64, cols=64, tokens=0, warps=4, stages=1),
    "interpreter": Tile(rows=64, cols=64, tokens=0, warps=4, stages=1),
}


class Nf4(NamedTuple):
    """A weight in 4 bits as bitsandbytes stores it: row-major, two entries a byte, the first in the high half."""

    packed: Tensor  # uint8, O·I/2 in any shape
    absmax: Tensor  # fp32, one for each block of `blocksize` entries (nested quantisation already undone)
    code: Tensor  # fp32, the sixteen values of the code book
    blocksize: int
    shape: torch.Size  # [O, I]


class Int8(NamedTuple):
    """A weight in int8 with one scale for each row: W = values · scale[:, None]."""

    values: Tensor  # int8, [O, I]
    scale: Tensor  # fp32, [O]

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


def compose(
    weight: Tensor | Nf4 | Int8 | None,
    adapters: Sequence[Adapter],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """W + Σ ΔW_n, [O, I] or [E, O, I].

    weight: the base, or None for ΔW alone. A quantised weight is a matrix.
    adapters: fp32 factors, scale s as an fp32 tensor on the device (it is never read back) and form of each. In a
        batch the factors have a leading dimension E and share the scale.
    out_dtype: of the result; by default the dense weight's, else fp32.
    out: where to write. It may be `weight` itself: each entry is read once, before it is written.

    Raises ValueError for shapes that do not fit together, factors or scales that are not fp32 and unknown forms.
    """
    s = triton_launch.stack(adapters)
    if weight is not None and weight.shape != s.shape:
        raise ValueError(f"The weight has shape {tuple(weight.shape)}, the factors make {tuple(s.shape)}.")
    if out is None:
        if out_dtype is None:
            out_dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
        out = torch.empty(s.shape, dtype=out_dtype, device=s.A[0].device)
    elif out.shape != s.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the factors make {tuple(s.shape)}.")
    if out.numel() == 0:
        return out
    base = _base(weight)
    tile = TILES[triton_launch.target(out.device)]
    grid = (triton.cdiv(s.O, tile.rows) * triton.cdiv(s.I, tile.cols), s.batch)
    with triton_launch.on(out.device):
        compose_kernel[grid](
            out,
            base.data,
            base.scales,
            base.code,
            s.A,
            s.B,
            s.C,
            s.D,
            s.scales,
            s.O,
            s.I,
            *triton_launch.strides(out),
            *base.strides,
            KIND=base.kind,
            BLOCKSIZE=base.blocksize,
            R1=s.r1,
            R2=s.r2,
            FORMS=s.forms,
            ROWS=tile.rows,
            COLS=tile.cols,
            CHUNK=RANK_CHUNK,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out


NONE, DENSE, NF4, INT8 = (tl.constexpr(kind) for kind in range(4))


class _Base(NamedTuple):
    """A base weight as the kernel takes it."""

    kind: int
    data: Tensor | None = None
    strides: tuple[int, int, int] = (0, 0, 0)
    scales: Tensor | None = None
    code: Tensor | None = None
    blocksize: int = 1


def _base(weight: Tensor | Nf4 | Int8 | None) -> _Base:
    if weight is None:
        return _Base(NONE.value)
    if isinstance(weight, Tensor):
        return _Base(DENSE.value, weight, triton_launch.strides(weight))
    O, I = weight.shape
    if isinstance(weight, Int8):
        return _Base(INT8.value, weight.values, triton_launch.strides(weight.values), weight.scale.contiguous())
    packed, absmax, code, blocksize, _ = weight
    if packed.numel() != (O * I + 1) // 2 or absmax.numel() != triton.cdiv(O * I, blocksize):
        raise ValueError(
            f"An NF4 weight [{O}, {I}] in blocks of {blocksize} has {(O * I + 1) // 2} bytes and"
            f" {triton.cdiv(O * I, blocksize)} scales; got {packed.numel()} and {absmax.numel()}."
        )
    return _Base(NF4.value, packed.contiguous(), (0, I, 1), absmax.contiguous(), code.contiguous(), blocksize)


@triton.jit
def compose_kernel(
    out,  # [E, O, I]
    weight,  # dense [E, O, I], packed NF4, int8 [O, I], or None
    weight_scales,  # NF4: of each block; int8: of each row
    code,  # NF4: sixteen values
    As,  # tuples, one entry for each adapter; [E, r1, I] contiguous
    Bs,  # [E, O, r1]
    Cs,  # [E, r2, I]
    Ds,  # [E, O, r2]
    scales,  # tuple of pointers to one number
    O,
    I,
    out_e,
    out_o,
    out_i,
    weight_e,
    weight_o,
    weight_i,
    KIND: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    FORMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    across = tl.cdiv(I, COLS)
    rows = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    e = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for n in tl.static_range(len(R1)):
        P = product(Bs[n] + e * O * R1[n], As[n] + e * I * R1[n], rows, cols, O, I, R1[n], CHUNK)
        Q = product(Ds[n] + e * O * R2[n], Cs[n] + e * I * R2[n], rows, cols, O, I, R2[n], CHUNK)
        total += tl.load(scales[n]) * displacement(P, Q, FORMS[n])
    inside = (rows < O)[:, None] & (cols < I)[None, :]
    # The weight is read after the products: read before them it would sit in registers that they need.
    i64 = rows.to(tl.int64)[:, None]
    if KIND != NONE:
        at = e * weight_e + i64 * weight_o + cols.to(tl.int64)[None, :] * weight_i
        if KIND == DENSE:
            base = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        elif KIND == NF4:
            byte = tl.load(weight + at // 2, mask=inside, other=0).to(tl.int32)
            nibble = tl.where(at % 2 == 0, byte >> 4, byte & 15)
            absmax = tl.load(weight_scales + at // BLOCKSIZE, mask=inside, other=0.0)
            base = tl.load(code + nibble) * absmax
        else:
            row_scale = tl.load(weight_scales + rows, mask=rows < O, other=0.0)
            base = tl.load(weight + at, mask=inside, other=0).to(tl.float32) * row_scale[:, None]
        total += base
    at_out = out + e * out_e + i64 * out_o + cols.to(tl.int64)[None, :] * out_i
    tl.store(at_out, total.to(out.dtype.element_ty), mask=inside)
