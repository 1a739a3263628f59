"""Run a study: plan, tune, repeat with fresh seeds, judge. Stopped at any moment, it goes on where it was.

OUT/state.sqlite    what has been done (see `state`)
OUT/study.yaml      the study as it was started
OUT/runs/           one folder and one outcome file a run (see `perform`); elsewhere for studies that share runs
OUT/results.json    what the study says so far (see `verdicts`); written after every stage
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dual_lora.lab.cost.forecast import Clock, estimates, learn_from, measured_speed
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.precision import AUTO
from dual_lora.lab.progress import Bar, console, in_words
from dual_lora.lab.run.write import write_atomically, write_json
from dual_lora.lab.study import plan
from dual_lora.lab.study.cell import Cell, Finished, cell_id, place_name
from dual_lora.lab.study.execute import check_executor, run_jobs, runs_side_by_side
from dual_lora.lab.study.job import base_jobs, choose, final_jobs, fingerprint, settings_in_words, trial_jobs
from dual_lora.lab.study.perform import KEPT, read_outcome
from dual_lora.lab.study.precision import settled_study
from dual_lora.lab.study.probes import match_by_probes
from dual_lora.lab.study.read import read_study
from dual_lora.lab.study.state import FINISHED, State
from dual_lora.lab.study.study import Study
from dual_lora.lab.study.verdicts import build_results

WRITE_SECONDS = 30.0  # between two writings of results.json while runs go on


@dataclass(frozen=True)
class Way:
    """How the runs are done."""

    executor: str
    workers: int
    keep: str
    progress: bool
    fresh: bool = False  # a process of its own for every run


def compare(
    source: str | Path,
    out: str | Path | None = None,
    *,
    runs: str | Path | None = None,
    executor: str = "serial",
    workers: int | None = None,
    update: bool = False,
    keep: str = "adapters",
    progress: bool = True,
) -> dict[str, Any]:
    """Run the study in a YAML file (or the shipped one of that name) in the folder `out`, and return its results.

    runs: where the single runs lie, `out`/runs unless told (and remembered). Studies that name the same folder share
    what they have in common: a run is known by its contents, and done once.
    executor: serial, process or ray; workers: runs at a time. update: go on although the study has changed since it
    was started; finished runs that it still contains are kept. keep: adapters of the final runs, all (full models
    too), or nothing but scores. Started again after any kind of stop, it repeats no finished run.

    Raises UserError for everything that a person can put right. Runs that fail with an error are recorded, the others
    go on; the results then say what is missing ("complete": false, "failed").
    """
    study, _ = read_study(source)
    if keep not in KEPT:
        raise UserError(f"keep is {keep!r}, expected one of {', '.join(KEPT)}.")
    folder = Path(out) if out is not None else Path("studies") / study.name
    way = Way(executor, runs_side_by_side(executor, workers), keep, progress)
    check_executor(executor)
    begun = (folder / "study.yaml").is_file()
    study, chosen = settled_study(study, folder)
    if progress and not begun and chosen.get("asked") == AUTO:
        console.print(f"auto: {chosen['precision']} for the whole study ({chosen['why']})", markup=False)
    cells = plan.lay_out(study)  # before the folder is made: what is wrong from the start leaves nothing behind
    with State(folder) as state:
        if state.notice:
            console.print(state.notice, markup=False)
        _notice_change(state, folder, update, "study", study.model_dump(mode="json"), folder / "study.yaml")
        _notice_change(state, folder, update, "recipes", _recipes(study))
        if runs is not None:
            state.put("runs", os.path.relpath(runs, folder))  # relative: a folder of studies may be moved as a whole
        if chosen and (state.get("precision") is None or not begun or update):
            state.put("precision", json.dumps(chosen))
        place = folder / (state.get("runs") or "runs")
        return _Course(study, folder, place, state, way, cells).run()


def _recipes(study: Study) -> dict[str, Any]:
    """What every task is, without its method; recipes are files of their own, and so are their data."""
    return {
        f"{place_name(model, task)} {part}": value
        for model, task, recipe in plan.places(study)
        for part, value in {**recipe.model_dump(mode="json"), "records": fingerprint(recipe)}.items()
        if part in ("model", "data", "train", "evaluate", "records")
    }


def _notice_change(
    state: State, folder: Path, update: bool, what: str, now: dict[str, Any], known: Path | None = None
) -> None:
    """Refuse to go on with something else than what was started, unless told to; then remember it."""
    before = state.get(what)
    if before is None and known and known.is_file():  # the state was lost: the folder still says which study it holds
        before = json.dumps(read_study(known)[0].model_dump(mode="json"))
    old = json.loads(before) if before else {}
    if what == "study" and old:
        old.setdefault("precision", now["precision"])  # begun before studies named theirs
    changed = [name for name in now if old and old.get(name) != now[name]]
    if changed and not update:
        subject = "study has" if what == "study" else "study's recipes or data have"
        raise UserError(
            f"The {subject} changed since it was started in {folder}: {', '.join(changed)}. Give --update to go on "
            "with what is now (finished runs that it still contains are kept), or another --out to start anew."
        )
    if known:
        import yaml

        write_atomically(known, yaml.safe_dump(now, sort_keys=False, allow_unicode=True, width=110))
    state.put(what, json.dumps(now))


class _Course:
    """One call of `compare`: the stages in their order."""

    def __init__(self, study: Study, folder: Path, runs: Path, state: State, way: Way, cells: list[Cell]):
        self.study, self.folder, self.state, self.way, self.cells = study, folder, state, way, cells
        self.runs = runs
        self.failed: dict[str, str] = {}
        self.clock = Clock({})
        self.trials: dict[str, list[dict[str, Any]]] = {}
        self.chosen: dict[str, dict[str, Any] | None] = {}
        self.finals: dict[str, list[dict[str, Any]]] = {}
        self.later: list[dict[str, Any]] = []  # like the jobs of the stages to come
        self.warnings: set[str] = set()
        self._written = 0.0

    def run(self) -> dict[str, Any]:
        learn_from(self.clock, self.state.entries())
        self._match_by_probes()
        if self.way.progress:
            self.clock.estimates = estimates(self.cells, measured_speed())
        self.later = [job for cell in self.cells for job in final_jobs(self.study, cell, {})] + base_jobs(self.cells)
        self.trials = {cell_id(cell): trial_jobs(self.study, cell) for cell in self.cells}
        self._do("tuning", _in_turns(self.trials.values()))
        for cell in self.cells:
            key = cell_id(cell)
            settings = choose(self.trials[key], [self._outcome(job) for job in self.trials[key]])
            self.chosen[key] = settings
            self.finals[key] = final_jobs(self.study, cell, settings) if settings is not None else []
        self.later = []
        self._do("runs", [*base_jobs(self.cells), *_in_turns(self.finals.values())])
        return self._results()

    def _do(self, what: str, jobs: Sequence[dict[str, Any]]) -> None:
        """Make sure that every job has an outcome or a recorded error."""
        jobs = list({job["key"]: job for job in jobs}.values())
        if not jobs:
            return
        self.state.plan(jobs)
        self._adopt(jobs)
        left = {job["key"]: job for job in jobs if self._outcome(job) is None}  # the folders are the truth
        with Bar(what, len(jobs), self.way.progress, len(jobs) - len(left), timed=False) as bar:
            bar.to(len(jobs) - len(left), self._note(left))
            for key, outcome, error in run_jobs(
                self.way.executor,
                [job | {"runs_at_a_time": min(self.way.workers, len(left))} for job in left.values()],
                self.runs,
                self.way.workers,
                self.way.keep,
                self.state.start,
                self.way.fresh,
            ):
                job = left.pop(key)
                if outcome is not None:
                    self.state.finish(key, outcome)
                    self.clock.learn(job, outcome["seconds"])
                    self._warn(outcome.get("warnings", []))
                else:
                    self.failed[key] = f"{_name(job)}: {error}"
                    self.state.fail(key, error or "unknown")
                    if self.way.progress:
                        console.print(f"failed: {self.failed[key]}", markup=False)
                bar.to(len(jobs) - len(left), self._note(left, job, outcome))
                if time.time() - self._written > WRITE_SECONDS and self.trials:
                    self._results()

    def _warn(self, messages: Sequence[str]) -> None:
        """Say each warning once, whichever run and process it comes from."""
        for message in messages:
            if message not in self.warnings and self.way.progress:
                console.print(f"warning: {message}", markup=False, soft_wrap=True)
            self.warnings.add(message)

    def _note(
        self, left: dict[str, dict[str, Any]], job: dict[str, Any] | None = None, outcome: dict[str, Any] | None = None
    ) -> str:
        remaining = self.clock.left([*left.values(), *self.later], self.way.workers)
        note = f"about {in_words(remaining)} left" if left and remaining is not None else ""
        if job is None:
            return note
        said = "failed" if outcome is None else outcome["status"]
        if outcome and outcome.get("score") is not None:
            said = f"{outcome['metric']} {outcome['score']:.4g}"
        return f"{_name(job)}: {said}" + (f" · {note}" if note else "")

    def _adopt(self, jobs: Sequence[dict[str, Any]]) -> None:
        """Take up what was finished while no leader was there to note it down, or whose note was lost."""
        entries = self.state.entries()
        for job in jobs:
            if entries[job["key"]].status not in FINISHED and (found := read_outcome(self.runs, job["key"])):
                self.state.finish(job["key"], found)
                self.clock.learn(job, found["seconds"])

    def _outcome(self, job: dict[str, Any]) -> dict[str, Any] | None:
        return read_outcome(self.runs, job["key"])

    def _results(self) -> dict[str, Any]:
        """What the study says so far, also in results.json."""
        from dual_lora.lab.run.record import surroundings

        finished = []
        for cell in self.cells:
            key = cell_id(cell)
            trials = [(job, self._outcome(job)) for job in self.trials[key]]
            finals = [(job, self._outcome(job)) for job in self.finals.get(key, [])]
            doomed = bool(trials) and all(outcome and outcome["status"] == "diverged" for _, outcome in trials)
            finished.append(Finished(cell, trials, self.chosen.get(key), finals, doomed))
        untrained = [
            {"model": job["model"], "task": job["task"]}
            | {key: outcome[key] for key in ("metric", "score", "constant") if key in outcome}
            for job in base_jobs(self.cells)
            if (outcome := self._outcome(job)) and outcome["status"] == "done"
        ]
        results = build_results(self.study, finished, self.runs, untrained)
        results["untrained"] = untrained
        results["precision"] = json.loads(self.state.get("precision") or "null")
        results["failed"] = sorted(self.failed.values())
        results["provenance"] = surroundings() | {
            "executor": self.way.executor,
            "runs_at_a_time": self.way.workers,
            "seconds_of_runs": round(sum(e.outcome["seconds"] for e in self.state.entries().values() if e.outcome), 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(self.folder / "results.json", results)
        self._written = time.time()
        return results

    def _match_by_probes(self) -> None:
        match = self.study.budget.match
        if match not in ("time", "memory"):
            return
        if match == "memory":  # peaks need processes of their own
            executor = "process" if self.way.executor == "serial" else self.way.executor
            self.way = replace(self.way, executor=executor, fresh=True)
        match_by_probes(self.study, self.cells, self._measure)

    def _measure(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        self._do("probes", jobs)
        return [self._probed(job) for job in jobs]

    def _probed(self, job: dict[str, Any]) -> dict[str, Any]:
        outcome = self._outcome(job)
        if outcome is None or outcome["status"] != "done":
            reason = self.failed.get(job["key"], "it diverged")
            raise UserError(
                f"The budget cannot be matched: the probe of {job['method']} on {job['task']} gave nothing ({reason})."
            )
        return outcome["training"]


def _name(job: dict[str, Any]) -> str:
    where = f"{job['method']} on {job['task']}" + (f" ({job['model']})" if job["model"] else "")
    if job["kind"] == "trial":
        return f"{where}, {settings_in_words(job['settings'])}"
    return where if job["kind"] != "final" else f"{where}, seed {job['seed']}"


def _in_turns(groups: Any) -> list[dict[str, Any]]:
    """First run of every group, then the second ...: a study that is stopped early has complete pairs."""
    groups = [list(group) for group in groups]
    return [group[i] for i in range(max(map(len, groups), default=0)) for group in groups if i < len(group)]
