"""The GPU benchmark walks through all its steps without a GPU, and says plainly when there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run `make bench-gpu` itself"),
]

ROOT = Path(__file__).parents[2]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_without_a_gpu_nothing_is_claimed():
    done = benchmark()
    assert done.returncode == 1
    assert "No GPU is present" in done.stdout


@pytest.mark.long  # a rehearsal of what needs a card
def test_rehearsal_reaches_the_end_and_records_nothing():
    ledger = ROOT / "benchmarks" / "ledger.jsonl"
    before = ledger.read_bytes() if ledger.exists() else None
    done = benchmark("--rehearse")
    assert done.returncode == 0, done.stderr[-4000:]
    for gate in ("are right", "compose kernel", "forward + backward", "lora bf16", "peak memory", "8B model"):
        assert gate in done.stdout
    assert (ledger.read_bytes() if ledger.exists() else None) == before


@pytest.mark.long
def test_where_no_kernel_compiles_the_operator_is_measured_and_the_reason_said():
    code = """
import sys
from dual_lora.core.kernels import compose as triton_compose

def refused(*args, **kwargs):
    raise RuntimeError("Input shapes should have M >= 1, N >= 1 and K >= 16")

triton_compose.compose = refused
from benchmarks import gpu
sys.exit(gpu.main(["--rehearse"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "The kernels do not run on CPU (rehearsal): RuntimeError: Input shapes" in done.stdout
    assert "are right" in done.stdout
    assert "lora bf16" in done.stdout
    assert "compose kernel" not in done.stdout
