"""The kernels compile for GPUs that are not there, and what the compiler says holds the launch constants to account."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3", reason="the Triton kernels need triton 3.3 or later")

SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # the least of the cards in a row
REGISTERS = {"sm_80": 255, "sm_90": 255, "gfx942": 512}


def compile_ahead(*arguments, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    script = Path(__file__).with_name("compile_ahead.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels
    return kernels


def test_compose_for_a_training_step(tmp_path):
    [kernel] = compile_ahead("sm_90", "compose", '"bf16", "rank": 16}', cache=tmp_path)
    assert kernel["spill"] == 0, kernel
    assert kernel["registers"] <= 128, kernel


def test_compose_for_the_layers_of_a_block(tmp_path):
    [kernel] = compile_ahead("sm_90", "group", '"bf16", "rank": 16}', cache=tmp_path)
    assert kernel["spill"] == 0, kernel
    assert kernel["registers"] <= 128, kernel
    # Wide stores although their addresses come from a table: the kernel is told how they are aligned.
    assert kernel["widest"] == 128, kernel


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel(gpu, tmp_path):
    for kernel in compile_ahead(gpu, cache=tmp_path):
        assert kernel["shared"] <= SHARED_MEMORY[gpu], kernel
        assert kernel["registers"] <= REGISTERS[gpu], kernel
        assert kernel["in_loops"] == 0, kernel
        # The largest gradient tile keeps columns that wait for their turn in local memory; see TILES.
        may_spill = kernel.get("tile") == [128, 256, 64, 8, 3, 4] or "forms" in kernel
        assert kernel["spill"] <= (256 if may_spill else 0), kernel
