"""How long will a study take? By its own runs as soon as there are any, else by `cost/calibrate`'s model of time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dual_lora.lab.cost.calibrate import Cost, cost_of, known_rates, rough_cost
from dual_lora.lab.study.cell import PROBE_STEPS, UNTRAINED, Cell, base_jobs, final_jobs, trial_jobs
from dual_lora.lab.study.execute import runs_side_by_side
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.job import Job, Outcome, read_outcome
from dual_lora.lab.study.plan import lay_out, planned_steps
from dual_lora.lab.study.precision import settled_study
from dual_lora.lab.study.probes import match_by_probes
from dual_lora.lab.study.read import read_study
from dual_lora.lab.study.search import choose
from dual_lora.lab.study.study import Study

START_SECONDS = 8.0  # imports, loading, tokenizing
BYTES_A_SECOND = 1e10  # of weights read while decoding, on a CPU core
CHARACTERS_A_TOKEN = 4.0
# Products of the size of the weights in one training step, per token: forward, gradient of x, gradient of W.
PRODUCTS = {"full": 6, "dual_lora": 6, "hira": 6, "loha": 6, "lokr": 6, "dora": 5}


class Speed:
    """What this machine's calibration says of a cell's steps; without one, what plain products let guess."""

    def __init__(self) -> None:
        self.known = known_rates()

    @cached_property
    def rough(self) -> Cost:
        return rough_cost()

    @property
    def basis(self) -> str:
        """What estimates follow from, in words."""
        if self.known:
            return f"arithmetic and this machine's calibration of {self.known.get('date')}"
        rate = self.rough.rate / 1e9
        return f"arithmetic at {rate:.0f} GFLOP/s of training, guessed by plain products (within a factor of 2)"

    def of(self, cell: Cell) -> Cost:
        """A method that the calibration has not measured counts like LoRA."""
        recipe = cell.recipe
        dtype = "float32" if recipe.model.dtype == "float32" and recipe.train.autocast == "none" else "bfloat16"
        names = (str(recipe.method["name"]), "lora") if self.known else ()
        found = (cost_of(self.known or {}, name, dtype, cell.size.width) for name in names)
        return next((cost for cost in found if cost is not None), None) or self.rough


def estimates(cells: Iterable[Cell], speed: Speed) -> dict[tuple[str, str, str, str], float]:
    """Seconds of every kind of run of these cells, by arithmetic."""
    found: dict[tuple[str, str, str, str], float] = {}
    for cell in cells:
        training, use = run_seconds(cell, speed.of(cell))
        found |= {(kind, *cell.scenario, cell.method): training + use for kind in ("trial", "final")}
        found["base", *cell.scenario, UNTRAINED] = use
    return found


def run_seconds(cell: Cell, cost: Cost) -> tuple[float, float]:
    """Seconds of training, and of everything else, of one run; by the lengths of its first records."""
    from dual_lora.lab.data.examples import load_split

    recipe, size = cell.recipe, cell.size
    rows, tested = load_split(recipe.data, "train"), load_split(recipe.data, "test")

    def tokens(example: Any) -> float:
        text = "".join(example.text) or "".join(str(m["content"]) for m in example.messages)
        return min(recipe.data.max_length, len(text) / CHARACTERS_A_TOKEN + 8)

    a_pass = statistics.fmean(tokens(e) for e in rows[:200]) * recipe.train.batch_size
    products = PRODUCTS.get(str(recipe.method["name"]), 4)
    step = cost.seconds((products * size.multiplied + 6 * size.trainable) * a_pass, size.multiplied + size.trainable)
    choices = max(1, len(tested[0].choices)) if "choice" in recipe.evaluate.tasks[:1] else 1
    read = statistics.fmean(tokens(e) for e in tested[:200]) * len(tested) * choices
    use = START_SECONDS + cost.seconds(2 * size.multiplied * read, 0)
    if cell.metric in ("exact_match", "bleu"):
        batches = len(tested) / recipe.evaluate.batch_size
        use += 4.0 * size.multiplied * recipe.evaluate.max_new_tokens * batches / BYTES_A_SECOND
    return planned_steps(recipe) * recipe.train.accumulate * step, use


class RunTimes:
    """Expected seconds of runs: the mean of like runs that have ended, else the estimate."""

    def __init__(self, estimates: dict[tuple[str, str, str, str], float] | None = None):
        self.estimates = estimates or {}
        self._seen: dict[tuple[str, ...], list[float]] = {}

    def learn(self, job: Job, seconds: float) -> None:
        """A run took so long."""
        for key in _likes(job):
            self._seen.setdefault(key, []).append(seconds)

    def expect(self, job: Job) -> float | None:
        """Seconds that the job will take, by the most similar runs known."""
        seen = next((self._seen[key] for key in _likes(job) if key in self._seen), None)
        return statistics.fmean(seen) if seen else self.estimates.get((job.kind, *job.scenario, job.method))

    def left(self, jobs: Iterable[Job], workers: int) -> float | None:
        """Seconds until all jobs are done; None while nothing is known about one of them."""
        expected = [self.expect(job) for job in jobs]
        known = [e for e in expected if e is not None]
        return sum(known) / max(1, min(workers, len(known))) if len(known) == len(expected) else None


def _likes(job: Job) -> list[tuple[str, ...]]:
    """What runs that take as long have in common, the most alike first."""
    return [(job.kind, *job.scenario, job.method), (job.kind, *job.scenario)]


@dataclass(frozen=True)
class Forecast:
    """What a study would do. rows: one a cell; seconds: of everything that is left, with `workers` runs at a time."""

    study: Study
    rows: list[dict[str, Any]]
    runs: int
    done: int
    seconds: float
    workers: int
    adapter_bytes: int
    basis: str


def forecast(
    source: str | Path | Study,
    out: str | Path | None = None,
    *,
    runs: str | Path | None = None,
    executor: str = "serial",
    workers: int | None = None,
) -> Forecast:
    """`--dry-run`: the study's runs, sizes and an estimate of its time. Everything is checked, nothing is run."""
    study = source if isinstance(source, Study) else read_study(source)
    folder = StudyFolder(Path(out) if out is not None else Path("studies") / study.name).read()
    study, _ = settled_study(study, folder)
    side_by_side = runs_side_by_side(executor, workers)
    cells = lay_out(study)
    runs_folder = folder.runs(runs)
    _match_as_far_as_probed(study, cells, runs_folder)
    speed = Speed()
    times = RunTimes(estimates(cells, speed))
    rows, left, done = [], [], 0
    jobs: dict[tuple[str, str, str], list[Job]] = {}
    for cell in cells:
        trials = trial_jobs(study, cell, lambda job: read_outcome(runs_folder, job.key))
        settings = choose([(job, read_outcome(runs_folder, job.key)) for job in trials])
        jobs[cell.at] = trials + final_jobs(study, cell, settings or {})
        rows.append(
            {
                "model": cell.model,
                "task": cell.task,
                "method": cell.method,
                "rank": cell.rank,
                "trainable_parameters": cell.size.trainable,
                "mismatch": cell.mismatch,
                "notes": cell.notes,
                "steps": planned_steps(cell.recipe),
                "trials": len(trials),
                "seeds": len(study.seeds),
                "metric": cell.metric,
            }
        )
    for job in [j for group in jobs.values() for j in group] + base_jobs(cells):
        outcome = read_outcome(runs_folder, job.key)
        if outcome:
            done += 1
            times.learn(job, outcome.seconds)
        else:
            left.append(job)
    for row, cell in zip(rows, cells, strict=True):
        expected = [times.expect(job) or 0.0 for job in jobs[cell.at]]
        row["seconds"] = sum(expected)
    return Forecast(
        study,
        rows,
        done + len(left),
        done,
        times.left(left, side_by_side) or 0.0,
        side_by_side,
        sum(4 * cell.size.trainable * len(study.seeds) for cell in cells if cell.entry.name != "full"),
        "finished runs of this study" if done else speed.basis,
    )


def _match_as_far_as_probed(study: Study, cells: Sequence[Cell], runs: Path) -> None:
    """A budget in time or memory by the probes that are there; where some are not, say what they will decide."""

    class Unknown(Exception):
        pass

    def known(jobs: Sequence[Job]) -> list[Outcome]:
        outcomes = [outcome for job in jobs if (outcome := read_outcome(runs, job.key)) and outcome.status == "done"]
        if len(outcomes) < len(jobs):
            raise Unknown
        return outcomes

    what = {"time": "steps", "memory": "rank"}.get(study.budget.match)
    if what is None:
        return
    try:
        match_by_probes(study, cells, known)
    except Unknown:
        for cell in cells:
            if not cell.entry.unmatched:
                cell.notes.append(f"{what}: by a probe of {PROBE_STEPS} steps")
