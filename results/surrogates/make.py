"""How well do gradients through Sign fit a matrix? Run: python results/surrogates/make.py [--steps 600 --starts 1]

Fits of 48 × 48 matrices, r1 = r2 = 3 against LoRA with r = 6, by Adam. All draws, starts and rates of a method are
fitted at once, in a few seconds. Printed: the median over the draws of the relative squared error, each with its best
rate and start. In the last fifth of the steps the smallest error counts.

Targets: a Dual LoRA update (error 0 is possible), the same without Sign, a Gaussian, and a spectrum of 1/k.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor

N, R, DRAWS = 48, 3, 8
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
SCALE = 2 * 2 * R / R  # α = 2 (r1 + r2) over √(r1 r2)

# Sign's derivative at z = k Q / rms(Q).
WINDOWS = {
    "tanh": lambda z: 1 - torch.tanh(z) ** 2,
    "Cauchy": lambda z: 1 / (1 + z * z),
    "parabola": lambda z: (1 - z * z).clamp(min=0),
    "triangle": lambda z: (1 - z.abs()).clamp(min=0),
    "box": lambda z: (z.abs() <= 1).to(z.dtype),
}


@dataclass
class Method:
    """What is fitted: a window and its k, or another form; and one idea beside it."""

    kind: str  # "LoRA", "identity", "hardtanh", "no Sign", "BA ⊙ DC", or a window
    k: float = 1.0
    note: str = ""
    std: float = 0.02  # of the start
    ratio: float = 1.0  # rate of C and D over that of A and B
    by_row: bool = False  # rms(Q) of each row
    annealed: float = 1.0  # k begins at that part of itself and grows geometrically
    leak: float = 0.0  # ReLU's derivative below 0, in backward alone

    @property
    def title(self) -> str:
        """As it is printed."""
        return " ".join([self.kind, *([f"k = {self.k:g}"] if self.kind in WINDOWS else []), self.note]).strip()


BASIC = [
    Method("Cauchy", 4),
    Method("Cauchy", 2),
    Method("tanh", 2),
    Method("box", 1),
    Method("hardtanh"),
    Method("BA ⊙ DC"),
    Method("no Sign"),
    Method("LoRA"),
    Method("identity"),
    Method("Cauchy", 8),
    Method("tanh", 4),
    Method("parabola", 1),
    Method("triangle", 1),
    Method("box", 2),
]
CHOSEN = ("Cauchy", 4)
IDEAS = [
    *(Method(*CHOSEN, f"rate of C, D × {x:g}", ratio=x) for x in (0.25, 4)),
    Method(*CHOSEN, "rms by row", by_row=True),
    Method(*CHOSEN, "k from a quarter", annealed=0.25),
    Method(*CHOSEN, "k from 1/16", annealed=1 / 16),
    *(Method(*CHOSEN, f"start at {x:g}", std=x) for x in (0.1, 0.5)),
    Method(*CHOSEN, "ReLU leaks 0.1", leak=0.1),
    Method("hardtanh", note="start at 0.5", std=0.5),
    Method("identity", note="ReLU leaks 0.1", leak=0.1),
]


class Sign(torch.autograd.Function):
    """+1 where Q > 0, else -1, with a gradient of our choice."""

    @staticmethod
    def forward(ctx, Q, method, k):
        ctx.save_for_backward(Q)
        ctx.rest = method, k
        return torch.where(Q > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, H):
        (Q,) = ctx.saved_tensors
        method, k = ctx.rest
        if method.kind == "hardtanh":
            H = H * (Q.abs() <= 1)
        elif method.kind in WINDOWS:
            rms = Q.square().mean(-1 if method.by_row else (-2, -1), keepdim=True).sqrt()
            H = H * WINDOWS[method.kind](k * Q / rms)
        return H, None, None


def targets() -> dict[str, Tensor]:
    """[draws, N, N] each, of root mean square 1."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(DRAWS, *shape, generator=generator)

    B, A, D, C = (normal(*s) for s in ((N, R), (R, N)) * 2)
    U, V = (torch.linalg.qr(normal(N, N))[0] for _ in range(2))
    found = {
        "a Dual LoRA update": (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0),
        "ReLU(BA) ⊙ DC": (B @ A).clamp(min=0) * (D @ C),
        "Gaussian": normal(N, N),
        "spectrum 1/k": U / torch.arange(1, N + 1) @ V,
    }
    return {name: N * T / T.flatten(1).norm(dim=1)[:, None, None] for name, T in found.items()}


def update(factors: list[Tensor], method: Method, progress: float) -> Tensor:
    """The fitted matrix at that share of the steps, [..., N, N]."""
    A, B, *others = factors
    if method.kind == "LoRA":
        return 2 * (B @ A)
    C, D = others
    P, Q = B @ A, D @ C
    if method.kind != "BA ⊙ DC":
        P = P.clamp(min=0) + method.leak * (P.clamp(max=0) - P.clamp(max=0).detach())
    if method.kind not in ("BA ⊙ DC", "no Sign"):
        Q = Sign.apply(Q, method, method.k * method.annealed ** (1 - progress))
    return min(1, progress / 0.05) * SCALE * P * Q


def fit(method: Method, target: Tensor, steps: int, starts: int) -> float:
    """The median error of a method."""
    generator = torch.Generator().manual_seed(1)
    every = (DRAWS, starts, len(RATES))
    T = target[:, None, None].expand(*every, N, N)
    rate = torch.tensor(RATES).view(1, 1, -1, 1, 1)

    def draw(*shape: int, std: float = method.std) -> Tensor:
        one = std * torch.randn(DRAWS, starts, 1, *shape, generator=generator)
        return one.expand(*every, *shape).clone().requires_grad_()

    if method.kind == "LoRA":
        factors = [draw(2 * R, N, std=1 / math.sqrt(N)), torch.zeros(*every, N, 2 * R, requires_grad=True)]
    else:
        factors = [draw(R, N), draw(N, R), draw(R, N), draw(N, R)]
    rates = [rate, rate, rate * method.ratio, rate * method.ratio]
    first, second = ([torch.zeros_like(f) for f in factors] for _ in range(2))
    best = torch.full(every, math.inf)
    for t in range(1, steps + 1):
        error = (update(factors, method, t / steps) - T).square().mean((-2, -1))
        if t > 0.8 * steps:
            best = torch.minimum(best, error.detach().nan_to_num(nan=math.inf))
        error.sum().backward()
        decay = min(1.0, max(0.02, 2 * (steps - t) / steps))
        with torch.no_grad():
            for f, m, v, lr in zip(factors, first, second, rates, strict=False):
                m.lerp_(f.grad, 0.1)
                v.lerp_(f.grad.square(), 0.001)
                f -= lr * decay * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                f.grad = None
    return float(best.amin((1, 2)).median())


def main() -> None:
    """Print a table: a row for each method, a column for each target."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--starts", type=int, default=2)
    options = vars(parser.parse_args())
    print("| method |", " | ".join(targets()), "|\n|" + "---|" * (1 + len(targets())))
    for method in [*BASIC, *IDEAS]:
        errors = (fit(method, target, **options) for target in targets().values())
        print(f"| {method.title} |", *(f"{e:.3f} |" for e in errors), flush=True)


if __name__ == "__main__":
    main()
