"""Two processes on CPU train what one process trains (losses, warm-up, factors), and each resumes the other's run."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("distributed_worker.py")
STEPS = 4
DDP = pytest.param("ddp", marks=pytest.mark.long)  # tests/lab/test_train.py has two processes of it
KINDS = [DDP, "fsdp2"] + [
    pytest.param(
        f"zero{stage}",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
        ),
    )
    for stage in range(4)
]
RESUMED = ["fsdp2", DDP, *KINDS[2:]]

pytestmark = pytest.mark.slow


def train(kind, folder, steps=STEPS, resume=None):
    command = [sys.executable]
    if kind != "single":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(WORKER), kind, str(folder), str(steps), *([str(resume)] if resume else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Half a run in one process, and the other half resumed."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    return first, train("single", first), train("single", second, resume=first)


def assert_same(got, expected):
    (seen, state), (seen_once, state_once) = got, expected
    assert seen["warmup"] == seen_once["warmup"]
    assert seen["losses"] == pytest.approx(seen_once["losses"], abs=2e-5)
    assert state.keys() == state_once.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, state_once[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(kind, tmp_path, single):
    _, once, _ = single
    assert once[0]["warmup"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert_same(train(kind, tmp_path), once)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_resumes_on_another_number_of_processes(kind, tmp_path, single):
    first, _, continued = single
    assert continued[0]["warmup"][0] == 1.0
    assert_same(train(kind, tmp_path, resume=first), continued)


@pytest.mark.long  # test_two_processes_train_what_one_trains looks at what two processes save
@pytest.mark.parametrize("kind", RESUMED)
def test_one_process_resumes_a_run_of_two(kind, tmp_path, single):
    *_, continued = single
    train(kind, tmp_path / "two")
    assert_same(train("single", tmp_path / "one", resume=tmp_path / "two"), continued)
