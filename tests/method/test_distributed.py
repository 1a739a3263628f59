"""Two processes on CPU train what one process trains (losses, warm-up, factors), and each resumes the other's run."""

import importlib.util
import json

import distributed_worker
import pytest
import torch
from safetensors.torch import load_file

from forked import two_processes

STEPS = 4
KINDS = ["ddp", "fsdp2"] + [
    pytest.param(
        f"zero{stage}",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"
        ),
    )
    for stage in range(4)
]

pytestmark = pytest.mark.slow


def read(folder):
    return json.loads((folder / "seen.json").read_text()), load_file(folder / "adapter_model.safetensors")


def alone(folder, resume=None):
    distributed_worker.main("single", folder, STEPS, resume)
    return read(folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Half a run in one process, and the other half resumed."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    return first, alone(first), alone(second, first)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory, single):
    """The folders of two processes' half of a run, and of the other half, which resumes what one process began."""
    folder, (first, *_) = tmp_path_factory.mktemp("pair"), single
    status, said = two_processes(
        "from distributed_worker import main\n"
        f"main({request.param!r}, {str(folder / 'begun')!r}, {STEPS})\n"
        f"main({request.param!r}, {str(folder / 'resumed')!r}, {STEPS}, {str(first)!r})",
        folder / "meeting",
    )
    assert status == 0, said[-6000:]
    return folder / "begun", folder / "resumed"


def assert_same(got, expected):
    (seen, state), (seen_once, state_once) = got, expected
    assert seen["warmup"] == seen_once["warmup"]
    assert seen["losses"] == pytest.approx(seen_once["losses"], abs=2e-5)
    assert state.keys() == state_once.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, state_once[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_what_one_trains(pair, single):
    _, once, _ = single
    assert once[0]["warmup"] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert_same(read(pair[0]), once)


def test_a_run_resumes_on_another_number_of_processes(pair, single):
    *_, continued = single
    assert continued[0]["warmup"][0] == 1.0
    assert_same(read(pair[1]), continued)


def test_one_process_resumes_a_run_of_two(pair, single, tmp_path):
    *_, continued = single
    assert_same(alone(tmp_path, pair[0]), continued)
