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


def test_rehearsal_reaches_the_end_and_records_nothing():
    ledger = ROOT / "benchmarks" / "ledger.jsonl"
    before = ledger.read_bytes() if ledger.exists() else None
    done = benchmark("--rehearse")
    assert done.returncode == 0, done.stderr[-4000:]
    for gate in ("are right", "compose kernel", "forward + backward", "peak memory", "8B model"):
        assert gate in done.stdout
    assert (ledger.read_bytes() if ledger.exists() else None) == before
