"""One tile of P = B A and Q = D C, and of the rules made of them, for every Triton kernel.

The formula of `reference.py` in the language of tiles: `magnitude`, `direction` and `product_gradients`.
P and Q are fp32 sums over the rank in ascending order whatever the tile, so that all kernels agree on signs.
"""

import triton
import triton.language as tl

from ..reference import Form

# A form reaches the kernels as Form.code, a compile-time integer; these are its bits.
STE = tl.constexpr(Form(ste="identity").code | Form(ste="hardtanh").code | Form(ste="surrogate").code)
CLIP = tl.constexpr(Form(ste="clip").code)
HARDTANH = tl.constexpr(Form(ste="hardtanh").code)
SURROGATE = tl.constexpr(Form(ste="surrogate").code)
SIGNED = tl.constexpr(Form(magnitude="identity").code)
UNSIGNED = tl.constexpr(Form(direction="identity").code)
FROZEN = tl.constexpr(Form(direction="frozen").code)
WEIGHT = tl.constexpr(Form(direction="weight").code)
ONE = tl.constexpr(Form(direction="one").code)
DIRECTION = tl.constexpr(UNSIGNED.value | FROZEN.value | WEIGHT.value | ONE.value)
UNTRAINED = tl.constexpr((FROZEN.value | ONE.value) & ~UNSIGNED.value)  # the weight's code has a bit of both
LIVE_ZERO = tl.constexpr(Form(live_zero=True).code)


@triton.jit
def expert(routed):
    """Return the index of this program's expert, int64: its second grid index, or that entry of `routed`."""
    e = tl.program_id(1).to(tl.int64)
    if routed is not None:
        e = tl.load(routed + e)
    return e


@triton.jit
def product(left, right, rows, cols, O, I, R: tl.constexpr, CHUNK: tl.constexpr, PRODUCTS: tl.constexpr):
    """left[rows] @ right[:, cols], fp32; left [O, R], right [R, I], contiguous. Zero beyond O and I."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in range(0, R, CHUNK):
        k = start + tl.arange(0, CHUNK)
        at_left = left + rows.to(tl.int64)[:, None] * R + k[None, :]
        at_right = right + k.to(tl.int64)[:, None] * I + cols[None, :]
        a = tl.load(at_left, mask=(rows < O)[:, None] & (k < R)[None, :], other=0.0)
        b = tl.load(at_right, mask=(k < R)[:, None] & (cols < I)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRODUCTS)
    return acc


@triton.jit
def direction_product(
    D, C, weight, weight_o, weight_i, rows, cols, O, I,
    R: tl.constexpr, CHUNK: tl.constexpr, PRODUCTS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Q = D C, fp32: a product of factors, or of integers that wrap around; or the weight, or ones."""
    if DIRECTION & FORM == FROZEN:
        d = tl.load(D + rows, mask=rows < O, other=1)
        c = tl.load(C + cols, mask=cols < I, other=1)
        Q = (d[:, None] * c[None, :]).to(tl.float32)
    elif DIRECTION & FORM == WEIGHT:
        at = weight + rows.to(tl.int64)[:, None] * weight_o + cols.to(tl.int64)[None, :] * weight_i
        Q = tl.load(at, mask=(rows < O)[:, None] & (cols < I)[None, :], other=0.0).to(tl.float32)
    elif DIRECTION & FORM == ONE:
        Q = tl.full((rows.shape[0], cols.shape[0]), 1.0, tl.float32)
    else:
        Q = product(D, C, rows, cols, O, I, R, CHUNK, PRODUCTS)
    return Q


@triton.jit
def magnitude(P, FORM: tl.constexpr):
    if not SIGNED & FORM:
        P = tl.where(P < 0, 0.0, P)  # not maximum(): NaN has to stay NaN
    return P


@triton.jit
def direction(Q, FORM: tl.constexpr):
    if not (UNSIGNED | ONE) & FORM:
        Q = tl.where(Q > 0, 1.0, -1.0)
    return Q


@triton.jit
def product_gradients(G, P, Q, loss_scale, steep, FORM: tl.constexpr):
    """Compute ∂L/∂P and ∂L/∂Q (meaningless where no direction trains) from a G that carries the scale s.

    loss_scale: pointer to one fp32, or None.
    steep: pointer to the surrogate's `steepness`; the other estimators do not read it.
    """
    H = G * magnitude(P, FORM)
    dP = G * direction(Q, FORM)
    if not SIGNED & FORM:
        if LIVE_ZERO & FORM:
            dP = tl.where(P >= 0, dP, 0.0)
        else:
            dP = tl.where(P > 0, dP, 0.0)
    dQ = H
    if not (UNSIGNED | UNTRAINED) & FORM:
        if STE & FORM == HARDTANH:
            dQ = tl.where(tl.abs(Q) <= 1, H, 0.0)
        elif STE & FORM == SURROGATE:
            dQ = H / (1 + tl.load(steep) * Q * Q)
        elif STE & FORM == CLIP:
            if loss_scale is not None:
                L = tl.load(loss_scale)
                dQ = _clip(H / L) * L
            else:
                dQ = _clip(H)
    return dP, dQ


@triton.jit
def _clip(H):
    return tl.where(H < -1, -1.0, tl.where(H > 1, 1.0, H))
