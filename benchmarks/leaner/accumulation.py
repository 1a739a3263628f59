"""Micro-batches: G summed over them and masked once; and G from some of the tokens.

With `identity` (and `hardtanh`) ∂P and ∂Q are linear in G, so that the sum may come before the mask. The paper's `clip`
looks at the values of each micro-batch's gradient: there the sum is another method.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dual_lora.core import blocked, product
from dual_lora.core.blocked import Adapter, Needs
from dual_lora.core.reference import Form

from .. import judge
from .finding import Finding, compared

BATCHES, T, RANK = 4, 256, 16


def findings(size: int, seconds: float) -> Iterator[Finding]:
    W = torch.randn(size, size) / size**0.5
    batches = [(torch.randn(T, size), torch.randn(T, size)) for _ in range(BATCHES)]
    factors = judge.exact_factors(size, size, RANK, RANK)

    def adapters(ste) -> list[Adapter]:
        return [Adapter(factors, torch.tensor(4.0), Form(ste=ste))]

    def each(ste="identity") -> dict[str, Tensor]:
        parts = [blocked.backward(dy, x, W, adapters(ste), None, Needs(True, False, True)).factors for x, dy in batches]
        return {f"d{n}": sum(p[0][k] for p in parts) for k, n in enumerate("ABCD")}

    def summed(ste="identity", keep=1) -> dict[str, Tensor]:
        G = torch.zeros(size, size)
        for x, dy in batches:
            blocked.backward(dy, x, W, adapters(ste), None, Needs(True, False, False))
            product.addmm_(G, product.left(dy[::keep].t()), x[::keep])
        return blocked.factor_gradients(G.mul_(keep), adapters(ste), None)[0]._asdict()

    def named(grads: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"d{n[-1]}": g for n, g in grads.items()}

    judge.check_close(named(summed()), each(), 1e-5)
    clipped, half = (judge.error(named(summed(**o))[n], each(o.get("ste", "identity"))[n]) for o, n in
                     (({"ste": "clip"}, "dC"), ({"keep": 2}, "dA")))  # fmt: skip
    yield Finding(
        "G summed, clip", "each micro-batch", None, f"dC moves by {clipped:.0%} where the clip acts", exact=False
    )
    beside = {"G summed, identity": "4 bytes a weight more", "G of every second token": f"dA wrong by {half:.0%}"}
    variants = {"each micro-batch": each, "G summed, identity": summed,
                "G of every second token": lambda: summed(keep=2)}  # fmt: skip
    yield from compared(variants, "each micro-batch", seconds, beside, ["G of every second token"])
