"""Dual LoRA in plain PyTorch: the definition that every faster implementation is compared with.

    P = B A     Q = D C     ΔW = s · ReLU(P) ⊙ Sign(Q)     s = λ α / √(r1 r2)     Sign(0) = -1

and of its relatives, ΔW = s · m(P) ⊙ d, whose d is Q (LoHa), W (HiRA), a fixed random sign or 1 (LoRA).

Xu et al., "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates", arXiv 2512.03402.

Legend for shapes: O out features, I in features, T tokens, r1 magnitude rank, r2 direction rank.
This file is slow and keeps several O × I tensors for backward: it is for comparison, not for training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .ieee import ieee_fp32

Ste = Literal["clip", "identity", "hardtanh", "surrogate"]
Magnitude = Literal["relu", "identity"]
Direction = Literal["sign", "identity", "frozen", "weight", "one"]
_STES, _MAGNITUDES, _DIRECTIONS = get_args(Ste), get_args(Magnitude), get_args(Direction)

TRAINED = ("sign", "identity")
"""Directions whose factors C and D train."""
SIGNED = ("sign", "frozen")
"""Directions of which only the sign is used."""

SHARPNESS = 4.0
"""k of the surrogate derivative, chosen by `results/surrogates/make.py`."""

TINY = 1e-30
"""A mean square of Q below this counts as zero."""


class Factors(NamedTuple):
    """The four trainable factors of one layer: magnitude (A, B) and direction (C, D)."""

    A: Tensor  # [r1, I]
    B: Tensor  # [O, r1]
    C: Tensor  # [r2, I]
    D: Tensor  # [O, r2]

    def rows(self, start: int, stop: int) -> Factors:
        """Select the factors of the rows start…stop of ΔW."""
        return Factors(self.A, self.B[start:stop], self.C, self.D[start:stop])


class Form(NamedTuple):
    """Which member of the family is computed. The defaults are the paper's method.

    ste: straight-through estimator of Sign's gradient H.
        "clip" (the paper): clip(H, -1, 1); "identity": H; "hardtanh": H where |Q| <= 1, else 0;
        "surrogate": H / (1 + (k Q / rms(Q))²), k = 4. A surrogate gradient (Neftci, Mostafa & Zenke 2019, "Surrogate
        gradient learning in spiking neural networks"): the derivative of atan instead of Sign's, as in Fang et al.
        2021; SuperSpike (Zenke & Ganguli 2018) has that of a fast sigmoid. Its width follows Q's root mean square
        over the whole matrix, a constant in backward, so that it is the same at every scale of D and C.
    magnitude: "relu", or "identity" for the ablation without ReLU.
    direction: "sign", or "identity" for the ablation without Sign. Without a direction group of their own: "frozen",
        Sign of a fixed random matrix, for which C and D are integers (`frozen.keys`); "weight", the base's weight
        itself; "one", no direction. `ste` matters for "sign" alone.
    live_zero: take ReLU's derivative at exactly 0 as 1, which lets a zero B train (the default start).
    plain: how many of the ranks of B A, the first, are added as they are, without m and d.
    """

    ste: Ste = "clip"
    magnitude: Magnitude = "relu"
    direction: Direction = "sign"
    live_zero: bool = False
    plain: int = 0

    def check(self) -> Form:
        """Return self, or raise ValueError naming the unknown choice and the known ones."""
        for field, known in zip(self._fields, (_STES, _MAGNITUDES, _DIRECTIONS), strict=False):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"Unknown {field} {value!r}: choose one of {', '.join(map(repr, known))}.")
        return self

    @property
    def trains_direction(self) -> bool:
        """Whether C and D are factors that train."""
        return self.direction in TRAINED

    @property
    def code(self) -> int:
        """This form as one integer, as operators take it. A form with plain ranks has none: see `Adapter.parts`."""
        assert not self.plain, "Adapter.parts"
        direction = _DIRECTIONS.index(self.direction)
        return (
            _STES.index(self.ste)
            | _MAGNITUDES.index(self.magnitude) << 2
            | (direction & 1) << 3
            | int(self.live_zero) << 4
            | direction >> 1 << 5
        )

    @classmethod
    @functools.cache
    def from_code(cls, code: int) -> Form:
        """The inverse of `code`."""
        direction = _DIRECTIONS[code >> 3 & 1 | code >> 5 << 1]
        return cls(_STES[code & 3], _MAGNITUDES[code >> 2 & 1], direction, bool(code >> 4 & 1))


PLAIN = Form(magnitude="identity", direction="one")
"""ΔW = s · B A, LoRA's."""


def scaling(alpha: float, r1: int, r2: int) -> float:
    """Return α / √(r1 r2), the scale of ΔW after the warm-up. Without a direction group: α / (2 r1), which is LoRA's
    lora_alpha / r, because α is twice `lora_alpha`."""
    return alpha / math.sqrt(r1 * r2) if r2 else alpha / (2 * r1)


def magnitude(P: Tensor, form: Form) -> Tensor:
    """Return ReLU(P), how far each weight moves; in the ablation, P."""
    return P.clamp(min=0) if form.magnitude == "relu" else P


def direction_of(C: Tensor, D: Tensor, form: Form, weight: Tensor | None = None) -> Tensor:
    """Return Q, [O, I]: D C (in wrapping int32 for frozen signs), the weight, or for "one" the number 1."""
    if form.direction == "weight":
        return require_weight(weight)
    if form.direction == "one":
        return D.new_ones(())
    return D * C if form.direction == "frozen" else D @ C


def require_weight(weight: Tensor | None) -> Tensor:
    """Return the weight that an update is multiplied by. Raises ValueError if it is None."""
    if weight is None:
        raise ValueError('The direction "weight" needs the weight that the update is multiplied by.')
    return weight


def direction(Q: Tensor, form: Form) -> Tensor:
    """Return Sign(Q), which way each weight moves (+1 where Q > 0, else -1); in the ablations, Q."""
    if form.direction not in SIGNED:
        return Q
    return 2 * (Q > 0).to(Q.dtype if Q.is_floating_point() else torch.get_default_dtype()) - 1


def mean_square_of(C: Tensor, D: Tensor) -> Tensor:
    """Return rms(Q)² of Q = D C, 0-dim ([E] for experts), from r2 × r2 numbers: ‖D C‖² = ⟨DᵀD, C Cᵀ⟩.

    It is computed in fp64 on CPUs and GPUs, because the terms may cancel; fp64 is not rounded by autocast or TF32.
    """
    wide = torch.float64 if C.device.type in ("cpu", "cuda") else torch.float32
    c, d = C.detach().to(wide), D.detach().to(wide)
    total = (d.mT @ d).mul(c @ c.mT).sum((-2, -1))
    return (total / (D.shape[-2] * C.shape[-1])).to(torch.promote_types(C.dtype, torch.float32))


def steepness(mean_square: Tensor) -> Tensor:
    """Return (k / rms(Q))², the surrogate's inverse squared width; 0 where Q is zero: the surrogate is the identity."""
    return torch.where(mean_square < TINY, 0.0, SHARPNESS**2 / mean_square)


class Adapter(NamedTuple):
    """One adapter's share of an update: its factors, its scale s (0-dim fp32 tensor) and its form.

    mean_square: rms(Q)² of the whole matrix, where the factors are those of a part and the form asks for it.
    """

    factors: Factors
    scale: Tensor
    form: Form
    mean_square: Tensor | None = None

    def with_mean_square(self) -> Adapter:
        """Return the adapter with `mean_square` filled in from its Q, if its form needs it and it is missing."""
        known = self.mean_square is not None or self.form.ste != "surrogate" or self.form.direction != "sign"
        return self if known else self._replace(mean_square=mean_square_of(self.factors.C, self.factors.D))

    def parts(self) -> list[Adapter]:
        """Split an adapter with plain ranks into two: the plain product and the rest."""
        if not (p := self.form.plain):
            return [self]
        A, B, C, D = self.factors
        none = Factors(A[..., :p, :], B[..., :p], A[..., :0, :], B[..., :0])
        other = Factors(A[..., p:, :], B[..., p:], C, D)
        return [Adapter(none, self.scale, PLAIN), self._replace(factors=other, form=self.form._replace(plain=0))]

    def without_row(self, row: int | None) -> Adapter:
        """Return the adapter with ΔW = 0 in that row (an embedding's padding); None: in no row."""
        if row is None:
            return self
        B = self.factors.B
        here = torch.arange(B.shape[0], device=B.device) == row
        return self._replace(factors=self.factors._replace(B=B.masked_fill(here.unsqueeze(1), 0.0)))

    def in_working_dtype(self, wide: bool = False) -> Adapter:
        """Return the adapter in the precision that P and Q are computed in: fp32, or fp64 for fp64 factors.

        wide: fp64, as another adapter of the sum has it.
        """
        dtype = torch.float64 if wide or self.factors.A.dtype == torch.float64 else torch.float32
        A, B, C, D = self.factors
        if dtype == A.dtype == B.dtype == self.scale.dtype and (
            dtype == C.dtype == D.dtype or not self.form.trains_direction
        ):
            return self
        if self.form.trains_direction:
            C, D = C.to(dtype), D.to(dtype)
        return self._replace(factors=Factors(A.to(dtype), B.to(dtype), C, D), scale=self.scale.to(dtype))


def with_factors(adapters: Sequence[Adapter], tensors: Iterable[Tensor]) -> list[Adapter]:
    """Return the adapters with other factors: four tensors for each, in their order."""
    given = iter(tensors)
    return [a._replace(factors=Factors(*islice(given, 4))) for a in adapters]


def parts_of(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return the adapters, sums as their two parts, in one precision: a model may get one after a cast to fp64."""
    first = adapters[0].factors.A.dtype
    for adapter in adapters:
        if adapter.form.plain or adapter.factors.A.dtype != first:
            wide = any(a.factors.A.dtype == torch.float64 for a in adapters)
            return [part.in_working_dtype(True) if wide else part for a in adapters for part in a.parts()]
    return adapters


def check_factors(adapters: Sequence[Adapter], *shape: int) -> None:
    """Raise ValueError for factors that do not make a weight of that shape, [O, I] or [E, O, I], or a trained scale."""
    *E, O, I = shape
    for (A, B, C, D), scale, *_ in adapters:
        if scale.requires_grad:
            refuse_trained(scale)
        r1, r2, received = A.shape[-2], C.shape[-2], (A.shape, B.shape, C.shape, D.shape)
        expected = (*E, r1, I), (*E, O, r1), (*E, r2, I), (*E, O, r2)
        if received != expected:
            got, wanted = (dict(zip("ABCD", map(tuple, shapes), strict=True)) for shapes in (received, expected))
            raise ValueError(f"Factors of shapes {got} do not fit a weight {[*shape]}: expected {wanted}.")


def product_gradients(
    G: Tensor,
    P: Tensor,
    Q: Tensor,
    scale: Tensor | float,
    form: Form,
    loss_scale: Tensor | float | None = None,
    mean_square: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ∂L/∂P and ∂L/∂Q from G = ∂L/∂W, all [O, I]; ∂L/∂Q is zero where no direction trains.

    loss_scale: the factor L by which a gradient scaler multiplies the loss. The clip depends on the gradient's size,
        so it acts on the unscaled gradient: clip(H / L, -1, 1) · L.
    mean_square: rms(Q)² of the whole matrix, for the surrogate, if Q is a part of it; by default that of Q.
    """
    H = scale * G * magnitude(P, form)
    dP = scale * G * direction(Q, form)
    if form.magnitude == "relu":
        dP = torch.where(P >= 0 if form.live_zero else P > 0, dP, 0.0)
    if not form.trains_direction:
        dQ = torch.zeros_like(H)
    elif form.direction == "identity" or form.ste == "identity":
        dQ = H
    elif form.ste == "hardtanh":
        dQ = torch.where(Q.abs() <= 1, H, 0.0)
    elif form.ste == "surrogate":
        whole = Q.square().mean((-2, -1), keepdim=True) if mean_square is None else mean_square
        dQ = H / (1 + steepness(whole) * Q.square())
    elif loss_scale is None:
        dQ = H.clamp(-1, 1)
    else:
        dQ = (H / loss_scale).clamp(-1, 1) * loss_scale
    return dP, dQ


class _Combine(torch.autograd.Function):
    """s · magnitude(P) ⊙ direction(Q) with the straight-through gradients above."""

    @staticmethod
    def forward(ctx, P, Q, scale, form, loss_scale):
        ctx.save_for_backward(P, Q)
        ctx.rest = scale, form, loss_scale
        return scale * magnitude(P, form) * direction(Q, form)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        scale, form, loss_scale = ctx.rest
        P, Q = ctx.saved_tensors
        dP, dQ = product_gradients(G, P, Q, scale, form, loss_scale)
        return dP, dQ if form.trains_direction else None, None, None, None


def refuse_trained(scale: Tensor | float) -> None:
    """Raise ValueError for a scale that requires a gradient: only the factors get gradients."""
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "The scale of a Dual LoRA adapter requires a gradient, and there is none for it: detach it, or multiply "
            "the factor B by it (a positive one scales ΔW as much)."
        )


def delta_weight(
    factors: Factors,
    scale: Tensor | float,
    form: Form = Form(),  # noqa: B008 - a NamedTuple is immutable
    loss_scale: Tensor | float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute ΔW, [O, I], in the factors' dtype, differentiable in the factors.

    weight: for the direction "weight", a constant.
    """
    refuse_trained(scale)
    A, B, C, D = factors
    p = form.plain
    with ieee_fp32():
        P, Q = B[:, p:] @ A[p:], direction_of(C, D, form, None if weight is None else weight.detach())
        update = _Combine.apply(P, Q, scale, form, loss_scale)
        return update if not p else update + scale * (B[:, :p] @ A[:p])


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Factors,
    scale: Tensor | float,
    form: Form = Form(),  # noqa: B008
    loss_scale: Tensor | float | None = None,
) -> Tensor:
    """Compute y = x (W + ΔW)ᵀ + bias; x [..., I] -> y [..., O]. Without a weight: x ΔWᵀ + bias."""
    W = delta_weight(factors, scale, form, loss_scale, weight)
    if weight is not None:
        W = weight + W
    return torch.nn.functional.linear(x, W.to(x.dtype), bias)
