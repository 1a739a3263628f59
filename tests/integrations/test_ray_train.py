"""Ray Train: two workers on the CPU train what one trains, and Ray has the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("ray.train", reason='Ray comes with pip install "ray[train]"')
pytestmark = pytest.mark.slow

# One session of Ray for both: it takes longer to start than to train.
BOTH = """
import runpy, sys
from pathlib import Path
import ray
ray.init(num_cpus=2, include_dashboard=False)
script, model, out = sys.argv[1:]
main = runpy.run_path(script)["main"]
main(model, Path(out, "one"), steps=4, workers=1, batch_size=4, use_gpu=False)
main(model, Path(out, "two"), steps=4, workers=2, batch_size=2, use_gpu=False)
"""


def test_two_workers_train_what_one_trains(tiny_lm, tmp_path):
    script = Path(__file__).parents[2] / "examples" / "ray_train.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", BOTH, str(script), str(tiny_lm), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert list((tmp_path / "two").glob("ray/checkpoint_*/checkpoint/adapter_model.safetensors"))
