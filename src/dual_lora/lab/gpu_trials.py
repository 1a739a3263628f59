"""The trials of `dual-lora gpu-check`: every way of launching the kernels, signs, bits, graph, memory and times.

P and Q could be made on the matrix units, which are free while plain fp32 units work (`triton_launch.PRODUCTS`). What
would be lost is signs: rounded operands flip 90 (TF32) or 670 (bf16) in a million and move ΔW by 1.7 % or 5.2 %; three
TF32 products, whose sum has nearly fp32's bits, should flip as few as fp32 does. A card has to show that first.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dual_lora.core.kernels import check as triton_check
from dual_lora.core.kernels import compose as triton_compose
from dual_lora.core.kernels import gradient as triton_gradient
from dual_lora.core.kernels import launch as triton_launch
from dual_lora.core.kernels.check import Launch, Layout
from dual_lora.core.kernels.compose import compose
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, direction

RANK = 16  # r1 = r2
SIZE, TOKENS = 4096, 2048  # of the measurements on a card
ROUNDS = 20  # of each time
AS_EAGER = "as eager mode"


def all_launches(device: torch.device, dtype: torch.dtype, ranks: Sequence[tuple[int, int, Form]]) -> Iterator[Launch]:
    """Every way in which the kernels are launched with these ranks and that dtype: tile, alignment, order of sums."""
    target = triton_launch.target(device)
    for n, strides in ((16, (16, 1)), (0, (0, 1))):  # aligned, and shifted by one entry with rows of odd length
        layout = Layout(dtype, n == 16, strides)
        size = n, n, n
        tile = triton_compose.TILES[target]
        yield Launch("compose", device, False, tile, (0, n, n), tuple(ranks), (layout, Layout(dtype, True, strides)))
        for tile in triton_gradient.TILES[target, dtype.itemsize]:
            for deterministic in (False, True):
                yield Launch("gradient", device, deterministic, tile, size, tuple(ranks), (layout, layout))
            yield Launch("gradient", device, False, tile, (0, n, n), tuple(ranks), (None, layout))


def _try(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def measured(device: torch.device) -> dict[str, Any]:
    """Measure a card besides the launches. A measurement that fails is replaced by its error."""
    return {
        "signs": _try(lambda: {products: sign_flips(device, products, SIZE) for products in ("ieee", "tf32x3")}),
        "same bits twice": _try(lambda: same_bits(device, SIZE)),
        "CUDA graph": _try(lambda: graph(device)),
        "memory and time": _try(lambda: costs(device, SIZE, TOKENS)),
    }


def launches(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every tile, alignment and order of sums for that dtype: the error against fp64, and what it may be."""
    found = []
    for launch in all_launches(device, dtype, [(RANK, RANK, Form())]):
        limit = triton_check.TOLERANCE[dtype]
        error = _try(partial(triton_check.error, launch))
        right = isinstance(error, float) and error <= limit
        found.append({**_launch_facts(launch), "error": error, "limit": limit, "right": right})
    return found


def _launch_facts(launch: Any) -> dict[str, Any]:
    last = launch.tensors[-1]
    kernel = launch.kernel if launch.kernel == "compose" or launch.tensors[0] is not None else "gradient of G"
    return {
        "kernel": kernel,
        "dtype": str(last.dtype).removeprefix("torch."),
        "tile": "×".join(str(n) for n in launch.tile[:3] if n),
        "aligned": (launch.tensors[0] or last).aligned,
        "deterministic": launch.deterministic,
    }


def _case(device: torch.device, size: int, dtype: torch.dtype) -> tuple[Tensor, Adapter]:
    """A weight [size, size] and an adapter that requires gradients."""
    generator = torch.Generator(device).manual_seed(0)
    W = (torch.randn(size, size, generator=generator, device=device) * size**-0.5).to(dtype)
    shapes = (RANK, size), (size, RANK), (RANK, size), (size, RANK)
    factors = [torch.randn(s, generator=generator, device=device).mul_(0.02).requires_grad_() for s in shapes]
    return W, Adapter(Factors(*factors), torch.tensor(2.0, device=device), Form())


def sign_flips(device: torch.device, products: str, size: int, r: int = RANK) -> int:
    """Entries of Sign(D C), [size, size], in which the compose kernel differs from fp64; factors from N(0, 0.02²)."""
    generator = torch.Generator().manual_seed(0)
    C, D = (torch.randn(shape, generator=generator).mul(0.02).to(device) for shape in ((r, size), (size, r)))
    ones = torch.ones(1, size, device=device), torch.ones(size, 1, device=device)  # P = 1: ΔW is the sign itself
    adapter = Adapter(Factors(*ones, C, D), torch.ones((), device=device), Form())
    truth = direction(D.double() @ C.double(), adapter.form)
    return int((compose(None, [adapter], products=products) != truth).sum())


def same_bits(device: torch.device, size: int) -> dict[str, bool]:
    """Whether two runs give the same gradients, with atomic sums and with deterministic ones (these have to)."""
    _, adapter = _case(device, size, torch.float32)
    dy, x = (torch.randn(64, size, device=device) for _ in range(2))
    found = {}
    for name, deterministic in (("atomic", False), ("deterministic", True)):
        first, second = (
            triton_gradient.factor_gradients(dy, x, [adapter], deterministic=deterministic)[0] for _ in range(2)
        )
        found[name] = all(map(torch.equal, first, second))
    return found


def graph(device: torch.device) -> str:
    """Forward and backward captured as a CUDA graph and replayed on other numbers, against eager mode."""
    W, adapter = _case(device, 256, torch.float32)
    x = torch.randn(64, 256, device=device)

    def run() -> list[Tensor]:
        y = dual_lora_linear(x, W, None, [adapter])
        return [y, *torch.autograd.grad(y.sum(), adapter.factors)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = run()
    x.copy_(torch.randn_like(x))
    captured.replay()
    worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, run(), strict=True))
    return AS_EAGER if worst < 1e-4 else f"differs from eager mode by {worst:.2g}"


def costs(device: torch.device, size: int, tokens: int) -> dict[str, float]:
    """Bytes and seconds of one bf16 layer, forward and backward; seconds of its kernels; host seconds."""
    W, adapter = _case(device, size, torch.bfloat16)
    x, dy = (torch.randn(tokens, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()

    def layer() -> None:
        dual_lora_linear(x, W, None, [adapter]).backward(dy)
        for t in (x, *adapter.factors):
            t.grad = None

    layer()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    plain = adapter._replace(factors=Factors(*(f.detach() for f in adapter.factors)))
    return {
        "peak bytes": peak,
        "seconds": _seconds(layer),
        "compose seconds": _seconds(lambda: triton_compose.compose(W, [plain], torch.bfloat16)),
        "gradient seconds": _seconds(lambda: triton_gradient.factor_gradients(dy, x.detach(), [plain])),
        "copy of W seconds": _seconds(W.clone),
        "host seconds": _host_seconds(layer),
    }


def _seconds(run: Callable[[], object]) -> float:
    """Median time on the card."""
    times: list[float] = []
    for _ in range(ROUNDS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times)


def _host_seconds(run: Callable[[], object]) -> float:
    """Median time until Python goes on, the card still working."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interpret() -> list[dict[str, Any]]:
    """Every launch in Triton's interpreter, whose bf16 is wrong and left out."""
    device = torch.device("cpu")
    return [found for dtype in (torch.float32, torch.float16) for found in launches(device, dtype)]


def compile_for(card: str) -> list[dict[str, Any]]:
    """The usual launches in bf16 compiled for a card that is not there: shared memory, or what the compiler said."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    arch: Any = card if card.startswith("gfx") else int(card.removeprefix("sm_"))
    target = GPUTarget("hip", arch, 64) if card.startswith("gfx") else GPUTarget("cuda", arch, 32)

    class Absent:
        """The answers that Triton wants from a driver before it compiles."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels: list[Any] = []
    run, row = JITFunction.run, triton_launch.table_row(card)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Absent())
    triton_launch.target = lambda device: row  # type: ignore[assignment]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    found = []
    for launch in all_launches(torch.device("cpu"), torch.bfloat16, [(RANK, RANK, Form())]):
        described = _launch_facts(launch)
        if described["aligned"] and not launch.deterministic:
            error = _try(partial(triton_check.error, launch))
            compiled = isinstance(error, float)  # the number means nothing: nothing was launched
            shared = kernels[-1].metadata.shared if compiled else None
            found.append({**described, "right": compiled, "shared": shared, "error": None if compiled else error})
    return found


def main(what: str, *arguments: str) -> None:
    """One JSON line for each launch."""
    for line in interpret() if what == "interpret" else compile_for(*arguments):
        print(json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
