"""AdamW over the 840 factors of a SmolLM2-135M: loop, foreach, fused, and a step for each as its gradient arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import judge
from .finding import Finding, compared

RANK, LAYERS = 16, 30
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def findings(size: int, seconds: float) -> Iterator[Finding]:
    def made() -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        shapes = [s for O, I in SHAPES * LAYERS for s in ((RANK, I), (O, RANK)) * 2]
        leaves = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
        for leaf in leaves:
            leaf.grad = torch.randn(leaf.shape, generator=g)
        return leaves

    kinds = {"loop (torch's default)": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    leaves = {name: made() for name in (*kinds, "fused, one by one in backward")}
    steps: dict[str, Callable[[], object]] = {
        name: torch.optim.AdamW(leaves[name], lr=1e-4, **kind).step for name, kind in kinds.items()
    }
    single = [torch.optim.AdamW([leaf], lr=1e-4, fused=True) for leaf in leaves["fused, one by one in backward"]]
    steps["fused, one by one in backward"] = lambda: [each.step() for each in single]
    for step in steps.values():
        step()
    plain = leaves["loop (torch's default)"]
    for name in leaves:
        judge.check_close(*({str(k): v.detach() for k, v in enumerate(x)} for x in (leaves[name], plain)), 1e-6)
    saved = sum(leaf.nbytes for leaf in plain) / 2**20
    beside = {"fused, one by one in backward": f"no gradients between steps: {saved:.0f} MiB less; no accumulation"}
    yield from compared(steps, "loop (torch's default)", seconds, beside)
