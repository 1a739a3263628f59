"""A run on two processes that dies in the middle goes on with two or one, and ends with the adapter of one process."""

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import launched
from safetensors.torch import load_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.files.folder import WHOLE
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run

pytestmark = pytest.mark.slow


def adapter_of(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def kill_after_first_checkpoint(process, out):
    """SIGKILL to the launcher and to every process that it has started."""
    deadline = time.time() + 200
    while not list(out.glob(f"checkpoints/*/{WHOLE}")):
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    for one in (process, *workers):
        one.kill()
    assert process.wait() == -signal.SIGKILL
    psutil.wait_procs(workers)


@pytest.fixture(params=["fsdp2", "ddp"])
def killed(request, lm_values, write_recipe, tmp_path):
    """(strategy, recipe, folder of a run of two processes that was killed)."""
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"steps": 12, "batch_size": 2}
    recipe, out = write_recipe(lm_values), tmp_path / "killed"
    kill_after_first_checkpoint(launched(request.param, 2, recipe, out), out)
    assert not (out / "adapter").exists()
    sharded = list(out.glob("checkpoints/*/pytorch_model_fsdp.bin"))
    assert bool(sharded) == (request.param == "fsdp2")
    return request.param, recipe, out


@pytest.mark.long
def test_a_killed_run_goes_on_with_any_number_of_processes(killed, lm_values, tmp_path):
    strategy, recipe, out = killed
    lm_values["train"]["batch_size"] = 4
    run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    if strategy == "fsdp2":
        shutil.copytree(out, tmp_path / "unsharded")
        with pytest.raises(UserError, match="was written with FSDP"):
            run(build_recipe(lm_values), tmp_path / "unsharded", resume=True, progress=False)
    merged = [merge(tmp_path / "straight", tmp_path / "merged").folder]
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        shutil.copytree(out, folder)
        process = launched(strategy, processes, recipe, folder, "--resume", "--train.batch-size", str(4 // processes))
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
        before, after = ((f / "metrics.jsonl").read_text().splitlines() for f in (out, folder))
        assert after[:2] == before[:2], "the run was started anew"  # seconds and all
        assert len(after) == 12
        expected, got = adapter_of(tmp_path / "straight"), adapter_of(folder)
        assert got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        merged.append(merge(folder, tmp_path / f"merged-{processes}").folder)
    expected, *others = (load_file(Path(folder) / "model.safetensors") for folder in merged)
    for other in others:
        for name, value in other.items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.long
def test_the_first_line_after_a_resume_has_all_its_steps_on_two_processes(lm_values, write_recipe, tmp_path):
    """Each process knows the loss of its own rows alone; the line has that of all, also of steps before the stop."""
    lm_values["train"] |= {"steps": 4, "batch_size": 2, "log_every": 4, "checkpoint_every": 3, "accumulate": 2}
    recipe, out = write_recipe(lm_values), tmp_path / "run"

    def losses(*more):
        process = launched("ddp", 2, recipe, out, *more)
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
        return [
            json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
        ]

    straight = losses()
    shutil.rmtree(out / "adapter")
    for later in out.glob("checkpoints/checkpoint-4"):  # goes on from 3, in the middle of a line
        shutil.rmtree(later)
    assert losses("--resume") == pytest.approx(straight, rel=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_shipped_deepspeed_configurations_train_what_ddp_trains(strategy, lm_values, write_recipe, tmp_path):
    """By the documented command; with several batches a step and a bound on gradients, which DeepSpeed does itself."""
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"steps": 6, "batch_size": 2, "accumulate": 2, "max_grad_norm": 0.5}
    recipe = write_recipe(lm_values)
    for one in ("ddp", strategy):
        process = launched(one, 2, recipe, tmp_path / one)
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed
    expected, got = adapter_of(tmp_path / "ddp"), adapter_of(tmp_path / strategy)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
