"""Compile the Triton kernels for a GPU that is not there, and print what each needs, one JSON line a kernel.

    python -m benchmarks.compile_ahead {sm_80|sm_90|sm_100|sm_120|gfx942} [text in the description]

The launchers run as they are, on CPU tensors; only the last step, the launch, is left out. So what is compiled is
what would run: the same tiles, specialisations and options. Needs a process without TRITON_INTERPRET.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from typing import get_args
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dual_lora.core.kernels import launch as triton_launch
from dual_lora.core.kernels.compose import compose
from dual_lora.core.kernels.gradient import TILES, UNALIGNED, factor_gradients
from dual_lora.core.reference import PLAIN, Adapter, Factors, Form, Ste

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ROW_OF = {"sm_100": "sm_90", "sm_120": "sm_80"}  # as `triton_launch.target` says
O = I = 4096
T = 2048


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, name):
        self.name = name

    def get_current_target(self):
        return GPUS[self.name]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def capture(launch):
    """The compiled kernel of a launcher's single launch."""
    seen, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        seen.append(run(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    (kernel,) = seen
    return kernel


def needs(kernel):
    """Registers and bytes of spill a thread, bytes of shared memory; on NVIDIA, inside loops of matrix products, spills
    and copies to shared memory that are asynchronous or go through registers.
    """
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return found | {"registers": counts["vgpr_count"], "spill": 4 * counts["vgpr_spill_count"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, spill = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    bodies = loops(code)
    count = {
        "in_loops": r"\b(STL|LDL)\b",
        "async_in_loops": r"\b(LDGSTS|UTMALDG)\b",
        "through_registers_in_loops": r"\bSTS\b",
    }
    counted = {name: sum(bool(re.search(pattern, each)) for each in bodies) for name, pattern in count.items()}
    return found | {"registers": registers, "spill": spill} | counted


def loops(code):
    """All instructions of loops around those of tensor cores."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    found = []
    for end, what in lines:
        # On Blackwell the code that waits lies behind the end, and jumps back without a condition.
        jump = re.search(r"(?:@.*BRA|BRA\.U).*0x([0-9a-f]+)", what)
        if jump and int(jump[1], 16) < end:
            body = [each for at, each in lines if int(jump[1], 16) <= at <= end]
            if any(re.search(r"HMMA|HGMMA|UTCHMMA", each) for each in body):
                found += body
    return found


def adapter(r, form=Form(), batch=()):  # noqa: B008
    shapes = (r, I), (O, r), (r, I), (O, r)
    return Adapter(Factors(*(torch.empty(*batch, *shape) for shape in shapes)), torch.empty(()), form)


def without_a_direction(form):
    """An adapter whose direction does not train: frozen signs' integers, or nothing."""
    A, B, *_ = adapter(4).factors
    if form.direction == "frozen":
        C, D = torch.empty(1, I, dtype=torch.int32), torch.empty(O, 1, dtype=torch.int32)
    else:
        C, D = torch.empty(0, I), torch.empty(O, 0)
    return Adapter(Factors(A, B, C, D), torch.empty(()), form)


def kernels(row):
    """(description, function that compiles it) of all that is launched on a card with this row of the tables."""
    bf16, fp32 = torch.empty(O, I, dtype=torch.bfloat16), torch.empty(O, I)
    bases = {"bf16": bf16, "none": None, "fp32": fp32, "bf16, misaligned": misaligned(O, I)}
    for base, weight in bases.items():
        for r in (4, 16, 64) if base == "bf16" else (16,):
            dtype = torch.float32 if weight is fp32 else torch.bfloat16
            yield {"kernel": "compose", "base": base, "rank": r}, partial(compose, weight, [adapter(r)], dtype)
    several = [adapter(16), adapter(8, Form(magnitude="identity"))]
    yield {"kernel": "compose", "base": "bf16", "rank": "16+8"}, partial(compose, bf16, several)
    experts, routed = torch.empty(8, O, I, dtype=torch.bfloat16), torch.arange(4)
    of_all = adapter(16, batch=(8,))
    launch = partial(compose, experts, [of_all], routed=routed)
    yield {"kernel": "compose", "base": "bf16, routed experts", "rank": 16}, launch
    if row.startswith("sm"):
        launch = partial(compose, bf16, [adapter(16)], products="tf32x3")
        yield {"kernel": "compose", "base": "bf16", "rank": 16, "products": "tf32x3"}, launch
    for dtype, deterministic in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        dy, x = torch.empty(T, O, dtype=dtype), torch.empty(T, I, dtype=dtype)
        for tile in TILES[row, dtype.itemsize][: 1 if deterministic else None]:
            what = {"kernel": "gradient", "inputs": str(dtype), "tile": tile, "deterministic": deterministic}
            yield what, partial(gradients_by, row, tile, dy, x, [adapter(16)], deterministic=deterministic)
    for G in (bf16, fp32):
        tile = TILES[row, G.itemsize][0]
        what = {"kernel": "gradient of G", "inputs": str(G.dtype), "tile": tile, "deterministic": False}
        yield what, partial(gradients_by, row, tile, None, G, [adapter(16)], deterministic=False)
    tile = next(tile for tile in TILES[row, 2] if tile.rows * tile.cols <= UNALIGNED)
    what = {"kernel": "gradient", "inputs": f"{bf16.dtype}, misaligned", "tile": tile, "deterministic": False}
    dy, x = misaligned(T, O), misaligned(T, I)
    yield what, partial(gradients_by, row, tile, dy, x, [adapter(16)], deterministic=False)
    tile = TILES[row, 2][-1]
    what = {"kernel": "gradient of G, routed experts", "inputs": str(bf16.dtype), "tile": tile, "deterministic": False}
    yield what, partial(gradients_by, row, tile, None, experts, [of_all], deterministic=False, routed=routed)
    # The interpreter takes what the compiler may refuse, so every branch of the kernel is compiled once.
    forms = [*(Form(ste=name) for name in get_args(Ste)[1:]), Form(magnitude="identity"), Form(direction="identity")]
    every = [adapter(4, form) for form in (*forms, Form(live_zero=True))]
    every += [without_a_direction(form) for form in (Form(direction="frozen"), Form(direction="weight"), PLAIN)]
    half = torch.empty(T, O, dtype=torch.float16)
    what = {"kernel": "gradient", "inputs": str(half.dtype), "tile": tile, "deterministic": False, "forms": "every"}
    options = dict(loss_scale=torch.empty(()), deterministic=False, weight=torch.empty(O, I, dtype=half.dtype))
    yield what, partial(gradients_by, row, tile, half, half, every, **options)


def misaligned(rows, columns):
    """A bf16 matrix whose first entry is not aligned to 16 bytes, so that it is read entry by entry."""
    return torch.empty(rows * columns + 1, dtype=torch.bfloat16)[1:].view(rows, columns)


def gradients_by(row, tile, dy, x, adapters, **options):
    with mock.patch.dict(TILES, {(row, x.element_size()): (tile,)}):
        factor_gradients(dy, x, adapters, **options)


if __name__ == "__main__":
    name, *wanted = sys.argv[1:]
    driver.set_active(AbsentGpu(name))
    row = ROW_OF.get(name, name)
    triton_launch.target = lambda device: row
    for what, launch in kernels(row):
        line = json.dumps(what)
        if all(text in line for text in wanted):
            try:
                found = needs(capture(launch))
            except Exception as error:  # the table says it, and goes on
                found = {"error": f"{type(error).__name__}: {error}"[-300:]}
            print(json.dumps(what | found), flush=True)
