"""Costs as they grow (tokens, size, rank, adapters) with the flop limit, and the sweep of block sizes.

Every point of a curve is tested first, value and every gradient of every adapter. These take longer than the gates;
their rows go into the ledger, and `plot` draws them from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import flops, judge, layers, ledger, linear
from .measure import Measured, interleave

THREADS = 1


class Point(NamedTuple):
    """One place on one curve."""

    curve: str
    at: int
    O: int
    I: int
    T: int
    rank: int
    adapters: int = 1

    @property
    def limit(self) -> float:
        """Ratio to LoRA that the arithmetic allows."""
        size = self.T, self.O, self.I, self.rank, self.adapters
        return flops.dual(*size) / flops.lora(*size)


CURVES: dict[str, tuple[Point, ...]] = {
    "tokens": tuple(Point("tokens", T, 2048, 2048, T, 32) for T in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)),
    "size": tuple(Point("size", n, n, n, 512, 32) for n in (512, 1024, 2048, 4096, 8192)),
    "rank": tuple(Point("rank", r, 2048, 2048, 512, r) for r in (4, 8, 16, 32, 64, 128, 256)),
    "adapters": tuple(Point("adapters", k, 1024, 1024, 512, 32, k) for k in range(1, 9)),
}


def run(only: list[str], seconds: float, write: bool) -> None:
    """Measure the curves (those named in `only`, or all), fp32, forward and backward against LoRA."""
    source = ledger.provenance()
    for name in [c for c in CURVES if not only or c in only]:
        print(f"{name:>10}  against LoRA   limit by flops")
        for point in CURVES[name]:
            measured = measure(point, seconds / 4)
            ratio = measured.ratio("dual", "lora")
            print(f"{point.at:>10}  {ratio.median:12.2f}   {point.limit:14.2f}", flush=True)
            row = ledger.row(source, "curve", name, point._asdict(), measured, "dual", "lora")
            if write:
                ledger.append([{**row, "at": point.at, "limit": round(point.limit, 4)}])


def measure(point: Point, seconds: float) -> Measured:
    """Seconds of forward and backward at one point, ours checked first."""
    if point.adapters == 1:
        return linear.measure(
            point.O, point.I, point.T, torch.float32, THREADS, seconds, ("dual", "lora"), rank=point.rank
        )
    g = torch.Generator().manual_seed(0)
    W = torch.randn(point.O, point.I, generator=g) / point.I**0.5
    x, dy = (torch.randn(point.T, n, generator=g) for n in (point.I, point.O))
    return linear.compare({m: _several(m, W, point) for m in ("dual", "lora")}, x, W, dy, None, THREADS, seconds)


def _several(method: str, W: torch.Tensor, point: Point) -> Any:
    """One layer with several adapters, all of them active and trained."""
    layer = layers.linear(method, W, point.rank)
    config = layers.config(method, ["linear"], point.rank)
    names = ["default", *(f"more{k}" for k in range(1, point.adapters))]
    for name in names[1:]:
        if method == "dual":
            layer.update_layer(name, point.rank // 2, point.rank // 2, None, config=config)
        else:
            layer.update_layer(name, point.rank, lora_alpha=2 * point.rank, config=config)
    layer.set_adapter(names)
    return layer


TILES = (1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19)
PANELS = (4 << 20, 8 << 20, 16 << 20, 32 << 20)
SWEPT = ((576, 576, 1024, "float32"), (1536, 576, 1024, "float32"), (4096, 4096, 512, "float32"),
         (4096, 4096, 512, "bfloat16"))  # fmt: skip


def run_blocks(only: list[str], seconds: float, write: bool) -> None:
    """The sweep that `core/blocked.py` takes its sizes from: forward and backward against the present choice."""
    from dual_lora.core import blocked

    source, chosen = ledger.provenance(), blocked.CPU
    for O, I, T, dtype in SWEPT:
        name = f"{O}×{I} T{T} {dtype}"
        if only and not any(word in name for word in only):
            continue
        measured = interleave(dict(_blocks(O, I, T, dtype)), [], THREADS, seconds, rounds=(3, 5))
        blocked.CPU = chosen
        print(f"{name}: chosen tile {chosen.tile}, block {chosen.block >> 20} MiB", file=sys.stderr)
        rows = []
        for variant in measured.costs:
            row = ledger.row(source, "blocks", name, {"O": O, "I": I, "T": T}, measured, variant, _label(chosen))
            print(f"  {variant:<28} {row['ratio']:.3f}", flush=True)
            rows.append(row)
        if write:
            ledger.append(rows)


def _label(sizes: Any) -> str:
    return f"tile {sizes.tile}, block {sizes.block >> 20} MiB"


def _blocks(O: int, I: int, T: int, dtype: str) -> Iterator[tuple[str, Callable[[], None]]]:
    from dual_lora.core import blocked
    from dual_lora.core.reference import Form

    kind = getattr(torch, dtype)
    W, x, dy = ((torch.randn(s) / I**0.5).to(kind) for s in ((O, I), (T, I), (T, O)))
    factors = judge.exact_factors(O, I, layers.RANK // 2, layers.RANK // 2)
    adapters = [blocked.Adapter(factors, torch.tensor(4.0), Form())]
    needs = blocked.Needs(x=True, weight=False, factors=True)

    def with_sizes(sizes: Any) -> Callable[[], None]:
        def run() -> None:
            blocked.CPU = sizes
            blocked.forward(x, W, adapters)
            blocked.backward(dy, x, W, adapters, None, needs)

        return run

    for sizes in dict.fromkeys([blocked.CPU, *(blocked.Sizes(t, p) for t in TILES for p in PANELS)]):
        yield _label(sizes), with_sizes(sizes)
