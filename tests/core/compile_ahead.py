"""Compile the Triton kernels for a GPU that is not there, and print what each needs, one JSON line a kernel.

    python compile_ahead.py {sm_80|sm_90|gfx942} [text in the description]

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
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from dual_lora.core import triton_launch
from dual_lora.core.blocked import Adapter
from dual_lora.core.composing import Job
from dual_lora.core.reference import Factors, Form
from dual_lora.core.triton_compose import Int8, Nf4, compose
from dual_lora.core.triton_gradient import TILES, factor_gradients
from dual_lora.core.triton_group import compose_group

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
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
    """Registers and bytes of spill a thread, bytes of shared memory, and spills inside loops of matrix products; on a
    card that says so, the bits of the widest store.
    """
    found = {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return found | {"registers": counts["vgpr_count"], "spill": 4 * counts["vgpr_spill_count"], "in_loops": 0}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, spill = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    found["widest"] = max((int(n or 1) * int(bits) for n, bits in stores), default=0)
    return found | {"registers": registers, "spill": spill, "in_loops": spills_in_loops(code)}


def spills_in_loops(code):
    """Reads and writes of spilled registers within loops around tensor-core instructions."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    total = 0
    for end, what in lines:
        jump = re.search(r"BRA.*0x([0-9a-f]+)", what)
        if jump and int(jump[1], 16) < end:
            body = [each for at, each in lines if int(jump[1], 16) <= at <= end]
            if any("HMMA" in each or "HGMMA" in each for each in body):
                total += sum("STL" in each or "LDL" in each for each in body)
    return total


def adapter(r, form=Form(), batch=()):  # noqa: B008
    shapes = (r, I), (O, r), (r, I), (O, r)
    return Adapter(Factors(*(torch.empty(*batch, *shape) for shape in shapes)), torch.empty(()), form)


def kernels(name):
    """(description, function that compiles it) of what a training step, a merge and a quantised base launch."""
    bf16, fp32 = torch.empty(O, I, dtype=torch.bfloat16), torch.empty(O, I)
    packed = torch.empty(O * I // 2, 1, dtype=torch.uint8)
    nf4 = Nf4(packed, torch.empty(O * I // 64), torch.empty(16), 64, torch.Size((O, I)))
    int8 = Int8(torch.empty(O, I, dtype=torch.int8), torch.empty(O))
    for r in (4, 16, 64):
        yield {"kernel": "compose", "base": "bf16", "rank": r}, partial(compose, bf16, [adapter(r)])
    for base, weight in (("fp32", fp32), ("nf4", nf4), ("int8", int8), ("none", None)):
        launch = partial(compose, weight, [adapter(16)], torch.float32 if weight is fp32 else torch.bfloat16)
        yield {"kernel": "compose", "base": base, "rank": 16}, launch
    several = [adapter(16), adapter(8, Form(magnitude="identity"))]
    yield {"kernel": "compose", "base": "bf16", "rank": "16+8"}, partial(compose, bf16, several)
    # Shifted by one entry, a weight is aligned to nothing that a kernel could use.
    shifted = torch.empty(O * I + 1, dtype=torch.bfloat16)[1:].view(O, I)
    for what, weight, adapters in (
        ({"base": "bf16", "rank": 16}, bf16, [adapter(16)]),
        ({"base": "fp32", "rank": 64}, fp32, [adapter(64)]),
        ({"base": "bf16", "rank": "16+8"}, bf16, several),
        ({"base": "bf16, misaligned", "rank": 16}, shifted, [adapter(16)]),
    ):
        jobs = [Job(weight, adapters, weight.dtype)] * 2
        yield {"kernel": "group", **what}, partial(compose_group, jobs)
    for dtype, deterministic in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        dy, x = torch.empty(T, O, dtype=dtype), torch.empty(T, I, dtype=dtype)
        for tile in TILES[name, dtype.itemsize]:
            what = {"kernel": "gradient", "inputs": str(dtype), "tile": tile, "deterministic": deterministic}
            yield what, partial(gradients_by, name, tile, dy, x, [adapter(16)], deterministic=deterministic)
    # The interpreter takes what the compiler may refuse, so every branch of the kernel is compiled once.
    forms = [Form(ste="identity"), Form(ste="hardtanh"), Form(magnitude="identity"), Form(direction="identity")]
    every = [adapter(4, form, batch=(2,)) for form in (*forms, Form(live_zero=True))]
    options = dict(loss_scale=torch.empty(()), offsets=torch.empty(3, dtype=torch.int32), deterministic=False)
    half = torch.empty(T, O, dtype=torch.float16)
    what = {"kernel": "gradient", "inputs": str(half.dtype), "forms": "every"}
    yield what, partial(gradients_by, name, TILES[name, 2][-1], half, half, every, **options)


def gradients_by(name, tile, dy, x, adapters, **options):
    with mock.patch.dict(TILES, {(name, x.element_size()): (tile,)}):
        factor_gradients(dy, x, adapters, **options)


if __name__ == "__main__":
    name, *wanted = sys.argv[1:]
    driver.set_active(AbsentGpu(name))
    triton_launch.target = lambda device: name
    for what, launch in kernels(name):
        line = json.dumps(what)
        if all(text in line for text in wanted):
            print(json.dumps(what | needs(capture(launch))), flush=True)
