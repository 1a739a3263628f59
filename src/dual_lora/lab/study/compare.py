"""Run a study: plan, tune, repeat with fresh seeds, judge. Stopped at any moment, it goes on where it was.

What lies in the study's folder is said in `folder`, what a run leaves there in `job`.
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, is_disk_full
from dual_lora.lab.files.write import write_json
from dual_lora.lab.model.precision import AUTO
from dual_lora.lab.model.weights import weights_digest
from dual_lora.lab.progress import Bar, console, in_words, stage
from dual_lora.lab.run.record import code_version, surroundings
from dual_lora.lab.run.reporting import check_reports
from dual_lora.lab.study import notes
from dual_lora.lab.study.budget import match_by_probes
from dual_lora.lab.study.cell import Cell, Ended, Finished, base_jobs, final_jobs, trial_jobs
from dual_lora.lab.study.execute import Options, check_executor, run_jobs, runs_side_by_side
from dual_lora.lab.study.folder import StudyFolder, study_folder
from dual_lora.lab.study.forecast import RunTimes, Speed, estimates
from dual_lora.lab.study.job import (
    Job,
    Outcome,
    Settings,
    damage,
    data_digest,
    on_other_weights,
    read_outcome,
    task_name,
)
from dual_lora.lab.study.perform import KEPT, DiskFull, set_aside
from dual_lora.lab.study.plan import Plan, lay_out, settled_plan
from dual_lora.lab.study.read import read_study
from dual_lora.lab.study.results import build_results
from dual_lora.lab.study.rows import Results
from dual_lora.lab.study.search import choose
from dual_lora.lab.study.study import Study

WRITE_SECONDS = 30.0  # between two writings of results.json while runs go on


def compare(
    source: str | Path | Study,
    out: str | Path | None = None,
    *,
    runs: str | Path | None = None,
    executor: str = "serial",
    workers: int | None = None,
    keep: str = "adapters",
    progress: bool = True,
    report_to: Sequence[str] = (),
    longer: bool = False,
) -> Results:
    """Run a study, that of a YAML file or the shipped one of that name in the folder `out`, and return its results.

    runs: where the single runs lie, `out`/runs unless told. Studies that name the same folder share what they have in
    common: a run is known by its contents, and done once.
    executor: serial, process or ray; workers: runs at a time. keep: adapters of the final runs, all (full models too),
    or nothing but scores. Started again after any kind of stop, it repeats no finished run. report_to: where final runs
    send what they log (see `reporting`). longer: the next look of an advice (see `StudyFolder.begin`).

    Raises UserError for everything that a person can put right. Runs that fail with an error are recorded, the others
    go on; the results then say what is missing ("complete": false, "failed").
    """
    study = read_study(source)
    if keep not in KEPT:
        raise UserError(f"keep is {keep!r}, expected one of {', '.join(KEPT)}.")
    folder = StudyFolder(study_folder(study.name, out)).read()
    to = check_reports(report_to)
    options = Options(executor, runs_side_by_side(executor, workers), keep, progress, report_to=to)
    check_executor(executor)
    with stage(f"planning {study.name}", progress):
        plan = settled_plan(study, folder)
        chosen = plan.precision
        if progress and not folder.known.study and chosen.get("asked") == AUTO:
            console.print(f"auto: {chosen['precision']} for the whole study ({chosen['why']})", markup=False)
        cells = lay_out(plan)  # before the folder is made: what is wrong from the start leaves nothing behind
    runs_folder = folder.runs(runs)
    try:
        with folder:
            folder.read().begin(plan.study.model_dump(mode="json"), _recipes(plan), chosen, runs_folder, longer)
            return Runner(plan.study, folder, runs_folder, options, cells).run()
    except (DiskFull, OSError) as error:
        if not (isinstance(error, DiskFull) or is_disk_full(error)):
            raise
        raise UserError(
            f"The disk is full ({error}). Every finished run is safe in {runs_folder}. Make room, then start the same "
            "command again: it goes on from there."
        ) from error


def _recipes(plan: Plan) -> dict[str, Any]:
    """Describe every task without its method: recipes are separate files, and so are their data."""
    return {
        f"{task_name(model, task)} {part}": value
        for (model, task), recipe in plan.recipes.items()
        for part, value in {
            **recipe.model_dump(mode="json", include={"model", "data", "train", "evaluate"}),
            "records": data_digest(recipe),
            "weights": weights_digest(recipe.model),
        }.items()
    }


class Runner:
    """One call of `compare`: the stages in their order."""

    def __init__(self, study: Study, folder: StudyFolder, runs: Path, options: Options, cells: list[Cell]):
        self.study, self.folder, self.runs, self.options, self.cells = study, folder, runs, options, cells
        self.failed: dict[str, str] = {}
        self.times = RunTimes()
        self.done: dict[str, Outcome] = {}
        self.trials: dict[tuple[str, str, str], list[Job]] = {}
        self.chosen: dict[tuple[str, str, str], Settings | None] = {}
        self.finals: dict[tuple[str, str, str], list[Job]] = {}
        self.later: list[Job] = []  # like the jobs of the stages to come
        self.warnings: set[tuple[tuple[str, str], str]] = set()  # of which task, and in which form
        self._written = 0.0

    def run(self) -> Results:
        """Do what is missing, stage by stage; returns the results."""
        if self.study.budget.match == "memory":  # peaks need processes of their own
            executor = "process" if self.options.executor == "serial" else self.options.executor
            self.options = replace(self.options, executor=executor, fresh=True)
        match_by_probes(self.study, self.cells, self._measure)
        if self.options.progress:
            self.times.estimates = estimates(self.study, self.cells, Speed())
        bases = base_jobs(self.cells)
        self._check_same_base([*bases, *(job for cell in self.cells for job in trial_jobs(self.study, cell))])
        self.later = [job for cell in self.cells for job in final_jobs(self.study, cell, {})] + bases
        while (trials := {c.at: trial_jobs(self.study, c, self._outcome) for c in self.cells}) != self.trials:
            self.trials = trials  # a best rate at the end of its grid makes another trial
            self._run_jobs("tuning", _in_turns(trials.values()))
        decide = self.study.search.decide if self.study.search else "mean"
        for cell in self.cells:
            self.chosen[cell.at] = settings = choose(self._ended(trials[cell.at]), decide)
            self.finals[cell.at] = final_jobs(self.study, cell, settings) if settings is not None else []
        self.later = []
        finals = _in_turns(self.finals.values())
        self._check_same_base([*bases, *finals])
        self.folder.begin_finals(sum(self._outcome(job) is not None for job in finals))
        self._run_jobs("runs", [*bases, *finals])
        if self._runs_on_other_weights([*bases, *finals, *_in_turns(self.trials.values())]):
            raise UserError(
                "The weights of a base have changed while the study went on, so its runs are of several. Put the "
                "first ones back and start the study again, or give another --out."
            )
        return self._results()

    def _run_jobs(self, what: str, jobs: Sequence[Job]) -> None:
        """Make sure that every job has an outcome or a recorded error."""
        jobs = list({job.key: job for job in jobs}.values())
        if not jobs:
            return
        self._check_same_base(jobs)
        self.folder.plan(jobs)
        self._check_same_version(jobs)
        left = {job.key: job for job in jobs if self._outcome(job) is None and job.key not in self.failed}
        for job in left.values():
            if why := damage(self.runs, job.key):
                self._print(f"{why} That run alone is done again: {job}.")
        to = self.options.report_to  # no part of the key
        ready = [replace(job, report_to=to) if job.kind == "final" else job for job in left.values()]
        with Bar(what, len(jobs), self.options.progress, len(jobs) - len(left), timed=False) as bar:
            bar.to(len(jobs) - len(left), self._note(left))
            for key, outcome, error in run_jobs(self.options, ready, self.runs) if ready else ():
                job = left.pop(key)
                if outcome is not None:
                    self._learn(job, outcome)
                    self._warn(job, outcome)
                else:
                    self.failed[key] = f"{job}: {error}"
                    self._print(f"failed: {self.failed[key]}")
                bar.to(len(jobs) - len(left), self._note(left, job, outcome))
                if time.monotonic() - self._written > WRITE_SECONDS and self.trials:
                    self._results()

    def _runs_on_other_weights(self, jobs: Sequence[Job]) -> list[str]:
        """Keys of runs that were made on other weights of their base, as far as they tell."""
        other = on_other_weights(self.runs)
        return [job.key for job in jobs if other(job)]

    def _check_same_base(self, jobs: Iterable[Job]) -> None:
        """Refuse the study's own runs on other weights of their base; do those of another study, which shares the
        folder, and unfinished ones again."""
        there = [job for job in jobs if (self.runs / job.key).exists() or self._outcome(job) is not None]
        if old := self._runs_on_other_weights(there):
            finished = [key for key in old if key in self.folder.before and read_outcome(self.runs, key)]
            if finished:
                raise UserError(
                    f"{len(finished)} finished runs were made on other weights of the base than are there now: "
                    "compared with new runs, a difference might be the base's. Put those weights back, or give "
                    "another --out."
                )
            self._print(f"{len(old)} runs on other weights of the base are done again; the old ones are kept.")
            for key in old:
                outcome = read_outcome(self.runs, key)
                set_aside(self.runs, key, outcome.code if outcome else "unfinished")
                self.done.pop(key, None)

    def _check_same_version(self, jobs: Sequence[Job]) -> None:
        """Raise UserError for runs of two versions of the code."""
        now, old = code_version(), list[Outcome]()
        paired = [job for job in jobs if job.kind != "base"]
        for scenario in dict.fromkeys(job.scenario for job in paired):
            outcomes = [self._outcome(job) for job in paired if job.scenario == scenario]
            codes = {now if outcome is None else outcome.code for outcome in outcomes} - {None}
            if len(codes) > 1:
                old += [outcome for outcome in outcomes if outcome and outcome.code not in (None, now)]
        if not old:
            return
        others = "; ".join(sorted({str(outcome.code) for outcome in old}))
        raise UserError(
            f"{len(old)} finished runs were done by another version of the code ({others}) than this one ({now}): "
            "compared with new runs, a difference might be the code's. Go on with that version, or give another --out "
            "(and no --runs of that version)."
        )

    def _print(self, message: str) -> None:
        if self.options.progress:
            console.print(message, markup=False, soft_wrap=True)

    def _warn(self, job: Job, outcome: Outcome) -> None:
        """Say each warning once a task, whichever run and process it comes from, and whatever numbers it has there."""
        for message in outcome.warnings:
            if (known := (job.scenario, notes.without_numbers(message))) not in self.warnings:
                self._print(f"warning: {message}")
            self.warnings.add(known)

    def _note(self, left: dict[str, Job], job: Job | None = None, outcome: Outcome | None = None) -> str:
        remaining = self.times.left([*left.values(), *self.later], self.options.workers)
        note = f"about {in_words(remaining)} left" if left and remaining is not None else ""
        if job is None:
            return note
        end: str = "failed" if outcome is None else outcome.status
        if outcome and outcome.score is not None:
            end = f"{outcome.metric} {outcome.score:.4g}"
        return f"{job}: {end}" + (f" · {note}" if note else "")

    def _outcome(self, job: Job) -> Outcome | None:
        """Return the outcome of the job, None without one; its files are the truth."""
        if job.key not in self.done and (found := read_outcome(self.runs, job.key)):
            self._learn(job, found)
        return self.done.get(job.key)

    def _learn(self, job: Job, outcome: Outcome) -> None:
        self.done[job.key] = outcome
        self.times.learn(job, outcome.seconds)

    def _ended(self, jobs: Iterable[Job]) -> list[Ended]:
        return [(job, self._outcome(job)) for job in jobs]

    def _results(self) -> Results:
        """Build the results so far, and write them to results.json."""
        finished = [
            Finished(c, self._ended(self.trials[c.at]), self.chosen.get(c.at), self._ended(self.finals.get(c.at, [])))
            for c in self.cells
        ]
        bases = self._ended(base_jobs(self.cells))
        untrained: list[Any] = [
            {"model": job.model, "task": job.task}
            | outcome.model_dump(include={"metric", "score", "constant"}, exclude_none=True)
            for job, outcome in bases
            if outcome and outcome.status == "done"
        ]
        known = self.folder.known.model_dump(mode="json", include={"amendments", "plan"})
        results = build_results(self.study, finished, self.runs, untrained, bases=bases, **known)
        results["untrained"] = untrained
        results["precision"] = self.folder.known.precision or None
        results["failed"] = sorted(self.failed.values())
        results["provenance"] = surroundings() | {
            "executor": self.options.executor,
            "runs_at_a_time": self.options.workers,
            "seconds_of_runs": round(sum(outcome.seconds for outcome in self.done.values()), 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(self.folder.path / "results.json", results)
        self._written = time.monotonic()
        return results

    def _measure(self, jobs: Sequence[Job]) -> list[Outcome]:
        self._run_jobs("probes", jobs)
        outcomes = []
        for job, outcome in self._ended(jobs):
            if outcome is None or outcome.status != "done":
                reason = self.failed.get(job.key, "it diverged")
                raise UserError(
                    f"The budget cannot be matched: the probe of {job.method} on {job.task} gave nothing ({reason})."
                )
            outcomes.append(outcome)
        return outcomes


def _in_turns(groups: Iterable[list[Job]]) -> list[Job]:
    """First run of every group, then the second ...: a study that is stopped early has complete pairs."""
    return [job for turn in itertools.zip_longest(*groups) for job in turn if job is not None]
