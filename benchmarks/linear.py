"""Forward and backward of one linear layer, for every method, against the floor: the products that have to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import judge, layers
from .measure import Measured, interleave

BLOCK = 128  # rows of P and Q in the floor; products of that size are as fast as larger ones


def measure(
    O: int,
    I: int,
    T: int,
    dtype: torch.dtype,
    threads: int,
    seconds: float,
    methods: tuple[str, ...] = ("dual", "lora", "full", "floor"),
    rank: int = layers.RANK,
) -> Measured:
    """Check ours, then time all variants. Costs are seconds of one forward and backward, dx included."""
    g = torch.Generator().manual_seed(0)
    W = (torch.randn(O, I, generator=g) / I**0.5).to(dtype)
    x, dy = torch.randn(T, I, generator=g).to(dtype), torch.randn(T, O, generator=g).to(dtype)
    modules = {m: layers.linear(m, W, rank) for m in methods if m != "floor"}
    products = floor(x, W, dy, rank // 2, rank // 2) if "floor" in methods else None
    return compare(modules, x, W, dy, products, threads, seconds)


def compare(
    modules: dict[str, Any],
    x: Tensor,
    W: Tensor,
    dy: Tensor,
    products: Callable[[], object] | None,
    threads: int,
    seconds: float,
) -> Measured:
    """Check modules["dual"], whose base is or stands for W, then time all of them, and the floor if it is given."""
    check(modules["dual"], x, W, dy)
    variants: dict[str, Callable[[], object]] = {m: step(module, x, dy) for m, module in modules.items()}
    if products is not None:
        variants["floor"] = products
    return interleave(variants, layers.pairs(variants), threads, seconds)


def check(layer: Any, x: Tensor, W: Tensor, dy: Tensor) -> None:
    """Value and every gradient of our layer, of all its adapters, against the formula in fp64; raises WrongResult."""
    names = list(layer.states)
    for k, name in enumerate(names):
        four = layer.factors(name)
        layers.fill(layer, judge.exact_factors(*W.shape, four.A.shape[0], four.C.shape[0], seed=k), name)
    xs = x.clone().requires_grad_()
    y = layer(xs)
    y.backward(dy)
    stored = [layer.factors(name) for name in names]
    ours = {"y": y.detach(), "dx": xs.grad, **judge.gradients(stored)}
    adapters = [(layer.factors(name), layer.adapter(name).scale) for name in names]
    plain = judge.results(x, W, adapters, dy)
    truth = judge.results(x, W, adapters, dy, torch.float64)
    judge.check(ours, plain, truth)
    layer.zero_grad(set_to_none=True)


def step(layer: Any, x: Tensor, dy: Tensor) -> Callable[[], None]:
    x = x.clone().requires_grad_()

    def run() -> None:
        layer(x).backward(dy)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return run


def floor(x: Tensor, W: Tensor, dy: Tensor, r1: int, r2: int) -> Callable[[], None]:
    """y, dx and G at full size; P and Q twice and four small gradients, in fp32, on a block that stays in cache."""
    (T, I), O = x.shape, W.shape[0]
    y, dx, G = x.new_empty(T, O), x.new_empty(T, I), x.new_empty(O, I)
    A, B, C, D = judge.exact_factors(O, I, r1, r2)
    dA, dB, dC, dD = (torch.zeros_like(f) for f in (A, B, C, D))
    block = torch.empty(BLOCK, I)

    def run() -> None:
        torch.mm(x, W.t(), out=y)
        torch.mm(dy, W, out=dx)
        torch.mm(dy.t(), x, out=G)
        for start in range(0, O, BLOCK):
            rows = slice(start, start + BLOCK)
            part = block[: B[rows].shape[0]]
            for _ in ("forward", "backward"):
                torch.mm(B[rows], A, out=part)
                torch.mm(D[rows], C, out=part)
            dA.addmm_(B[rows].t(), part)
            dB[rows].addmm_(part, A.t())
            dC.addmm_(D[rows].t(), part)
            dD[rows].addmm_(part, C.t())

    return run


def kept_for_backward(O: int, I: int, T: int, dtype: torch.dtype) -> Measured:
    """Bytes that autograd keeps between our forward and backward, against those of x, W and the factors."""
    W = torch.randn(O, I).to(dtype)
    layer = layers.linear("dual", W)
    x = torch.randn(T, I).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.ndim:  # the scale is one number
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    inputs = sum(t.nbytes for t in (x, W, *layers.factors_of(layer)))
    return Measured({"dual": [float(sum(kept.values()))], "inputs": [float(inputs)]}, "bytes", 1)
