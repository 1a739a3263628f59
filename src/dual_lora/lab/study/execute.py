"""The places where a study's runs are done: one after another here, in processes of their own, or on Ray. Same results.

The outcome file of a run is the only channel that counts: a worker writes it whole, the runner reads it. So a worker
may be killed, and so may the runner; an orphaned worker notices its runner's death and ends.
"""

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from dual_lora.lab import permission
from dual_lora.lab.errors import UserError, described, suggest
from dual_lora.lab.interrupt import exit_status, on_signals, stop_at_once
from dual_lora.lab.noise import silence_libraries
from dual_lora.lab.study.job import Job, Outcome, check_data, read_outcome
from dual_lora.lab.study.perform import DiskFull, perform, set_aside
from dual_lora.lab.terminal import guarded

Executor = Literal["serial", "process", "ray"]


@dataclass(frozen=True)
class Options:
    """The way in which runs are done. fresh: each in a new process, so that its peak memory is its own to the last
    byte."""

    executor: str = "serial"
    workers: int = 1
    keep: str = "adapters"
    progress: bool = True
    fresh: bool = False
    report_to: tuple[str, ...] = ()  # where final runs send what they log


class Answer(NamedTuple):
    """A run that has ended, with its outcome or its error."""

    key: str
    outcome: Outcome | None
    error: str = ""


def run_jobs(options: Options, jobs: Sequence[Job], runs: Path) -> Iterator[Answer]:
    """Do the jobs and yield each as it ends. Raises DiskFull where there is no room: no other run could be written."""
    how = {"serial": _serially, "process": _in_processes, "ray": _on_ray}[options.executor]
    return how(options, jobs, runs, min(options.workers, len(jobs)))


def check_executor(executor: str) -> None:
    """Raise UserError for an executor that there is not, or that is not installed."""
    if executor not in get_args(Executor):
        raise UserError(f"There is no executor {executor!r}.{suggest(executor, get_args(Executor))}")
    if executor == "ray":
        try:
            import ray  # noqa: F401
        except ImportError:
            raise UserError("The executor ray needs Ray: `pip install ray`, or take --executor process.") from None


def runs_side_by_side(executor: str, workers: int | None) -> int:
    """Return how many runs go on at a time: the requested number, else one per GPU, else one per core."""
    return 1 if executor == "serial" else workers or torch.cuda.device_count() or os.cpu_count() or 1


def do(job: Job, runs: Path, keep: str, at_a_time: int) -> Outcome:
    """Do one job on the records that it was planned for. Raises what `perform` raises, and UserError for other ones."""
    check_data(job)
    outcome = perform(job, runs, keep, at_a_time)
    try:
        check_data(job)
    except UserError:
        set_aside(runs, outcome.key, outcome.code)
        raise
    return outcome


def _serially(options: Options, jobs: Sequence[Job], runs: Path, at_a_time: int) -> Iterator[Answer]:
    for job in jobs:
        try:
            yield Answer(job.key, do(job, runs, options.keep, at_a_time))
        except DiskFull:
            raise
        except Exception as error:
            yield Answer(job.key, None, described(error))
        gc.collect()


@dataclass
class _Worker:
    """A process that does one job after another, and the runner's end of the line to it."""

    process: Any
    line: Connection
    slot: int  # which of the workers it is: its share of cores and cards
    key: str | None = None


def _in_processes(options: Options, jobs: Sequence[Job], runs: Path, at_a_time: int) -> Iterator[Answer]:
    from multiprocessing.connection import wait

    waiting = list(jobs)
    team: list[_Worker] = []
    try:
        while waiting or any(worker.key for worker in team):
            if waiting and len(team) < at_a_time and all(worker.key for worker in team):
                slot = min(set(range(at_a_time)) - {worker.slot for worker in team})
                team.append(_start_worker(runs, options, at_a_time, slot))
            for worker in team:
                if waiting and worker.key is None:
                    job = waiting.pop(0)
                    worker.key = job.key
                    worker.line.send(job)
            if waiting and len(team) < at_a_time:
                continue
            for line in wait([worker.line for worker in team if worker.key]):
                worker = next(w for w in team if w.line is line)
                key, worker.key = worker.key, None
                assert key is not None
                try:
                    error, full = worker.line.recv()
                    if options.fresh:
                        worker.line.close()
                        worker.process.join()
                        team.remove(worker)
                except (EOFError, OSError):
                    worker.process.join()
                    error, full = _process_error(worker.process.exitcode), False
                    team.remove(worker)
                if full:
                    raise DiskFull(error)
                outcome = read_outcome(runs, key)
                yield Answer(key, outcome, "" if outcome else error)
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.process.join()


def _start_worker(runs: Path, options: Options, at_a_time: int, slot: int) -> _Worker:
    """A new process with its share of the machine."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, runs, options.keep, at_a_time), daemon=False)
    share = _worker_environment(slot, options.workers)
    before = {name: os.environ.get(name) for name in share}
    os.environ.update(share)
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return _Worker(process, ours, slot)


def _worker_environment(slot: int, workers: int) -> dict[str, str]:
    """Return the environment of the worker in this slot: how many cores it uses, and which GPU, in turn; and that it
    imports nothing from the folder that the command is given in."""
    cores = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    variables = {"OMP_NUM_THREADS": cores, permission.SAFE_PATH: "1"}
    cards = torch.cuda.device_count()
    if not cards:
        return variables
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cards)))).split(",")
    return {**variables, "CUDA_VISIBLE_DEVICES": visible[slot % cards].strip()}


@guarded()
def _work(line: Connection, runs: Path, keep: str, at_a_time: int) -> None:
    """Do the jobs that come down the line, until it is closed. Answers with the error, and whether the disk is full."""
    _end_with_parent()
    silence_libraries()
    try:
        with on_signals(stop_at_once):
            while True:
                job = line.recv()
                answer = "", False
                try:
                    do(job, runs, keep, at_a_time)
                except Exception as error:
                    answer = described(error), isinstance(error, DiskFull)
                gc.collect()
                line.send(answer)
    except EOFError:
        return
    except KeyboardInterrupt as error:
        sys.exit(exit_status(error))  # the runner was told as well


def _end_with_parent() -> None:
    """End this process when the runner is gone; an orphan would go on for hours."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _process_error(code: int | None) -> str:
    killed = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    return f"Its process {killed}; too little memory is the usual reason."


def _start_ray(ray: Any, workers: int) -> None:
    """Start a Ray of our own with so many workers, or reach the cluster that the surroundings name.

    From the root of the file system: Ray puts the folder in which it is started before all others from which its
    workers import, and a module that lies in the folder of a study would run there.
    """
    here = os.getcwd()
    own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
    if named := os.environ.get("PYTHONPATH"):  # by the user, who may mean this folder
        os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, named.split(os.pathsep))))
    os.chdir(Path(here).anchor)
    try:
        ray.init(log_to_driver=False, include_dashboard=False, **own)
    except Exception as error:
        raise UserError(f"Ray could not be reached or started: {described(error)}") from error
    finally:
        os.chdir(here)


def _do_in(here: str, *of: Any) -> Outcome:
    """Do a job in a process of Ray, where records are found from the same folder as in the command."""
    with contextlib.suppress(OSError):  # it may not be on this node
        os.chdir(here)
    return do(*of)


def _on_ray(options: Options, jobs: Sequence[Job], runs: Path, at_a_time: int) -> Iterator[Answer]:
    import ray

    here = os.getcwd()
    if not ray.is_initialized():
        _start_ray(ray, options.workers)
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0}
    if permission.allowed():  # a cluster's workers do not inherit this process's environment
        needs["runtime_env"] = {"env_vars": {permission.VARIABLE: ",".join(permission.allowed())}}
    remote = ray.remote(max_calls=1 if options.fresh else 0, max_retries=0, **needs)(_do_in)
    folder = runs.resolve()  # every node has to see it; results also come back with the answer
    pending = {remote.remote(here, job, folder, options.keep, at_a_time): job.key for job in jobs}
    try:
        while pending:
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            key = pending.pop(ready)
            try:
                yield Answer(key, ray.get(ready))
            except Exception as problem:
                cause = getattr(problem, "cause", None) or problem
                if isinstance(cause, DiskFull):
                    raise cause from problem
                yield Answer(key, read_outcome(runs, key), described(cause))
    finally:
        for task in pending:
            with contextlib.suppress(Exception):
                ray.cancel(task)
