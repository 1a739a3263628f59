"""Before a time counts: value and every gradient against the plain formula in fp64, by the relative rule.

    error of ours ≤ 2 × error of plain PyTorch at the same precision        (relative Frobenius norm against fp64)

Factors are small whole numbers × a power of two, so that P and Q are exact in any order of summation and no sign is a
matter of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dual_lora.core import reference
from dual_lora.core.reference import Factors, Form

# Below this, two fp32 results differ in the order of summation only.
FP32_NOISE = 2e-6


class WrongResult(AssertionError):
    """A kernel that computes something else; it is not timed."""


def exact_factors(O: int, I: int, r1: int, r2: int, seed: int = 0) -> Factors:
    """Factors of a standard deviation of about 0.03 whose products are exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    return Factors(*(torch.randint(-3, 4, s, generator=g) / 64 for s in ((r1, I), (O, r1), (r2, I), (O, r2))))


def results(
    x: Tensor,
    weight: Tensor | None,
    adapters: Sequence[tuple[Factors, Tensor]],
    dy: Tensor,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """y, dx and the gradients of each adapter's factors (with its scale) by `reference.linear`; in `dtype` throughout,
    or (None) as given.
    """

    def cast(t: Tensor) -> Tensor:
        return t if dtype is None else t.to(dtype)

    xs = cast(x).detach().requires_grad_()
    leaves = [Factors(*(cast(f).detach().requires_grad_() for f in four)) for four, _ in adapters]
    y: Tensor | None = None
    for k, (four, (_, scale)) in enumerate(zip(leaves, adapters, strict=True)):
        base = None if weight is None or k else cast(weight)  # which every adapter's share is added to once
        share = reference.linear(xs, base, None, four, cast(scale), Form())
        y = share if y is None else y + share
    if y is None:
        raise ValueError("Got no adapter to judge: pass at least one.")
    y.backward(cast(dy))
    return {"y": y.detach(), "dx": xs.grad, **gradients(leaves)}  # type: ignore[dict-item]


def gradients(adapters: Sequence[Factors]) -> dict[str, Tensor]:
    """What backward has left in the factors: dA … dD of one adapter, dA0, dA1 … of several."""
    return {
        f"d{letter}{k if len(adapters) > 1 else ''}": f.grad  # type: ignore[misc]
        for k, four in enumerate(adapters)
        for letter, f in four._asdict().items()
    }


def error(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))


def check(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative rule for every name in `ours`; returns our errors, raises WrongResult naming the worst."""
    errors = {name: error(value, truth[name]) for name, value in ours.items()}
    for name, value in errors.items():
        allowed = 2 * error(plain[name], truth[name]) + FP32_NOISE
        if not value <= allowed:
            raise WrongResult(f"{name} is wrong by {value:.2e} (relative), allowed {allowed:.2e}: not timed.")
    return errors


def check_close(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], allowed: float) -> None:
    """For whole models: two fp32 computations of the same values, each within `allowed` of the other."""
    if ours.keys() != plain.keys():
        raise WrongResult(f"Different results to compare: {sorted(ours.keys() ^ plain.keys())[:4]}.")
    for name, value in ours.items():
        if not (e := error(value, plain[name])) <= allowed:
            raise WrongResult(f"{name} differs from naive autograd by {e:.2e} (relative), allowed {allowed:.2e}.")
