"""What a card is asked before it is trusted: `dual-lora gpu-check`.

On a card: which path is chosen and why, every way of launching the kernels against fp64, signs, determinism, a CUDA
graph, a second card, memory and times. Without one: what would be chosen on named cards, the kernels compiled for them
ahead of time, and the same launches in Triton's interpreter. Triton is an interpreter or a compiler from its import on,
so those two run in processes of their own: `python -m dual_lora.lab.gpu_check interpret | compile TARGET`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dual_lora.core import dispatch, triton_check, triton_compose, triton_gradient, triton_launch
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form
from dual_lora.lab import gpu_trials
from dual_lora.lab.run.record import version_of

RANK = 16  # r1 = r2
SIZE, TOKENS = 4096, 2048  # of the measurements on a card
ROUNDS = 20  # of each time
CARDS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
AS_EAGER = "as eager mode"
COMPILED = ("sm_80", "sm_90")  # ahead of time, unless others are named


def check(targets: tuple[str, ...] = COMPILED, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Everything that can be found out here, as JSON takes it. `right` is False if a kernel is wrong or breaks."""
    result: dict[str, Any] = {"versions": versions(), "chosen": {card: chosen(card) for card in CARDS}}
    if torch.cuda.is_available():
        cards = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        result["cards"] = [on_card(card, tell) for card in cards]
        tried = [launch for card in result["cards"] for launch in [*card["launches"], *_also(card)]]
    else:
        tell("every launch in Triton's interpreter …")
        result["interpreter"] = _process("interpret", TRITON_INTERPRET="1")
        result["compiled"] = {}
        for target in targets:
            tell(f"the kernels compiled for {target} …")
            result["compiled"][target] = _process("compile", target)
        tried = [*_lines(result["interpreter"]), *(k for found in result["compiled"].values() for k in _lines(found))]
    result["right"] = all(launch["right"] for launch in tried)
    return result


def _lines(found: Any) -> list[dict[str, Any]]:
    """What a process found; one that broke is a launch that is not right, one that had no Triton is none."""
    if isinstance(found, list):
        return found
    return [] if "No module named 'triton" in found else [{"right": False}]


def _also(card: dict[str, Any]) -> list[dict[str, Any]]:
    """What has to hold on a card besides the launches."""
    if not card["launches"]:
        return []
    bits = card["same bits twice"]
    return [
        {"right": isinstance(bits, dict) and bits["deterministic"]},
        {"right": card["CUDA graph"] == AS_EAGER},
    ]


def versions() -> dict[str, str | None]:
    """Of what takes part."""
    return {
        **{name: version_of(name) for name in ("dual-lora", "torch", "triton", "peft")},
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def chosen(card: str) -> str:
    """Who would compute on a card of that architecture, and why."""
    if os.environ.get(dispatch.SWITCH) == "plain":
        return f"PyTorch's own operations: {dispatch.SWITCH}=plain"
    try:
        from dual_lora.core import triton_launch

        return f"kernels, with the tiles of {triton_launch.row(card)}"
    except (ImportError, NotImplementedError) as reason:
        return f"PyTorch's own operations: {reason}"


def on_card(device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    """All about one card. What breaks is said in its place, and the rest goes on."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernels = dispatch.triton(device)
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "device": str(device),
        "name": properties.name,
        "memory": properties.total_memory,
        "path": "kernels" if kernels is not None else "; ".join(str(w.message) for w in said) or "PyTorch's operations",
        "launches": [],
    }
    if kernels is None:
        return found
    for dtype in dispatch.DTYPES:
        tell(f"{device}, {dtype}: every launch against fp64 …")
        found["launches"] += launches(device, dtype)
    tell(f"{device}: signs, determinism, graph, memory, times …")
    with torch.cuda.device(device):
        found["signs"] = _tried(lambda: signs(device, SIZE))
        found["same bits twice"] = _tried(lambda: same_bits(device, SIZE))
        found["CUDA graph"] = _tried(lambda: graph(device))
        found["memory and time"] = _tried(lambda: costs(device, SIZE, TOKENS))
    return found


def _tried(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def launches(device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Every tile, alignment and order of sums for that dtype: the error against fp64, and what it may be."""
    found = []
    for launch in gpu_trials.every(device, dtype, [(RANK, RANK, Form())]):
        limit = triton_check.TOLERANCE[dtype]
        error = _tried(partial(triton_check.error, launch))
        right = isinstance(error, float) and error <= limit
        found.append({**_described(launch), "error": error, "limit": limit, "right": right})
    return found


def _described(launch: Any) -> dict[str, Any]:
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


def signs(device: torch.device, size: int) -> dict[str, int]:
    """Signs of Q [size, size] that differ from fp64: by the kernel, and by its products on matrix units (off)."""
    from dual_lora.lab.gpu_trials import sign_flips

    return {products: sign_flips(device, products, size, RANK) for products in ("ieee", "tf32x3")}


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


def _process(*arguments: str, **environment: str) -> list[dict[str, Any]] | str:
    """What `main` prints in a process of its own, or the last line of its error."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "ignore", "-m", "dual_lora.lab.gpu_check", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


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
        """What Triton asks of a driver before it compiles."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    kernels: list[Any] = []
    run, row = JITFunction.run, triton_launch.row(card)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(Absent())
    triton_launch.target = lambda device: row  # type: ignore[assignment]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    found = []
    for launch in gpu_trials.every(torch.device("cpu"), torch.bfloat16, [(RANK, RANK, Form())]):
        described = _described(launch)
        if described["aligned"] and not launch.deterministic:
            error = _tried(partial(triton_check.error, launch))
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
