"""Where a study's runs are done: one after another here, in processes of their own, or on Ray. Same results.

The outcome file of a run is the only channel that counts: a worker writes it whole, the leader reads it. So a worker
may be killed, and so may the leader; an orphaned worker notices its leader's death and ends.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

from dual_lora.lab import permission
from dual_lora.lab.errors import UserError, described, suggest
from dual_lora.lab.interrupt import exit_status, on_signals, stop_at_once
from dual_lora.lab.run.write import write_json
from dual_lora.lab.study.perform import perform, read_outcome
from dual_lora.lab.terminal import guarded

Executor = Literal["serial", "process", "ray"]
Ended = tuple[str, dict[str, Any] | None, str | None]  # key, outcome, error


def run_jobs(
    executor: str,
    jobs: Sequence[dict[str, Any]],
    runs: Path,
    workers: int,
    keep: str,
    started: Callable[[str], None],
    fresh: bool = False,
) -> Iterator[Ended]:
    """Do the jobs and yield each as it ends, with its outcome or its error. `started` is told of each that begins.

    fresh: a new process for every run, so that its peak memory is its own to the last byte (imports cost seconds).
    """
    if executor == "serial":
        return _serially(jobs, runs, keep, started)
    if executor == "process":
        return _in_processes(jobs, runs, workers, keep, started, fresh)
    if executor == "ray":
        return _on_ray(jobs, runs, workers, keep, started, fresh)
    raise AssertionError(executor)


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
    """How many runs go on at a time: as many as were asked for, else one a GPU, else one a core."""
    import torch

    return 1 if executor == "serial" else workers or torch.cuda.device_count() or os.cpu_count() or 1


def _serially(jobs: Sequence[dict[str, Any]], runs: Path, keep: str, started: Callable[[str], None]) -> Iterator[Ended]:
    for job in jobs:
        started(job["key"])
        try:
            yield job["key"], perform(job, runs, keep), None
        except Exception as error:
            yield job["key"], None, described(error)
        gc.collect()


@dataclass
class _Worker:
    """A process that does one job after another, and the leader's end of the line to it."""

    process: Any
    line: Connection
    slot: int  # which of the places side by side it has
    key: str | None = None


def _in_processes(
    jobs: Sequence[dict[str, Any]],
    runs: Path,
    workers: int,
    keep: str,
    started: Callable[[str], None],
    fresh: bool,
) -> Iterator[Ended]:
    from multiprocessing.connection import wait

    waiting = list(jobs)
    team: list[_Worker] = []
    try:
        while waiting or any(worker.key for worker in team):
            if waiting and len(team) < min(workers, len(jobs)) and all(worker.key for worker in team):
                slot = min(set(range(workers)) - {worker.slot for worker in team})
                team.append(_hire(runs, keep, workers, slot))
            for worker in team:
                if waiting and worker.key is None:
                    job = waiting.pop(0)
                    worker.key = job["key"]
                    _error_file(runs, job["key"]).unlink(missing_ok=True)
                    worker.line.send(job)
                    started(job["key"])
            if waiting and len(team) < workers:
                continue
            for line in wait([worker.line for worker in team if worker.key]):
                worker = next(w for w in team if w.line is line)
                key, worker.key = worker.key, None
                assert key is not None
                code = None
                try:
                    worker.line.recv()  # "done": outcome or error lies in its file
                except (EOFError, OSError):
                    worker.process.join()
                    code = worker.process.exitcode
                    team.remove(worker)
                if code is None and fresh:
                    _dismiss(worker)
                    team.remove(worker)
                outcome = read_outcome(runs, key)
                yield key, outcome, None if outcome else _last_words(runs, key, code)
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.process.join()


def _hire(runs: Path, keep: str, workers: int, slot: int) -> _Worker:
    """A new process with its share of the machine."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_work, args=(theirs, runs, keep), daemon=False)
    share = _share(slot, workers)
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


def _share(slot: int, workers: int) -> dict[str, str]:
    """What the environment says to the worker in this slot: how many cores it uses, and which GPU, in turn."""
    import torch

    cores = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
    cards = torch.cuda.device_count()
    if not cards:
        return {"OMP_NUM_THREADS": cores}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(cards)))).split(",")
    return {"OMP_NUM_THREADS": cores, "CUDA_VISIBLE_DEVICES": visible[slot % cards].strip()}


def _dismiss(worker: _Worker) -> None:
    worker.line.close()
    worker.process.join()


@guarded()
def _work(line: Connection, runs: Path, keep: str) -> None:
    """Do the jobs that come down the line, until it is closed."""
    _end_with_parent()
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|datasets)\b")
    try:
        with on_signals(stop_at_once):
            while True:
                job = line.recv()
                try:
                    perform(job, runs, keep)
                except Exception as error:
                    with contextlib.suppress(OSError):  # a full disk: the leader then says that the process ended
                        write_json(_error_file(runs, job["key"]), described(error))
                gc.collect()
                line.send("done")
    except EOFError:
        return
    except KeyboardInterrupt as error:
        sys.exit(exit_status(error))  # the leader was told as well


def _end_with_parent() -> None:
    """An orphan would go on for hours on a machine that somebody wants to use: end when the leader is gone."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _error_file(runs: Path, key: str) -> Path:
    return runs / f"{key}.error.json"


def _last_words(runs: Path, key: str, code: int | None) -> str:
    import json

    try:
        return json.loads(_error_file(runs, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        killed = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return f"Its process {killed}; too little memory is the usual reason."


def _on_ray(
    jobs: Sequence[dict[str, Any]],
    runs: Path,
    workers: int,
    keep: str,
    started: Callable[[str], None],
    fresh: bool,
) -> Iterator[Ended]:
    import ray
    import torch

    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False, **_local(workers))
        except Exception as error:
            raise UserError(f"Ray could not be reached or started: {described(error)}") from error
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0}
    if permission.allowed():  # a cluster's workers do not inherit this process's environment
        needs["runtime_env"] = {"env_vars": {permission.VARIABLE: ",".join(permission.allowed())}}
    remote = ray.remote(max_calls=1 if fresh else 0, max_retries=0, **needs)(perform)
    folder = runs.resolve()  # every node has to see it; results also come back with the answer
    pending = {remote.remote(job, folder, keep): job["key"] for job in jobs}
    for key in pending.values():
        started(key)
    while pending:
        (ready, *_), _ = ray.wait(list(pending), num_returns=1)
        key = pending.pop(ready)
        try:
            yield key, ray.get(ready), None
        except Exception as error:
            yield key, read_outcome(runs, key), described(getattr(error, "cause", None) or error)


def _local(workers: int) -> dict[str, Any]:
    """A Ray of our own with so many workers, unless the surroundings name a cluster."""
    return {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
