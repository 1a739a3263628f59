"""An independent account of the method for the tests: value and gradients written out, in fp64, without autograd.

Nothing of it comes from the package; the package's `reference` is compared with it like everything else.

    P = B A    Q = D C    ΔW = s · ReLU(P) ⊙ Sign(Q)    y = x (W + ΣΔW)ᵀ + bias
    G = dyᵀ x    H = s G ⊙ ReLU(P)    ∂P = s G ⊙ Sign(Q) ⊙ 1[P > 0]    ∂Q = STE(H)
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch

FORMS = [
    dict(ste=ste, magnitude=magnitude, direction=direction, live_zero=live_zero)
    for ste, magnitude, direction, live_zero in itertools.product(
        ("clip", "identity", "hardtanh", "surrogate"), ("relu", "identity"), ("sign", "identity"), (False, True)
    )
]


def name_of(form):
    return "-".join(str(v) for v in form.values())


class Case(NamedTuple):
    """One set of inputs. factors: a list of (A, B, C, D), one for each adapter; scales, forms: the same length."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    factors: list
    scales: list
    forms: list
    dy: torch.Tensor
    loss_scale: float | None = None


def make_case(
    T=63, I=100, O=577, ranks=((3, 5),), forms=None, dtype=torch.float32, low=None, bias=True, seed=0, lead=None
):
    """Inputs whose P and Q are multiples of 1/16 and exact in every precision, zeros among them.

    So implementations agree on every sign and every kink (the scales are powers of two as well), and Sign(0) and
    ReLU'(0) are tested on the way. dy is scaled so that the clip has entries on both sides. low: the dtype of
    everything but the factors.
    """
    gen = torch.Generator().manual_seed(seed)
    forms = [{}] * len(ranks) if forms is None else forms
    lead = (T,) if lead is None else lead

    def quarters(*shape):
        return torch.randint(-3, 4, shape, generator=gen).to(dtype) / 4

    factors = [(quarters(r1, I), quarters(O, r1), quarters(r2, I), quarters(O, r2)) for r1, r2 in ranks]
    low = low or dtype
    x = (torch.randn(*lead, I, generator=gen) / I**0.5).to(low)
    weight = (torch.randn(O, I, generator=gen) / I**0.5).to(low)
    dy = (torch.randn(*lead, O, generator=gen) * 8).to(low)
    b = torch.randn(O, generator=gen).to(low) if bias else None
    return Case(x, weight, b, factors, [0.25 * 2**k for k in range(len(ranks))], forms, dy)


def expected(case):
    """(value, gradients by name) of a case, in fp64, by numpy."""
    f64 = lambda t: t.detach().double().numpy()  # noqa: E731
    x = f64(case.x).reshape(-1, case.x.shape[-1])
    dy = f64(case.dy).reshape(x.shape[0], -1)
    G = dy.T @ x
    W = np.zeros_like(G) if case.weight is None else f64(case.weight).copy()
    grads = {}
    for k, (factors, s, form) in enumerate(zip(case.factors, case.scales, case.forms, strict=True)):
        A, B, C, D = map(f64, factors)
        s = float(torch.tensor(s, dtype=case.factors[0][0].dtype))
        P, Q = B @ A, D @ C
        relu = form.get("magnitude", "relu") == "relu"
        sign = form.get("direction", "sign") == "sign"
        m = np.maximum(P, 0) if relu else P
        d = np.where(Q > 0, 1.0, -1.0) if sign else Q
        W += s * m * d
        dP = s * G * d
        if relu:
            dP = dP * (P >= 0 if form.get("live_zero") else P > 0)
        dQ = s * G * m
        ste = form.get("ste", "clip") if sign else "identity"
        L = 1.0 if case.loss_scale is None else case.loss_scale
        if ste == "clip":
            dQ = np.clip(dQ / L, -1, 1) * L
        elif ste == "hardtanh":
            dQ = dQ * (np.abs(Q) <= 1)
        elif ste == "surrogate" and Q.any():
            dQ = dQ / (1 + 16 * Q**2 / np.mean(Q**2))
        grads |= {f"A{k}": B.T @ dP, f"B{k}": dP @ A.T, f"C{k}": D.T @ dQ, f"D{k}": dQ @ C.T}
    y = x @ W.T
    grads["x"] = (dy @ W).reshape(case.x.shape)
    if case.weight is not None:
        grads["weight"] = G
    if case.bias is not None:
        y = y + f64(case.bias)
        grads["bias"] = dy.sum(0)
    return torch.from_numpy(y).view(case.dy.shape), {name: torch.from_numpy(g) for name, g in grads.items()}


def leaves(case):
    """The differentiable inputs by the names of `expected`, as fresh leaves that require gradients."""
    named = {"x": case.x, "weight": case.weight, "bias": case.bias}
    named |= {f"{n}{k}": f for k, four in enumerate(case.factors) for n, f in zip("ABCD", four, strict=True)}
    # detach() and not clone(): strides are part of the case.
    return {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}


def run(function, case):
    """Value and gradients, by name, of function(x, weight, bias, factors, scales, forms, loss_scale)."""
    inputs = leaves(case)
    factors = [tuple(inputs[f"{n}{k}"] for n in "ABCD") for k in range(len(case.factors))]
    y = function(
        inputs["x"], inputs.get("weight"), inputs.get("bias"), factors, case.scales, case.forms, case.loss_scale
    )
    y.backward(case.dy.to(y.dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in inputs.items()}


def truth(case):
    y, grads = expected(case)
    return {"y": y} | grads


def operator(x, weight, bias, factors, scales, forms, loss_scale=None):
    """The package's operator on the inputs of a case."""
    from dual_lora.core.op import dual_lora_linear
    from dual_lora.core.reference import Adapter, Factors, Form

    dtype = factors[0][0].dtype
    adapters = [
        Adapter(Factors(*four), torch.tensor(s, dtype=dtype), Form(**form))
        for four, s, form in zip(factors, scales, forms, strict=True)
    ]
    L = None if loss_scale is None else torch.tensor(loss_scale)
    return dual_lora_linear(x, weight, bias, adapters, L)


def reference(x, weight, bias, factors, scales, forms, loss_scale=None):
    """The package's reference implementation on the inputs of a case with one adapter."""
    from dual_lora.core import reference
    from dual_lora.core.reference import Factors, Form

    (four,), (scale,), (form,) = factors, scales, forms
    return reference.linear(x, weight, bias, Factors(*four), scale, Form(**form), loss_scale)
