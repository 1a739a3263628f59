"""q, k and v of one block through one composed weight: one y, one dx and one G in the place of three."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dual_lora.core import blocked, product
from dual_lora.core.blocked import Adapter, Needs
from dual_lora.core.reference import Form

from .. import judge
from .finding import Finding, compared

T, RANK = 1024, 16
SHAPES = {"SmolLM2-135M": (576, (576, 192, 192)), "grouped, wider": (1024, (1024, 256, 256))}


def findings(size: int, seconds: float) -> Iterator[Finding]:
    for name, (I, outs) in SHAPES.items():
        x, dy = torch.randn(T, I), torch.randn(T, sum(outs))
        weights = [torch.randn(O, I) / I**0.5 for O in outs]
        scale = torch.tensor(4.0)
        adapters = [[Adapter(judge.exact_factors(O, I, RANK, RANK, k), scale, Form())] for k, O in enumerate(outs)]
        needs = Needs(x=True, weight=False, factors=True)

        def three(x=x, dy=dy, weights=weights, adapters=adapters, outs=outs, needs=needs) -> dict[str, Tensor]:
            parts = list(zip(weights, adapters, dy.split(outs, 1), strict=True))
            y = [blocked.forward(x, W, a) for W, a, _ in parts]
            grads = [blocked.backward(part, x, W, a, None, needs) for W, a, part in parts]
            return _named(y, sum(g.x for g in grads), [g.factors[0] for g in grads])

        def one(x=x, dy=dy, weights=weights, adapters=adapters, outs=outs, I=I) -> dict[str, Tensor]:
            y = product.mm(x, _composed(weights, adapters, outs, I).t())
            dx = product.mm(dy, _composed(weights, adapters, outs, I))
            G = product.mm(product.left(dy.t()), x)
            parts = zip(adapters, G.split(outs), strict=True)
            return _named(list(y.split(outs, 1)), dx, [blocked.factor_gradients(part, a, None)[0] for a, part in parts])

        judge.check_close(one(), three(), 1e-5)
        yield from compared({"three layers": three, f"q, k, v as one, {name}": one}, "three layers", seconds)


def _composed(weights: list[Tensor], adapters: list[list[Adapter]], outs: tuple[int, ...], I: int) -> Tensor:
    whole = torch.empty(sum(outs), I)
    for W, a, rows in zip(weights, adapters, whole.split(outs), strict=True):
        blocked.compose(W, a, torch.float32, out=rows)
    return whole


def _named(y: list[Tensor], dx: Tensor, factors: list) -> dict[str, Tensor]:
    grads = {f"d{n}{k}": f for k, four in enumerate(factors) for n, f in zip("ABCD", four, strict=True)}
    return {**{f"y{k}": part for k, part in enumerate(y)}, "dx": dx, **grads}
