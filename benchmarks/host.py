"""Host time of one adapted layer, forward and backward: what Python and the dispatcher cost where a GPU computes.

    python -m benchmarks.host [seconds]    # one JSON line: seconds of processor time by method

No GPU is needed. The layers are tiny, so that PyTorch's own products cost nothing, and of our kernels everything runs
but the last step, the launch: module, autograd, the choice of kernel, Triton's look-up of what it compiled. Left out on
both sides: what the driver takes for a launch (3 kernels and 2 products here, 12 operations of LoRA's).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .measure import Measured, Unavailable, interleave


def measure(seconds: float) -> Measured:
    """Seconds of processor time of Dual LoRA's layer and LoRA's, interleaved in a process of their own."""
    try:
        import triton  # noqa: F401
    except ImportError as missing:
        raise Unavailable("Triton is not installed, whose part of the host time counts") from missing
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.host", str(seconds)],
        cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.host failed:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return Measured(result["costs"], "s", 1, result["share"])


class AbsentGpu:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def without_launches() -> None:
    """From here on, in this process, our layers on the CPU do what they do on an H100, and nothing is launched."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dual_lora.core import dispatch
    from dual_lora.core.kernels import check as triton_check
    from dual_lora.core.kernels import launch as triton_launch
    from dual_lora.core.kernels import linear as triton_linear

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    compiled = CompiledKernel.__new__(CompiledKernel)  # as Triton calls it, but for the last step
    vars(compiled).update(_run=nothing, module=0, function=0, packed_metadata=(), name="none", src=None)

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *args: Any, **kwargs: Any) -> Any:
        self.device_caches[device][0][key] = compiled
        return compiled

    def chosen(device: Any, dtype: Any, weight: Any, adapters: Any, gradient_of: Any = None) -> Any:
        assert triton_linear.are_correct(dtype, weight, adapters, gradient_of)
        return triton_linear

    driver.set_active(AbsentGpu())
    JITFunction._do_compile = compile_nothing
    triton_launch.target = lambda device: "sm_90"
    triton_launch.processors = lambda device: 132
    triton_launch.on_device = lambda device: nullcontext()
    triton_check.error = lambda launch: 0.0
    dispatch.implementation = chosen


def main(seconds: float) -> None:
    import torch

    from . import layers
    from .linear import step

    without_launches()
    W, x, dy = (torch.randn(shape).bfloat16() for shape in ((16, 16), (2, 16), (2, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants = {method: step(layers.linear(method, W), x, dy) for method in ("dual", "lora")}
    measured = interleave(variants, [("dual", "lora")], 1, seconds)
    print(json.dumps({"costs": measured.costs, "share": measured.share}))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
