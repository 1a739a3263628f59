"""The formula of `reference` on one tile, in place; `blocked` and `whole` call it.

T  = m(P) ⊙ d(Q)              the update, without its scale s; Q may also be integers, W or nothing
∂P = G ⊙ 1[P > 0] ⊙ d(Q)      where G carries the scale; P >= 0 with `live_zero`; no mask without ReLU
∂Q = STE(G ⊙ m(P))
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ieee import ieee_fp32
from .product import factors_mm
from .reference import SIGNED, TRAINED, Adapter, Form, steepness

# A normal number: where subnormal ones are flushed, such a bound would be zero.
JUST_BELOW_ZERO = -torch.finfo(torch.float32).tiny
_threshold_backward = torch.ops.aten.threshold_backward.grad_input  # G where P > a bound, else 0
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.grad_input  # G where Q > 0, else slope · G

ALL = slice(None)


def products(
    adapter: Adapter,
    rows: slice = ALL,
    cols: slice = ALL,
    P: Tensor | None = None,
    Q: Tensor | None = None,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute P = B A and Q = D C of a tile in true fp32, into these buffers if given. weight: the base's tile."""
    A, B, C, D = adapter.factors
    if rows is not ALL:
        B, D = B[rows], D[rows]
    if cols is not ALL:
        A, C = A[:, cols], C[:, cols]
    with ieee_fp32():
        P = factors_mm(B, A, P)
        if adapter.form.direction in TRAINED:
            return P, factors_mm(D, C, Q)
    Q = torch.empty_like(P) if Q is None else Q
    if adapter.form.direction == "frozen":  # rounding an integer to fp32 keeps its sign
        integers = torch.mul(D, C, out=Q.view(torch.int32)) if Q.dtype == torch.float32 else D * C
        return P, Q.copy_(integers)
    if adapter.form.direction == "weight":
        assert weight is not None
        return P, weight if weight.dtype == P.dtype else Q.copy_(weight)
    return P, Q  # Q is not read for the direction "one"


def update(P: Tensor, Q: Tensor, form: Form, out: Tensor) -> Tensor:
    """Compute T into `out`, which may be P."""
    M = torch.clamp(P, min=0, out=out) if form.magnitude == "relu" else P
    if form.direction in SIGNED:
        return _leaky_relu_backward(M, Q, -1.0, False, grad_input=out)  # Sign(0) = -1 comes with it
    return M if form.direction == "one" else torch.mul(M, Q, out=out)


def add_update(base: Tensor, T: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return W + s T, in `out` if it is given."""
    s = number(scale)
    return torch.addcmul(base, T, s, out=out) if isinstance(s, Tensor) else torch.add(base, T, alpha=s, out=out)


class Estimator(NamedTuple):
    """Computes an adapter's ∂P and ∂Q from s G; from an unscaled G, the same divided by s."""

    form: Form
    bound: Any  # where the clip acts: a number, or a tensor where that is on a device
    steep: Any  # the surrogate's

    def product_gradients(self, G: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ∂P and ∂Q in the memory of G and P. ∂Q is None if no direction trains; else Q is overwritten too."""
        form = self.form
        if form.magnitude == "relu":
            _threshold_backward(G, P, JUST_BELOW_ZERO if form.live_zero else 0.0, grad_input=G)
        if form.direction == "one":
            return G, None
        if form.direction not in TRAINED:
            return (
                _leaky_relu_backward(G, Q, -1.0, False, grad_input=G) if form.direction in SIGNED else G.mul_(Q)
            ), None
        H = P.mul_(G)
        if form.direction != "sign":
            return G.mul_(Q), H
        dP = _leaky_relu_backward(G, Q, -1.0, False, grad_input=G)
        if form.ste == "clip":
            H.clamp_(-self.bound, self.bound)
        elif form.ste == "surrogate":
            H.div_(Q.mul_(Q).mul_(self.steep).add_(1))
        elif form.ste == "hardtanh":
            H.masked_fill_(Q.abs_().le(1).logical_not_(), 0.0)
        return dP, H


def estimator(adapter: Adapter, loss_scale: Tensor | None, G_is_scaled: bool) -> Estimator:
    """Return an adapter's estimator. G_is_scaled: whether G carries the scale s.

    The surrogate needs the adapter's `mean_square`.
    """
    form = adapter.form
    bound: Any = math.inf
    steep: Any = 0.0
    if form.direction == "sign" and form.ste == "clip":  # the clip depends on the gradient's size
        bound = 1.0 if loss_scale is None else number(loss_scale)
        if not G_is_scaled:
            s: Any = number(adapter.scale)
            bound = math.inf if isinstance(s, float) and s == 0 else bound / abs(s)
    elif adapter.mean_square is not None:
        steep = number(steepness(adapter.mean_square))
    return Estimator(form, bound, steep)


def number(scale: Tensor) -> float | Tensor:
    """Return a Python number if reading it needs no synchronisation with a device, else the tensor."""
    return scale.item() if scale.device.type == "cpu" else scale
