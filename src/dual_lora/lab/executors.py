"""Where a study's runs are done: one after another here, in processes of their own, or on Ray. Same results.

The outcome file of a run is the only channel that counts: a worker writes it whole, the leader reads it. So a worker
may be killed, and so may the leader; an orphaned worker notices its leader's death and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.perform import perform, read_outcome
from dual_lora.lab.state import write_json

Executor = Literal["serial", "process", "ray"]
Ended = tuple[str, dict[str, Any] | None, str | None]  # key, outcome, error

_MAX_ERROR = 2000  # characters of an error that are kept


def run_jobs(
    executor: str, jobs: Sequence[dict[str, Any]], runs: Path, workers: int, keep: str, started: Callable[[str], None]
) -> Iterator[Ended]:
    """Do the jobs and yield each as it ends, with its outcome or its error. `started` is told of each that begins."""
    if executor == "serial":
        return _serially(jobs, runs, keep, started)
    if executor == "process":
        return _in_processes(jobs, runs, workers, keep, started)
    if executor == "ray":
        return _on_ray(jobs, runs, workers, keep, started)
    known = get_args(Executor)
    raise UserError(f"There is no executor {executor!r}.{suggest(executor, known)}")


def _serially(jobs: Sequence[dict[str, Any]], runs: Path, keep: str, started: Callable[[str], None]) -> Iterator[Ended]:
    for job in jobs:
        started(job["key"])
        try:
            yield job["key"], perform(job, runs, keep), None
        except Exception as error:
            yield job["key"], None, _described(error)


def _in_processes(
    jobs: Sequence[dict[str, Any]], runs: Path, workers: int, keep: str, started: Callable[[str], None]
) -> Iterator[Ended]:
    from multiprocessing.connection import wait

    spawn = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    active: dict[str, Any] = {}
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                job = waiting.pop(0)
                _error_file(runs, job["key"]).unlink(missing_ok=True)
                child = spawn.Process(target=_child, args=(job, runs, keep))
                child.start()
                active[job["key"]] = child
                started(job["key"])
            wait([child.sentinel for child in active.values()])
            for key in [k for k, child in active.items() if not child.is_alive()]:
                child = active.pop(key)
                child.join()
                outcome = read_outcome(runs, key)
                yield key, outcome, None if outcome else _last_words(runs, key, child.exitcode)
    finally:
        for child in active.values():
            child.terminate()
        for child in active.values():
            child.join()
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)


def _child(job: dict[str, Any], runs: Path, keep: str) -> None:
    """One run in a process of its own."""
    _end_with_parent()
    try:
        perform(job, runs, keep)
    except KeyboardInterrupt:
        sys.exit(130)  # the leader was told as well
    except Exception as error:
        write_json(_error_file(runs, job["key"]), _described(error))
        sys.exit(1)


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


def _described(error: BaseException) -> str:
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return (name + " ".join(str(error).split()))[:_MAX_ERROR]


def _on_ray(
    jobs: Sequence[dict[str, Any]], runs: Path, workers: int, keep: str, started: Callable[[str], None]
) -> Iterator[Ended]:
    try:
        import ray
    except ImportError:
        raise UserError("The executor ray needs Ray: `pip install ray`, or take --executor process.") from None
    import torch

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, **_local(workers))
    needs = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0}
    # A fresh process for each run (max_calls), as with processes: peak memory is then the run's own.
    remote = ray.remote(max_calls=1, max_retries=0, **needs)(perform)
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
            yield key, read_outcome(runs, key), _described(getattr(error, "cause", None) or error)


def _local(workers: int) -> dict[str, Any]:
    """A Ray of our own with so many workers, unless the surroundings name a cluster."""
    return {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers}
