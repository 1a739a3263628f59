"""A study can be stopped at any moment and goes on: no finished run is lost, none is repeated, none is half."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("peft")

from processes import dying_worker
from tiny_study import SHORT, die, ended, figures, in_child, job, outcomes, write_study

from dual_lora.lab import permission
from dual_lora.lab.errors import UserError
from dual_lora.lab.study import execute as executors
from dual_lora.lab.study import perform
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.job import damage, read_outcome

POINTS = {
    "before training": ("dual_lora.lab.run.train", "_train"),
    "trained, outcome not written": ("dual_lora.lab.study.perform", "_scored"),
    "scores written, outcome not": ("dual_lora.lab.study.perform", "write_outcome"),
    "outcome written, not tidied": ("dual_lora.lab.study.perform", "_tidy"),
    "outcome written, not noted": ("dual_lora.lab.study.compare:Runner", "_learn"),
    "plan not written": ("dual_lora.lab.study.folder", "write_json"),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(point, tiny, short, tmp_path, monkeypatch):
    """SIGKILL at the second time that a process reaches this point, twice; then it goes through."""
    owner, name = pkgutil.resolve_name(POINTS[point][0]), POINTS[point][1]
    original, calls, kills = getattr(owner, name), [], tmp_path / "kills"

    def fatal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and (not kills.exists() or len(kills.read_text()) < 2):
            with kills.open("a") as file:
                file.write("x")
            die()
        return original(*args, **kwargs)

    study = write_study(tiny, **SHORT)
    monkeypatch.setattr(owner, name, fatal)
    seen: dict[str, int] = {}
    codes = []
    while not codes or (codes[-1] != 0 and len(codes) < 6):
        codes.append(in_child(lambda: compare(study, tmp_path / "out", progress=False)))
        now = outcomes(tmp_path / "out")
        assert seen.items() <= now.items(), "a finished run was lost or repeated"
        seen = now
    assert codes[-1] == 0
    assert codes[:-1] == [-signal.SIGKILL] * len(kills.read_text()), "the point was reached"
    assert len(codes) > 1
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(short)


def test_killed_in_training_goes_on_from_the_checkpoint(tiny, short, tmp_path, monkeypatch):
    from dual_lora.lab.run import train

    step_end, train_begin = train.Watch.on_step_end, train.Watch.on_train_begin

    def fatal(self, args, state, *rest, **more):
        step_end(self, args, state, *rest, **more)
        if state.global_step == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            die()

    def noted(self, args, state, *rest, **more):
        with (tmp_path / "starts").open("a") as file:
            file.write(f"{state.global_step}\n")
        train_begin(self, args, state, *rest, **more)

    monkeypatch.setattr(train.Watch, "on_step_end", fatal)
    monkeypatch.setattr(train.Watch, "on_train_begin", noted)
    study = write_study(tiny, **SHORT)
    assert in_child(lambda: compare(study, tmp_path / "out", progress=False)) == -signal.SIGKILL
    assert in_child(lambda: compare(study, tmp_path / "out", progress=False)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", "2", "0"], "second start: checkpoint of step 2"
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(short)


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(tiny, whole, tmp_path):
    study = write_study(tiny)
    seen, wait = {}, 0.4
    for _ in range(40):
        child = multiprocessing.get_context("fork").Process(
            target=lambda: compare(study, tmp_path / "out", progress=False)
        )
        child.start()
        child.join(wait)
        wait += 0.37  # ever longer, so that an end comes on a slow machine too
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        now = outcomes(tmp_path / "out") if (tmp_path / "out" / "runs").exists() else {}
        assert seen.items() <= now.items(), "a finished run was lost or repeated"
        seen = now
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(whole)


DAMAGED = {
    "no outcome": ("", None),
    "half an outcome": ("", '{"key": "'),
    "an outcome of nothing": ("", "[1]"),
    "another's outcome": ("", '{"key": "0", "status": "done", "seconds": 1}'),
    "no scores": (".scores", None),
    "half of the scores": (".scores", "[[1.0, 2.0], [1"),
    "scores that are no numbers": (".scores", json.dumps([["a", 1]] * 40)),
    "scores of NaN": (".scores", "[" + ", ".join(["[NaN, 1]"] * 40) + "]"),
    "scores by name": (".scores", json.dumps({"a": 1})),
    "scores of another sum": (".scores", lambda rows: [[2 * row[0], *row[1:]] for row in rows]),
    "fewer scores of the same mean": (".scores", lambda rows: [np.mean(rows, axis=0).tolist()]),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_run_is_no_outcome(what, whole, copy_of_whole):
    key = damaged(what, whole, copy_of_whole)
    assert read_outcome(copy_of_whole / "runs", key) is None
    assert bool(damage(copy_of_whole / "runs", key)) == (what != "no outcome"), "what is not there yet is no damage"


@pytest.mark.parametrize("what", ["no outcome", "half of the scores"])
def test_damaged_run_is_done_again_alone_and_said(what, whole, tiny, copy_of_whole, capsys):
    """One file of one run is damaged or deleted: that run alone is done again, with the same result."""
    before = outcomes(copy_of_whole)
    key = damaged(what, whole, copy_of_whole)
    results = compare(tiny / "study.yaml", copy_of_whole)
    now = outcomes(copy_of_whole)
    assert [n for n in now if now[n] != before[n]] == [f"{key}.json"]
    assert figures(results) == figures(whole)
    said = " ".join(capsys.readouterr().err.split())
    assert ("That run alone is done again: lora on letters, seed 1." in said) == (what != "no outcome")
    assert not damage(copy_of_whole / "runs", key)


def damaged(what, whole, folder):
    """Damage a file of one run; returns the run's key."""
    part, text = DAMAGED[what]
    key = whole["methods"][0]["seeds"][0]["key"]
    file = folder / "runs" / f"{key}{part}.json"
    if callable(text):
        text = json.dumps(text(json.loads(file.read_text())))
    file.unlink() if text is None else file.write_text(text)
    return key


def test_a_file_that_never_ends_is_no_outcome(tmp_path):
    os.mkfifo(tmp_path / "k.json")
    (tmp_path / "z.json").symlink_to("/dev/zero")
    assert read_outcome(tmp_path, "k") is read_outcome(tmp_path, "z") is None


@pytest.mark.parametrize("damage", ["gone", "half", "another's"])
def test_a_lost_study_file_repeats_nothing(damage, tiny, whole, copy_of_whole):
    before, file = outcomes(copy_of_whole), copy_of_whole / "study.json"
    if damage == "gone":
        file.unlink()
        with pytest.raises(UserError, match=r"changed since.*seeds"):  # study.yaml still knows
            compare(write_study(tiny, seeds=3), copy_of_whole, progress=False)
    else:
        file.write_text(file.read_text()[:300] if damage == "half" else '{"format": "x"}')
        with pytest.raises(UserError, match=r"study.json is damaged or another program's. .*Move it away"):
            compare(tiny / "study.yaml", copy_of_whole, progress=False)
        file.unlink()
    results = compare(write_study(tiny), copy_of_whole, progress=False)
    assert outcomes(copy_of_whole) == before
    assert [c["verdict"] for c in results["comparisons"]] == [c["verdict"] for c in whole["comparisons"]]
    assert any("had ended before this study's plan was written" in note for note in results["notes"])


def test_two_at_once_are_refused(tiny, tmp_path):
    with StudyFolder(tmp_path / "out"), pytest.raises(UserError, match="Another process"):
        compare(write_study(tiny), tmp_path / "out", progress=False)


def test_a_study_is_not_written_over_its_own_source(tmp_path, monkeypatch):
    source = write_study(tmp_path)
    text = source.read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="another --out"):
        compare("study.yaml", ".", progress=False)
    assert source.read_text() == text


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link or no file"), StudyFolder(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "years of work"


@pytest.mark.parametrize(
    ("place", "name"), [(perform, "write_outcome"), (perform, "_trained"), (perform, "write_json")]
)
def test_a_full_disk_stops_the_study_and_loses_nothing(place, name, tiny, short, tmp_path, monkeypatch):
    """Every further run would fail as well, so none is tried; what is finished is whole."""
    original, calls = getattr(place, name), []

    def full(*args):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    study = write_study(tiny, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, full)
        with pytest.raises(UserError, match=r"The disk is full .*Every finished run is safe.*start the same command"):
            compare(study, tmp_path / "out", progress=False)
        assert len(calls) <= 3, "the runs after it were not tried"
    before = outcomes(tmp_path / "out")
    results = compare(study, tmp_path / "out", progress=False)
    assert before.items() <= outcomes(tmp_path / "out").items()
    assert figures(results) == figures(short)
    assert not list(tmp_path.rglob("*.part"))


def test_a_worker_tells_a_full_disk_from_a_failed_run(tmp_path, monkeypatch):
    """The answers of a worker that does two jobs, one of which finds no room."""

    class Line:
        jobs, said = [job(seed=1), job(seed=2)], []

        def recv(self):
            if not self.jobs:
                raise EOFError
            return self.jobs.pop(0)

        def send(self, answer):
            self.said.append(answer)

    def failing(of, *_):
        raise OSError(errno.ENOSPC, "No space left on device") if of.seed == 2 else RuntimeError("no luck")

    monkeypatch.setattr(perform, "_trained", failing)
    monkeypatch.setattr(executors, "_end_with_parent", lambda: None)
    executors._work(Line(), tmp_path, "nothing", 1)
    assert [full for _, full in Line.said] == [False, True]
    assert Line.said[0][0] == "RuntimeError: no luck"


@pytest.mark.parametrize(
    ("cards", "visible", "expected"),
    [(0, None, [None, None, None]), (2, None, ["0", "1", "0"]), (2, "4, GPU-7", ["4", "GPU-7", "4"])],
)
def test_workers_take_the_gpus_in_turn(cards, visible, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [executors._worker_environment(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == expected
    assert executors.runs_side_by_side("process", None) == (cards or os.cpu_count())
    assert (executors.runs_side_by_side("process", 5), executors.runs_side_by_side("serial", 5)) == (5, 1)


def test_unknown_executor_and_missing_ray(tiny, tmp_path, monkeypatch):
    study = write_study(tiny, search=None, seeds=1)
    with pytest.raises(UserError, match="Did you mean 'process'"):
        compare(study, tmp_path / "a", executor="proces", progress=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        compare(study, tmp_path / "b", executor="ray", progress=False)
    gone = write_study(tiny, overrides={"data": {"train": str(tmp_path / "gone.jsonl")}})
    with pytest.raises(UserError, match="There is no data file"):
        compare(gone, tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir()), "what is wrong from the start leaves nothing behind"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_processes_give_the_same_results_and_end_with_the_main_process(tiny, whole, tmp_path):
    study = write_study(tiny)
    out = tmp_path / "out"
    program = (
        "from dual_lora.lab.model import precision\n"
        "from dual_lora.lab.noise import silence_libraries\n"
        "from dual_lora.lab.study.compare import compare\n"
        "if __name__ == '__main__':\n"
        "    precision.measure_products = lambda: {'fp32': 1.0, 'bf16': 1.0}\n"  # as the tests' own process has it
        "    silence_libraries()\n"  # as the command does, for its own process
        f"    compare({str(study)!r}, {str(out)!r}, executor='process', workers=2, progress=False)\n"
    )
    script = tmp_path / "main.py"
    script.write_text(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    main = subprocess.Popen([sys.executable, str(script)], env=environment)
    until = time.time() + 400
    while time.time() < until and not (out.exists() and outcomes(out) if (out / "runs").exists() else False):
        time.sleep(0.2)
    main.kill()
    main.wait()
    before = outcomes(out)
    assert before
    command = [sys.executable, str(script)]
    again = subprocess.run(command, env=environment, check=True, timeout=700, capture_output=True, text=True)
    assert "Failed to load" not in again.stderr  # what libraries say of kernels that this machine does not have
    assert before.items() <= outcomes(out).items()
    assert figures(json.loads((out / "results.json").read_text())) == figures(whole)


def test_killed_worker_is_named(tiny, tmp_path, monkeypatch):
    """The process of one run dies, as it does when memory is full."""
    study = write_study(tiny, search=None, seeds=1, methods={"lora": {"r": 4}})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "out"
    monkeypatch.setattr(executors, "_work", dying_worker)  # of a module that imports nothing heavy
    results = compare(study, folder, executor="process", workers=2, progress=False)
    assert not results["complete"]
    assert len(results["failed"]) == 2  # the base's among them
    assert "killed by signal 9" in results["failed"][0]


def test_a_ray_that_does_not_start_raises_a_clear_error(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no such cluster")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(UserError, match="Ray could not be reached or started: ConnectionError: no such cluster"):
        list(executors.run_jobs(executors.Options("ray"), [job()], tmp_path))


def test_ray_hands_out_every_job_and_takes_what_comes(tmp_path, monkeypatch):
    """Ray's part played by a stand-in: outcomes, errors with their cause, and a full disk, which stops the others."""
    cancelled = []

    class Failed(Exception):
        cause = None

    def get(task):
        if isinstance(answer := came[task], Exception):
            wrapped = Failed("in a task")
            wrapped.cause = answer
            raise wrapped
        return answer

    def remote(**_):
        return lambda work: SimpleNamespace(remote=lambda here, of, *_: of.seed)

    ray = SimpleNamespace(is_initialized=lambda: True, remote=remote, get=get, cancel=cancelled.append)
    ray.wait = lambda tasks, num_returns: (tasks[:1], tasks[1:])
    monkeypatch.setitem(sys.modules, "ray", ray)
    jobs = [job(seed=n) for n in range(4)]
    done = ended(jobs[0])[1]
    came = {0: done, 1: RuntimeError("no luck"), 2: perform.DiskFull("no room"), 3: done}
    seen = []
    with pytest.raises(perform.DiskFull, match="no room"):
        seen.extend(executors.run_jobs(executors.Options("ray", 2), jobs, tmp_path))
    assert seen == [(jobs[0].key, done, ""), (jobs[1].key, None, "RuntimeError: no luck")]
    assert cancelled == [3]


def test_ray_is_started_outside_of_the_study_s_folder(tmp_path, monkeypatch):
    """It puts that folder before all others from which its workers import."""
    seen = []
    ray = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: seen.append(os.getcwd()))
    ray.remote = lambda **_: lambda work: SimpleNamespace(remote=lambda *given: seen.append((work, *given)))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "", str(tmp_path)]))
    with pytest.raises(AttributeError, match="wait"):
        list(executors.run_jobs(executors.Options("ray"), [job()], Path("runs")))
    started, (work, here, _, runs, *_) = seen
    assert started == tmp_path.anchor
    assert os.getcwd() == here == str(tmp_path), "where relative paths of records begin"
    assert runs == tmp_path / "runs"
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "src"), str(tmp_path)])
    monkeypatch.setattr(executors, "do", lambda *of: (os.getcwd(), *of))
    monkeypatch.chdir("/")
    assert work(here, 1, 2) == (here, 1, 2)
    assert work(str(tmp_path / "nowhere"), 1)[1:] == (1,), "a folder that this node does not have"


@pytest.mark.slow
def test_ray_s_workers_import_nothing_from_the_working_folder(tiny, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    ray.shutdown()
    study = write_study(tiny, **SHORT)
    for name in ("peft", "statistics", "yaml", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    try:
        results = compare(study, tmp_path / "out", executor="ray", workers=1, progress=False)
    finally:
        ray.shutdown()
    assert not (tmp_path / "it-ran").exists()
    assert results["failed"] == []


@pytest.mark.slow
def test_ray_gives_the_same_results(tiny, whole, tmp_path):
    pytest.importorskip("ray")
    results = compare(write_study(tiny), tmp_path / "out", executor="ray", workers=2, progress=False)
    assert figures(results) == figures(whole)


@pytest.mark.slow
def test_a_ray_cluster_s_workers_get_the_permission_of_the_command(tiny, tmp_path, monkeypatch):
    """The cluster was started before, by somebody who allowed nothing; the module lies where its workers look."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    imported = tmp_path / "imported"
    imported.mkdir()
    code = f"import os, pathlib\n(pathlib.Path({str(imported)!r}) / str(os.getpid())).touch()\n"
    (tmp_path / "my_methods.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(permission.VARIABLE, raising=False)
    methods = {"lora": {"r": 4}, "mine": {"name": "my_methods:lora"}}
    study = write_study(tiny, **SHORT | {"methods": methods})
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with pytest.raises(UserError, match="--allow-module my_methods"):
            compare(study, tmp_path / "out", executor="ray", progress=False)
        assert not list(imported.iterdir())
        monkeypatch.setenv(permission.VARIABLE, "my_methods")
        results = compare(study, tmp_path / "out", executor="ray", progress=False)
        assert results["failed"] == []
        assert {file.name for file in imported.iterdir()} > {str(os.getpid())}, "a worker has imported it too"
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_what_lies_in_a_runs_place_is_not_removed(tiny, short, tmp_path):
    """A folder of the user's, or of somebody else, under the name that the run's own would have."""
    key = short["methods"][0]["seeds"][0]["key"]
    mine = tmp_path / "out/runs" / key / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    results = compare(write_study(tiny, **SHORT), tmp_path / "out", progress=False)
    assert mine.read_text() == "years of work"
    assert len(results["failed"]) == 1
    assert "is not a run" in results["failed"][0]


def test_a_clock_that_is_set_back_costs_no_time(tmp_path, monkeypatch):
    """Plans and budgets go by the seconds of runs, which were negative then."""
    from types import SimpleNamespace

    from dual_lora.lab.study import perform

    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(perform.time, "time", lambda: next(clock))
    monkeypatch.setattr(perform, "_base", lambda *_: {"metric": None})
    outcome = perform.perform(SimpleNamespace(key="ab12", kind="base"), tmp_path / "runs")
    assert 0 <= outcome.seconds < 60


def test_an_outcome_that_is_a_link_is_not_read(tmp_path):
    """A study may come from somebody else, and what a file of the user's holds would stand in its results."""
    from dual_lora.lab.study.job import Outcome, damage, read_outcome, write_outcome

    write_outcome(tmp_path, Outcome(key="ab12", seconds=1.0, status="diverged", error="mine"))
    assert read_outcome(tmp_path, "ab12").error == "mine"
    (tmp_path / "ab12.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "ab12.json").symlink_to(tmp_path / "elsewhere.json")
    assert read_outcome(tmp_path, "ab12") is None
    assert damage(tmp_path, "ab12").endswith("ab12.json is damaged.")


@pytest.mark.parametrize("second", ["symlink_to", "hardlink_to"])
def test_a_study_is_not_read_through_a_link(second, tmp_path):
    (tmp_path / "mine.json").write_text('{"study": {"name": "mine"}}')
    (tmp_path / "out").mkdir()
    getattr(tmp_path / "out/study.json", second)(tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"study\.json is damaged or another program's"):
        StudyFolder(tmp_path / "out").read()
