"""A log without a terminal is never silent for long, and says how much time is left."""

import re
import time
from io import StringIO

import pytest
import torch
from rich.console import Console

from dual_lora.lab import progress
from dual_lora.lab.run import watch


@pytest.fixture
def log(monkeypatch, capsys):
    """No terminal, and lines a hundred times a second: the function returns those so far."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    monkeypatch.setattr(progress, "console", Console(file=StringIO()))
    lines = []

    def so_far():
        lines.extend(capsys.readouterr().err.splitlines())
        return lines

    return so_far


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_log_goes_on_while_nothing_moves(log):
    with progress.Bar("training", 10):
        until(lambda: len(log()) >= 3)
    assert set(log()) == {"training 0/10"}
    ended = len(log())
    time.sleep(0.05)
    assert len(log()) == ended


def test_what_goes_on_after_the_last_unit_is_said_and_the_end_only_once(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.3)
    with progress.Bar("training", 10, start=8) as bar:
        bar.to(10, "loss 1.5")
        bar.also("checking")
        until(lambda: log().count("checking") >= 3)
    assert log().count("training 10/10 · loss 1.5") == 1, "what is said meanwhile is what goes on"


def test_a_line_says_what_is_left(log, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bar("training", 10, start=2) as bar:
        now[0] = 40.0
        bar.to(4, "loss 1.5")
        now[0] = 50.0
        line = bar._line()
    assert line == "training 4/10 · loss 1.5 · about 2 min left"  # 6 units of 20 s, 10 of them gone
    with progress.Bar("tuning", 10, timed=False) as bar:
        bar.to(4, "about 7 min left")
        assert bar._line() == "tuning 4/10 · about 7 min left"


@pytest.mark.parametrize("shown", [False, True])
def test_a_terminal_and_what_is_not_shown_have_no_lines(shown, log, monkeypatch):
    if shown:
        monkeypatch.setattr(progress, "console", Console(file=StringIO(), force_terminal=True))
    with progress.Bar("training", 10, shown) as bar:
        bar.to(5, "half")
        time.sleep(0.05)
    assert log() == []


@pytest.mark.filterwarnings("ignore:The sets overlap:dual_lora.DualLoraWarning")
def test_evaluation_and_calibration_have_lines(log, lm_values, monkeypatch, tmp_path):
    from dual_lora.lab.cli import main
    from dual_lora.lab.cost import calibrate
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.run import evaluate as module
    from dual_lora.lab.run.train import run

    slow = module._TASKS["loss"]

    def waits(*arguments):
        until(lambda: any(line.startswith("loss · base 0/") for line in log()))
        return slow(*arguments)

    run(build_recipe(lm_values | {"train": lm_values["train"] | {"steps": 1}}), tmp_path / "run", progress=False)
    monkeypatch.setitem(module._TASKS, "loss", waits)
    module.evaluate(tmp_path / "run", spec=module.EvaluateSection(tasks=["loss"]))

    def calibrating(say):
        say("lora, float32, width 64 (2 of 16, about 40 s left)")
        until(lambda: any("about 40 s left" in line for line in log()))
        costs = {"float32": {method: [[256, 1e9, 1e-9]] for method in calibrate.METHODS}}
        return {"on": "cpu", "date": "2026-01-01", "costs": costs}

    monkeypatch.setattr(calibrate, "calibrate", calibrating)
    log().clear()
    with pytest.raises(SystemExit, match="0"):
        main(["estimate", "--calibrate"])
    assert log()[0] == "measuring the speed of this machine"
    assert progress.console.file.getvalue() == ""  # rich writes empty lines into a log


@pytest.mark.parametrize(("busy", "said"), [(0.5, True), (0.95, False)], ids=["waiting", "working"])
def test_threads_that_wait_for_each_other_are_mentioned_once(busy, said, monkeypatch, tmp_path):
    wall = [0.0]
    monkeypatch.setattr(watch.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(watch.time, "process_time", lambda: 2 * busy * wall[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(watch, "best_device", lambda: "cpu")
    screen = StringIO()
    monkeypatch.setattr(watch, "console", Console(file=screen, width=200))
    looking = watch.Watch(None, progress.Bar("training", 9), [0] * 10, 0.0, 1, True)
    for _ in range(9):
        wall[0] += 8.0
        looking._look_at_threads()
    found = re.findall(r"2 threads got the time of 1\.0 cores.*OMP_NUM_THREADS=1", screen.getvalue())
    assert len(found) == said
    assert bool(screen.getvalue()) == said
