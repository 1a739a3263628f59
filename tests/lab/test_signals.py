"""A run that is asked to stop saves a checkpoint, says so, and goes on from there: Ctrl-C, SIGTERM and SIGUSR1."""

import json
import os
import signal
import time

import psutil
import pytest
import tiny_study
from processes import Forked, forked_together, launched

from dual_lora.lab.files.folder import WHOLE, RunFolder
from dual_lora.lab.interrupt import SIGNALS, Stopped, on_signals, stop_at_once
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run
from dual_lora.lab.run.watch import Watch


def send_after(step, number, monkeypatch, times=1):
    """Send this process a signal after so many steps."""
    original = Watch.on_step_end

    def on_step_end(self, args, state, control, **more):
        if state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        original(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", on_step_end)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_a_checkpoint_and_the_record_says_so(number, lm_values, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        send_after(3, number, patch)
        result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert (result.state, result.steps, result.stopped_by) == ("interrupted", 3, number)
    folder = RunFolder(tmp_path / "run")
    assert json.loads(folder.record.read_text())["state"] == "interrupted"
    assert folder.last_checkpoint() == (3, folder.checkpoints / "checkpoint-3")
    assert run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False).steps == 6
    run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()


def test_what_a_first_ctrl_c_does_is_said_at_once(lm_values, tmp_path, monkeypatch, capfd):
    send_after(3, signal.SIGINT, monkeypatch)
    run(build_recipe(lm_values), tmp_path / "run")
    assert "Stopping after this step, with a checkpoint. Ctrl-C once more stops at once." in capfd.readouterr().err


def test_the_loss_of_an_interrupted_run_is_that_of_its_newest_steps(lm_values, tmp_path, monkeypatch):
    straight = run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    losses = [json.loads(line)["loss"] for line in RunFolder(tmp_path / "straight").metrics.open()]
    lm_values["train"]["log_every"] = 4
    with monkeypatch.context() as patch:
        send_after(3, signal.SIGINT, patch)
        stopped = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert stopped.loss == pytest.approx(sum(losses[:3]) / 3), "no line was written yet"
    with monkeypatch.context() as patch:
        send_after(5, signal.SIGINT, patch)
        stopped = run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    assert stopped.loss == pytest.approx(losses[4]), "not the mean of the line at step 4"
    done = run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    assert done.loss == pytest.approx(sum(losses[4:]) / 2)
    assert straight.loss == losses[-1]


def test_a_second_sigterm_is_patient_and_a_second_ctrl_c_is_not(lm_values, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        send_after(3, signal.SIGTERM, patch, times=3)
        assert run(build_recipe(lm_values), tmp_path / "patient", progress=False).steps == 3
    send_after(3, signal.SIGINT, monkeypatch, times=2)
    with pytest.raises(Stopped, match=r"last good checkpoint is .*checkpoint-2"):
        run(build_recipe(lm_values), tmp_path / "at-once", progress=False)
    assert json.loads((tmp_path / "at-once/record.json").read_text())["state"] == "interrupted"


def test_a_launcher_that_passes_ctrl_c_on_is_no_second_one(lm_values, tmp_path, monkeypatch):
    lm_values["train"]["batch_size"] = 2
    send_after(3, signal.SIGINT, monkeypatch, times=2)
    original = Watch.interruptible

    def interruptible(self):
        monkeypatch.setenv("WORLD_SIZE", "2")  # from here on, or Trainer would look for the other one
        return original(self)

    monkeypatch.setattr(Watch, "interruptible", interruptible)
    assert run(build_recipe(lm_values), tmp_path / "run", progress=False).steps == 3


def test_handlers_are_put_back():
    assert {"SIGINT", "SIGTERM"} <= {number.name for number in SIGNALS}, "what a terminal and a scheduler send"
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped), on_signals(stop_at_once):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def wait_for(there, process, seconds=400):
    end = time.time() + seconds
    while not there():
        assert process.poll() is None, process.communicate()
        if time.time() > end:
            for one in (*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)):
                one.kill()
            pytest.fail("the command has not come so far")
        time.sleep(0.05)


@pytest.mark.parametrize("number", SIGNALS)
def test_any_command_ends_with_the_status_of_the_signal(number, call, monkeypatch, tmp_path):
    (tmp_path / "adapter_config.json").touch()
    monkeypatch.setattr("dual_lora.lab.export.export.merge", lambda *_, **__: os.kill(os.getpid(), number))
    code, _, err = call("merge", tmp_path, "there")
    assert code == 128 + number
    assert "Interrupted" in err


@pytest.mark.parametrize("number", SIGNALS)
def test_train_ends_with_the_status_of_the_signal(number, lm_values, tmp_path, write_recipe):
    lm_values["train"] |= {"steps": 5000, "checkpoint_every": 5000}
    recipe, out = write_recipe(lm_values), tmp_path / "run"
    process = Forked(["train", recipe, "--out", out, "--json"], tmp_path / "said")
    wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size, process)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    result = json.loads(printed)
    assert result["state"] == json.loads((out / "record.json").read_text())["state"] == "interrupted"
    assert 0 < result["steps"] < 5000
    assert (out / f"checkpoints/checkpoint-{result['steps']}" / WHOLE).is_file()


@pytest.mark.parametrize("executor", ["serial", pytest.param("process", marks=pytest.mark.long)])
def test_compare_saves_the_checkpoints_of_its_runs(executor, tmp_path):
    study = tiny_study.write_study(tmp_path / "study", search=None, seeds=2)
    recipe = tmp_path / "study/letters.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 4", "steps: 20000").replace("every: 2", "every: 20000", 1))
    out = tmp_path / "out"
    workers = ["--workers", "1"] if executor == "process" else []
    process = Forked(["compare", study, "--out", out, "--executor", executor, *workers], tmp_path / "said")
    wait_for(lambda: any(m.stat().st_size for m in out.glob("runs/*/metrics.jsonl")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert "The same command goes on from here" in errors
    assert not psutil.wait_procs(children, timeout=60)[1]
    (whole,) = out.glob(f"runs/*/checkpoints/*/{WHOLE}")
    run_folder = whole.parents[2]
    assert not run_folder.with_name(f"{run_folder.name}.json").exists(), "an interrupted run is no outcome"


@pytest.mark.parametrize("to", ["one worker", pytest.param("launcher", marks=pytest.mark.long)])
def test_all_processes_stop_after_the_same_step(to, lm_values, write_recipe, tmp_path):
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"steps": 5000, "batch_size": 2, "checkpoint_every": 5000}
    recipe, out = write_recipe(lm_values), tmp_path / "run"
    if to == "launcher":
        processes = [launched("ddp", 2, recipe, out)]
    else:
        processes = forked_together(["train", recipe, "--out", out], tmp_path)
    written = out / "metrics.jsonl"
    wait_for(lambda: written.is_file() and written.stat().st_size, processes[0])
    processes[-1].send_signal(signal.SIGTERM)
    for process in processes:
        process.communicate(timeout=300)
    (checkpoint,) = out.glob(f"checkpoints/*/{WHOLE}")
    assert len(list(checkpoint.parent.glob("rng_state_*"))) == 2
    assert json.loads((out / "record.json").read_text())["state"] == "interrupted"
