"""The gradients of the four factors from dy and x, tile by tile: G = dyᵀ x never reaches memory.

    each program    G = a tile of dyᵀ x, summed over the tokens in registers, fp32
                    P, Q recomputed; ∂P, ∂Q by the rule of `reference.product_gradients`
                    dA += Bᵀ ∂P    dB += ∂P Aᵀ    dC += Dᵀ ∂Q    dD += ∂Q Cᵀ

A tile's four small products belong to sums over other programs. Two ways of adding them up:

* atomic (the default): fp32 atomic additions into the results; nothing else is allocated, and the order of
  the additions, so the last bits, change from run to run;
* deterministic: each program writes its share, one sum afterwards. The shares take about
  4 (r1 + r2) O I (1/rows + splits/cols) bytes for a tile of rows × cols, 48 MiB for 4096 × 4096 at rank 32.

Several adapters share one G. A G that exists already (of a composed weight) is read instead of computed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ieee import wants_tf32
from ..reference import Adapter, Factors, steepness
from . import launch as triton_launch
from .launch import Tile
from .product import UNTRAINED, direction_product, expert, product, product_gradients

# Of the four small products: what the inputs themselves carry. By "tf32" and "bf16" ∂P, ∂Q and the factors are rounded
# to 11 or 8 bits on their way into the matrix units, sums stay fp32. Signs and masks do not depend on it.
PRECISIONS = {torch.float32: "ieee", torch.float16: "tf32", torch.bfloat16: "bf16"}

BAND = tl.constexpr(8)
"""Rows of tiles that are walked through together, so that a part of x is read from cache."""

RANKS = 16
"""Ranks of the factor gradients made at a time: the least that the matrix units take without padding."""

UNALIGNED = 64 * 64  # entries of the largest tile for inputs that are not aligned

# (device, bytes of an input's element): tiles, the largest first. The first that fills the device is taken.
# 128 × 256 spills up to 480 bytes a thread on sm_90, outside the loop over tokens: the columns that wait
# for their turn. It stays because it reads each of dy and x half as often as 128 × 128 does, which spills nothing.
TILES = {
    ("sm_80", 2): (Tile(128, 128, 32, 8, 4, splits=4), Tile(64, 64, 32, 4, 4)),
    ("sm_80", 4): (Tile(64, 64, 16, 4, 3, splits=2), Tile(32, 64, 16, 4, 3)),
    ("sm_90", 2): (Tile(128, 256, 64, 8, 3, splits=4), Tile(128, 128, 64, 8, 3, splits=2), Tile(64, 64, 64, 4, 4)),
    ("sm_90", 4): (Tile(64, 64, 32, 8, 3), Tile(32, 64, 32, 4, 3)),
    ("gfx942", 2): (Tile(128, 128, 32, 8, 2, splits=2), Tile(64, 64, 32, 4, 2)),
    ("gfx942", 4): (Tile(64, 64, 16, 4, 2), Tile(32, 64, 16, 4, 2)),
    ("interpreter", 2): (Tile(64, 64, 32, 4, 1, splits=2),),
    ("interpreter", 4): (Tile(32, 64, 32, 4, 1, splits=4),),
}


def factor_gradients(
    dy: Tensor | None,
    x: Tensor,
    adapters: Sequence[Adapter],
    loss_scale: Tensor | None = None,
    deterministic: bool | None = None,
    routed: Tensor | None = None,
    tile: Tile | None = None,
    weight: Tensor | None = None,
) -> list[Factors]:
    """Compute dA, dB, dC, dD of each adapter, fp32, in the shapes of its factors.

    dy [T, O] and x [T, I]: one floating dtype, any strides. Or no dy, and x is G: [O, I] or [E, O, I].
    adapters: fp32 factors, scale s as an fp32 tensor on the device (it is never read back) and form of each.
    loss_scale: one fp32 number on the device; the "clip" estimator acts on H / loss_scale.
    deterministic: the same bits in every run. By default torch.are_deterministic_algorithms_enabled().
    routed: int64 [N], the experts whose G is read; the gradients of the others are zero.
    tile: by default what `tile_for` chooses.
    weight: [O, I], of any float dtype and strides, for updates that multiply it; others do not read it.

    Raises ValueError for shapes or dtypes that do not fit together.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    fp32 = "tf32" if wants_tf32() else "ieee"
    adapters = [a.with_mean_square() for a in adapters]
    # The kernel takes a steepness for every adapter; estimators that do not read it get the scale in its place.
    weight = weight if triton_launch.multiplies_weight(adapters) else None
    steeps = tuple(a.scale if a.mean_square is None else steepness(a.mean_square) for a in adapters)
    given = (dy, x, routed, weight, loss_scale, *steeps, *(t for a in adapters for t in (*a.factors, a.scale)))
    settings = tile, deterministic, fp32, triton_launch.PRODUCTS, tuple(a.form for a in adapters)
    key = x.device, gradient_kernel.fn, *settings, triton_launch.signature(given)
    plan = triton_launch.plans.get(key)
    if plan is not None:
        down, across = plan.result
        targets = [_targets(a.factors, a.form.trains_direction, down, across, deterministic) for a in adapters]
        letters = zip(*(a.factors for a in adapters), strict=True)
        scales = tuple(a.scale for a in adapters)
        plan.launch(dy, x, routed, weight, *letters, *zip(*targets, strict=True), scales, steeps, loss_scale)
        return _totals(targets, deterministic)
    s = triton_launch.stack(adapters)
    triton_launch.check_weight(weight, adapters)
    _check(dy, x, s)
    batch = s.batch if routed is None else routed.numel()
    if batch * s.shape.numel() * x.shape[-2] == 0:
        return [Factors(*map(torch.zeros_like, a.factors)) for a in adapters]
    O, I = s.shape[-2:]
    tile = tile or tile_for(O, I, batch, dy, x)
    down, across = triton_launch.tile_count(O, tile.rows), triton_launch.tile_count(I, tile.cols)
    result = down, across * tile.splits
    targets = [_targets(a.factors, a.form.trains_direction, *result, deterministic) for a in adapters]
    triton_launch.first_launch(
        key if s.as_given else None,
        x.device,
        gradient_kernel,
        (down * across, batch, 1),
        (dy, x, routed, weight, *s.letters, *zip(*targets, strict=True), s.scales, steeps, loss_scale),
        (
            x.shape[-2],
            O,
            I,
            s.batch,
            *((0, 0) if dy is None else dy.stride()),
            *triton_launch.strides(x),
            *((0, 0) if weight is None else weight.stride()),
        ),
        result=result,
        TOKENS=tile.tokens,
        SPLITS=tile.splits,
        RANKS=RANKS,
        PRODUCTS=triton_launch.PRODUCTS,
        INPUT_PRECISION=fp32,
        PRECISION=PRECISIONS[x.dtype],
        ATOMIC=not deterministic,
        **s.constants,
        **tile.constants(),
    )
    return _totals(targets, deterministic)


def _targets(factors: Factors, trains: bool, down: int, across: int, deterministic: bool) -> Factors:
    """Allocate one adapter's gradients: sums, or (deterministic) the programs' shares, [down or across, …]."""
    if deterministic:
        # The shares of experts without tokens, and of a direction that does not train, are never written.
        new = factors.A.new_empty if factors.A.ndim == 2 and trains else factors.A.new_zeros
        return Factors(*(new((n, *f.shape)) for f, n in zip(factors, (down, across) * 2, strict=True)))
    sizes = [f.numel() for f in factors]
    flat = factors.A.new_zeros(sum(sizes))  # one allocation, one fill
    return Factors(*(part.view(f.shape) for part, f in zip(flat.split_with_sizes(sizes), factors, strict=True)))


def _totals(targets: list[Factors], deterministic: bool) -> list[Factors]:
    return [Factors(*(t.sum(0) for t in four)) for four in targets] if deterministic else targets


def _check(dy: Tensor | None, x: Tensor, s: triton_launch.Stack) -> None:
    named = {"G": x} if dy is None else {"dy": dy, "x": x}
    received = [tuple(t.shape) for t in named.values()]
    expected = [tuple(s.shape)] if dy is None else [(x.shape[-2], n) for n in s.shape[-2:]]
    if received != expected:
        raise ValueError(f"{' and '.join(named)} of shape {received}: expected {expected}.")
    dtypes = {t.dtype for t in named.values()}
    if dtypes != {x.dtype} or x.dtype not in PRECISIONS:
        known = ", ".join(map(str, PRECISIONS))
        raise ValueError(f"{' and '.join(named)} of {dtypes}: cast them to the same, one of {known}.")


def tile_for(O: int, I: int, batch: int, dy: Tensor | None, x: Tensor) -> Tile:
    """Choose the largest tile that still gives enough programs to keep three quarters of the device busy.

    Inputs that are not aligned to 16 bytes take more registers: with them the largest tiles would spill.
    """
    tiles = TILES[triton_launch.target(x.device), x.element_size()]
    given = (x,) if dy is None else (dy, x)
    aligned = all(t.data_ptr() % 16 == 0 and all(n == 1 or n % 16 == 0 for n in t.stride()) for t in given)
    for tile in tiles:
        programs = batch * triton_launch.tile_count(O, tile.rows) * triton_launch.tile_count(I, tile.cols)
        fits = aligned or tile.rows * tile.cols <= UNALIGNED
        if fits and 4 * programs >= 3 * triton_launch.processors(x.device):
            return tile
    return tiles[-1]


@triton.jit
def gradient_kernel(
    dy,  # [T, O], or None
    x,  # [T, I], or G [E, O, I]
    routed,  # [N] or None
    weight,  # [O, I], for a direction that is the weight, or None
    As,  # tuples, one entry for each adapter; [E, r1, I] contiguous
    Bs,  # [E, O, r1]
    Cs,  # [E, r2, I]
    Ds,  # [E, O, r2]
    dAs,  # the same shapes, or [down, E, r1, I] …
    dBs,  # … [across, E, O, r1] for shares
    dCs,
    dDs,
    scales,  # tuple of pointers to one number
    steeps,  # tuple of pointers, [E] each for the surrogate
    loss_scale,  # pointer to one number, or None
    T,
    O,
    I,
    E,
    dy_t,
    dy_o,
    x_e,
    x_t,  # G: rows
    x_i,
    weight_o,
    weight_i,
    R1: tl.constexpr,
    R2: tl.constexpr,
    FORMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PRECISION: tl.constexpr,
    ATOMIC: tl.constexpr,
):
    down, across = tl.cdiv(O, ROWS), tl.cdiv(I, COLS)
    block_o, block_i = tl.swizzle2d(tl.program_id(0) // across, tl.program_id(0) % across, down, across, BAND)
    rows = block_o * ROWS + tl.arange(0, ROWS)
    cols = block_i * COLS + tl.arange(0, COLS)
    e = expert(routed)
    if dy is None:
        at = x + e * x_e + rows.to(tl.int64)[:, None] * x_t + cols.to(tl.int64)[None, :] * x_i
        G = tl.load(at, mask=(rows < O)[:, None] & (cols < I)[None, :], other=0.0).to(tl.float32)
    else:
        G = _tile_of_G(dy, x, T, rows, cols, O, I, dy_t, dy_o, x_t, x_i, TOKENS, INPUT_PRECISION)
    splits = _split_columns(G, SPLITS)
    for j in tl.static_range(SPLITS):
        part = block_i * COLS + j * (COLS // SPLITS) + tl.arange(0, COLS // SPLITS)
        if ATOMIC:
            share_o, share_i = e, e
        else:
            share_o = block_o.to(tl.int64) * E + e
            share_i = (block_i * SPLITS + j).to(tl.int64) * E + e
        for n in tl.static_range(len(R1)):
            A, B = As[n] + e * I * R1[n], Bs[n] + e * O * R1[n]
            C, D = Cs[n] + e * I * R2[n], Ds[n] + e * O * R2[n]
            P = product(B, A, rows, part, O, I, R1[n], CHUNK, PRODUCTS)
            Q = direction_product(D, C, weight, weight_o, weight_i, rows, part, O, I, R2[n], CHUNK, PRODUCTS, FORMS[n])
            dP, dQ = product_gradients(splits[j] * tl.load(scales[n]), P, Q, loss_scale, steeps[n] + e, FORMS[n])
            if PRECISION == "bf16":  # at once: it halves what waits in registers
                dP, dQ = dP.to(tl.bfloat16), dQ.to(tl.bfloat16)
            _add_factors(dP, B, A, dBs[n] + share_i * O * R1[n], dAs[n] + share_o * I * R1[n],
                         rows, part, O, I, R1[n], RANKS, PRECISION, ATOMIC)  # fmt: skip
            if not UNTRAINED & FORMS[n]:
                _add_factors(dQ, D, C, dDs[n] + share_i * O * R2[n], dCs[n] + share_o * I * R2[n],
                             rows, part, O, I, R2[n], RANKS, PRECISION, ATOMIC)  # fmt: skip


@triton.jit
def _split_columns(G, SPLITS: tl.constexpr):
    """G's columns in 1, 2 or 4 equal splits, in order; registers are renamed, nothing moves."""
    if SPLITS == 1:
        parts = (G,)
    elif SPLITS == 2:
        parts = _halves(G)
    else:
        tl.static_assert(SPLITS == 4)
        left, right = _halves(G)
        parts = _halves(left) + _halves(right)  # Triton 3.4 knows no recursion
    return parts


@triton.jit
def _halves(G):
    return tl.split(tl.permute(tl.reshape(G, (G.shape[0], 2, G.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _tile_of_G(dy, x, T, rows, cols, O, I, dy_t, dy_o, x_t, x_i, TOKENS: tl.constexpr, PRECISION: tl.constexpr):
    """dy[:, rows]ᵀ @ x[:, cols], fp32. Tiles are read as they are multiplied: then both copies are asynchronous."""
    G = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    t = tl.arange(0, TOKENS)
    at_dy = dy + rows.to(tl.int64)[:, None] * dy_o + t.to(tl.int64)[None, :] * dy_t
    at_x = x + t.to(tl.int64)[:, None] * x_t + cols.to(tl.int64)[None, :] * x_i
    for start in range(0, T, TOKENS):
        left = start + t < T
        a = tl.load(at_dy, mask=(rows < O)[:, None] & left[None, :], other=0.0)
        b = tl.load(at_x, mask=left[:, None] & (cols < I)[None, :], other=0.0)
        G = tl.dot(a, b, G, input_precision=PRECISION)
        at_dy += TOKENS * dy_t
        at_x += TOKENS * x_t
    return G


@triton.jit
def _add_factors(
    dZ, left, right, d_left, d_right, rows, cols, O, I, R: tl.constexpr,
    RANKS: tl.constexpr, PRECISION: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """d_left += dZ @ rightᵀ and d_right += leftᵀ @ dZ, some ranks at a time; left [O, R], right [R, I]."""
    for start in range(0, R, RANKS):
        k = start + tl.arange(0, RANKS)
        in_left, in_right = (rows < O)[:, None] & (k < R)[None, :], (cols < I)[:, None] & (k < R)[None, :]
        at_left = rows.to(tl.int64)[:, None] * R + k[None, :]
        at_right = k.to(tl.int64)[None, :] * I + cols[:, None]
        a = tl.load(left + at_left, mask=in_left, other=0.0)
        b = tl.load(right + at_right, mask=in_right, other=0.0)
        da = _small_dot(dZ, b, PRECISION)
        db = _small_dot(tl.trans(dZ), a, PRECISION)
        if ATOMIC:
            tl.atomic_add(d_left + at_left, da, mask=in_left, sem="relaxed")
            tl.atomic_add(d_right + at_right, db, mask=in_right, sem="relaxed")
        else:
            tl.store(d_left + at_left, da, mask=in_left)
            tl.store(d_right + at_right, db, mask=in_right)


@triton.jit
def _small_dot(a, b, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        c = tl.dot(a, b.to(tl.bfloat16))
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    return c
