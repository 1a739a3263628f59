"""How well do gradients through Sign fit a matrix? Run: python results/surrogates/make.py [steps]

Fits of 48 × 48 matrices that are Dual LoRA updates themselves (error 0 is possible), r1 = r2 = 3, LoRA with r = 6. All
draws, starts and rates of a method are fitted at once, in a few seconds. Printed: the median over the draws of the
relative squared error, each with its best rate and start. In the last fifth of the steps the smallest error counts.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

N, R, DRAWS, STARTS = 48, 3, 8, 2
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
SCALE = 2 * 2 * R / R  # α = 2 (r1 + r2) over √(r1 r2)
STD = 0.02

# Sign's derivative at z = k Q / rms(Q).
SURROGATES = {
    "tanh": lambda z: 1 - torch.tanh(z) ** 2,
    "Cauchy": lambda z: 1 / (1 + z * z),
    "triangle": lambda z: (1 - z.abs()).clamp(min=0),
}


class Sign(torch.autograd.Function):
    """+1 where Q > 0, else -1, with a gradient of our choice."""

    @staticmethod
    def forward(ctx, Q, kind, k):
        ctx.save_for_backward(Q)
        ctx.kind, ctx.k = kind, k
        return torch.where(Q > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, H):
        (Q,) = ctx.saved_tensors
        if ctx.kind == "hardtanh":
            H = H * (Q.abs() <= 1)
        elif ctx.kind in SURROGATES:
            rms = Q.square().mean((-2, -1), keepdim=True).sqrt()
            H = H * SURROGATES[ctx.kind](ctx.k * Q / rms)
        return H, None, None


def targets(generator: torch.Generator) -> Tensor:
    """[draws, N, N], of root mean square 1."""
    B, A, D, C = (torch.randn(DRAWS, *s, generator=generator) for s in ((N, R), (R, N)) * 2)
    T = (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
    return N * T / T.flatten(1).norm(dim=1)[:, None, None]


def fit(kind: str, k: float, target: Tensor, steps: int) -> float:
    """The median error of a method."""
    generator = torch.Generator().manual_seed(1)
    every = (DRAWS, STARTS, len(RATES))
    T = target[:, None, None].expand(*every, N, N)
    rate = torch.tensor(RATES).view(1, 1, -1, 1, 1)

    def draw(*shape: int, std: float = STD) -> Tensor:
        one = std * torch.randn(DRAWS, STARTS, 1, *shape, generator=generator)
        return one.expand(*every, *shape).clone().requires_grad_()

    if kind == "LoRA":
        factors = [draw(2 * R, N, std=1 / math.sqrt(N)), torch.zeros(*every, N, 2 * R, requires_grad=True)]
    else:
        factors = [draw(R, N), draw(N, R), draw(R, N), draw(N, R)]
    first, second = ([torch.zeros_like(f) for f in factors] for _ in range(2))
    best = torch.full(every, math.inf)
    for t in range(1, steps + 1):
        A, B, *others = factors
        if kind == "LoRA":
            W = 2 * (B @ A)
        else:
            C, D = others
            W = min(1, t / (0.05 * steps)) * SCALE * (B @ A).clamp(min=0) * Sign.apply(D @ C, kind, k)
        error = (W - T).square().mean((-2, -1))
        if t > 0.8 * steps:
            best = torch.minimum(best, error.detach().nan_to_num(nan=math.inf))
        error.sum().backward()
        decay = min(1.0, max(0.02, 2 * (steps - t) / steps))
        with torch.no_grad():
            for f, m, v in zip(factors, first, second, strict=True):
                m.lerp_(f.grad, 0.1)
                v.lerp_(f.grad.square(), 0.001)
                f -= rate * decay * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                f.grad = None
    return float(best.amin((1, 2)).median())


def main() -> None:
    """Print a line for each method."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
    target = targets(torch.Generator().manual_seed(7))
    methods = [("LoRA", 0.0), ("identity", 0.0), ("hardtanh", 0.0)]
    for kind, k in [*methods, *((kind, k) for kind in SURROGATES for k in (2.0, 4.0, 8.0))]:
        print(f"{kind:9} {f'k = {k:g}' if k else '':6} {fit(kind, k, target, steps):.3f}", flush=True)


if __name__ == "__main__":
    main()
