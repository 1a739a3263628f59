"""W + ΔW, tile by tile: weight and factors in, composed weight out, nothing in between in memory.

    out = round(W + Σ s_n · ReLU(B_n A_n) ⊙ Sign(D_n C_n))

The sum is made in fp32 and rounded once, to the output's dtype. Several adapters, and several experts [E, O, I], go in
one launch. On the CPU this runs in Triton's interpreter only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Adapter
from . import launch as triton_launch
from .launch import Tile
from .product import direction, direction_product, expert, magnitude, product

# 64 × 64 on four warps spills nothing and needs 128 to 188 registers, by the compiler's version: 8 to 16 warps share a
# multiprocessor, and one program's loads hide under another's products.
TILE = Tile(rows=64, cols=64, tokens=0, warps=4, stages=1)
TILES = {"sm_80": TILE, "sm_90": TILE, "gfx942": TILE, "interpreter": TILE}


def compose(
    weight: Tensor | None,
    adapters: Sequence[Adapter],
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    routed: Tensor | None = None,
    products: str | None = None,
) -> Tensor:
    """Compose W + Σ ΔW_n, [O, I] or [E, O, I].

    weight: the base, of any float dtype and strides, or None for ΔW alone.
    adapters: fp32 factors (int32 C and D of frozen signs), scale s as an fp32 tensor on the device (it is never read
        back) and form of each. In a batch the factors have a leading dimension E and share the scale.
    out_dtype: of the result; by default the weight's, else fp32.
    out: where to write. It may be `weight` itself: each entry is read once, before it is written.
    routed: int64 [N], the experts to write; the others of `out` are left as they are.
    products: precision of P and Q; by default `triton_launch.PRODUCTS`.

    Raises ValueError for shapes that do not fit together, factors or scales that are not fp32 and unknown forms.
    """
    out_dtype = out_dtype or (torch.float32 if weight is None else weight.dtype)
    products = products or triton_launch.PRODUCTS
    given = weight, out, routed, *(t for a in adapters for t in (*a.factors, a.scale))
    key = compose_kernel.fn, out_dtype, products, tuple(a.form for a in adapters), triton_launch.signature(given)
    plan = triton_launch.plans.get((adapters[0].scale.device, *key)) if adapters else None
    if plan is not None:
        out = torch.empty(plan.result, dtype=out_dtype, device=plan.device) if out is None else out
        letters = zip(*(a.factors for a in adapters), strict=True)
        plan.launch(out, weight, routed, *letters, tuple(a.scale for a in adapters))
        return out
    s = triton_launch.stack(adapters)
    triton_launch.check_weight(weight, adapters)
    if weight is not None and weight.shape != s.shape:
        raise ValueError(f"The weight has shape {tuple(weight.shape)}, the factors make {tuple(s.shape)}.")
    if out is None:
        out = torch.empty(s.shape, dtype=out_dtype, device=s.scales[0].device)
    elif out.shape != s.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, the factors make {tuple(s.shape)}.")
    batch = s.batch if routed is None else routed.numel()
    if out.numel() * batch == 0:
        return out
    tile, (O, I) = TILES[triton_launch.target(out.device)], s.shape[-2:]
    triton_launch.first_launch(
        (out.device, *key) if s.as_given else None,
        out.device,
        compose_kernel,
        (triton_launch.tile_count(O, tile.rows) * triton_launch.tile_count(I, tile.cols), batch, 1),
        (out, weight, routed, *s.letters, s.scales),
        (O, I, *triton_launch.strides(out), *triton_launch.strides(out if weight is None else weight)),
        result=tuple(s.shape),
        PRODUCTS=products,
        **s.constants,
        **tile.constants(),
    )
    return out


@triton.jit
def compose_kernel(
    out,  # [E, O, I]
    weight,  # [E, O, I] or None
    routed,  # [N] or None
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
    R1: tl.constexpr,
    R2: tl.constexpr,
    FORMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCTS: tl.constexpr,
):
    across = tl.cdiv(I, COLS)
    rows = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % across * COLS + tl.arange(0, COLS)
    e = expert(routed)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for n in tl.static_range(len(R1)):
        P = product(Bs[n] + e * O * R1[n], As[n] + e * I * R1[n], rows, cols, O, I, R1[n], CHUNK, PRODUCTS)
        D, C, W = Ds[n] + e * O * R2[n], Cs[n] + e * I * R2[n], None if weight is None else weight + e * weight_e
        Q = direction_product(D, C, W, weight_o, weight_i, rows, cols, O, I, R2[n], CHUNK, PRODUCTS, FORMS[n])
        total += tl.load(scales[n]) * (magnitude(P, FORMS[n]) * direction(Q, FORMS[n]))
    inside = (rows < O)[:, None] & (cols < I)[None, :]
    # The weight is read after the products: read before them it would sit in registers that they need.
    i64, j64 = rows.to(tl.int64)[:, None], cols.to(tl.int64)[None, :]
    if weight is not None:
        at = weight + e * weight_e + i64 * weight_o + j64 * weight_i
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + e * out_e + i64 * out_o + j64 * out_i, total.to(out.dtype.element_ty), mask=inside)
