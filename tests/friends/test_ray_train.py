"""Ray Train: two workers on the CPU train what one trains, Ray has the checkpoint, and the adapter loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("ray.train", reason='Ray comes with pip install "ray[train]"')
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "ray_train.py"


def trained(out, model, workers, batch_size):
    command = [sys.executable, str(SCRIPT), "--model", str(model), "--out", str(out), "--steps", "4", "--no-use-gpu"]
    command += ["--workers", str(workers), "--batch-size", str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_two_workers_train_what_one_trains(tiny_lm, tmp_path):
    one, two = trained(tmp_path / "one", tiny_lm, 1, 4), trained(tmp_path / "two", tiny_lm, 2, 2)
    assert one.keys() == two.keys()
    assert all(count == 0 for name, count in two.items() if "left" in name), "λ has not reached 1"
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert list((tmp_path / "two").glob("ray/checkpoint_*/checkpoint/adapter_model.safetensors"))
