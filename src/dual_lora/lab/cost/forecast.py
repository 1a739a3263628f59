"""How long will a study take? By arithmetic and a second's calibration, or by its own runs as soon as there are any."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

EFFICIENCY = 0.4  # share of a plain product's speed that a small model's training reaches
START_SECONDS = 8.0  # imports, loading, tokenizing
BYTES_A_SECOND = 1e10  # of weights read while decoding, on a CPU core
CHARACTERS_A_TOKEN = 4.0
# Products of the size of the weights in one training step, per token: forward, gradient of x, gradient of W.
PRODUCTS = {"full": 6, "dual_lora": 6, "hira": 6, "loha": 6, "lokr": 6, "dora": 5}


@dataclass(frozen=True)
class Load:
    """What one run of a cell computes."""

    steps: int
    tokens_a_step: float
    flops_a_step: float
    evaluation_flops: float
    decoded_bytes: float


def measured_speed() -> float:
    """Floating point operations a second of a plain product on this machine.

    On a CPU in processor time, one thread times their number: what else runs at this moment does not count (beside a
    study the clock on the wall gave a hundredth of the speed).
    """
    import torch

    card = torch.cuda.is_available()
    device, clock = ("cuda", time.perf_counter) if card else ("cpu", time.process_time)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        a, b = torch.randn(512, 1024, device=device), torch.randn(1024, 1024, device=device)
        (a @ b).sum().item()
        rounds, start = 0, clock()
        while (passed := clock() - start) < 0.3:
            (a @ b).sum().item()
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    return rounds * 2 * 512 * 1024 * 1024 / passed * (1 if card else threads)


def load_of(cell: Cell) -> Load:
    """The work of one run, by the lengths of its first records."""
    from dual_lora.lab.data.examples import load_split

    recipe = cell.recipe
    rows, tested = load_split(recipe.data, "train"), load_split(recipe.data, "test")

    def tokens(example: Any) -> float:
        text = "".join(example.text) or "".join(str(m["content"]) for m in example.messages)
        return min(recipe.data.max_length, len(text) / CHARACTERS_A_TOKEN + 8)

    mean = statistics.fmean(tokens(e) for e in rows[:200])
    part = recipe.train
    a_step = mean * part.batch_size * part.accumulate
    weights = cell.size.multiplied
    products = PRODUCTS.get(str(recipe.method["name"]), 4)
    passes = max(1, len(tested[0].choices)) if "choice" in recipe.evaluate.tasks[:1] else 1
    read = statistics.fmean(tokens(e) for e in tested[:200]) * len(tested) * passes
    decodes = cell.metric in ("exact_match", "bleu")
    batches = len(tested) / recipe.evaluate.batch_size
    return Load(
        planned_steps(recipe),
        a_step,
        products * weights * a_step + 6 * cell.size.trainable * a_step,
        2 * weights * read,
        4.0 * weights * recipe.evaluate.max_new_tokens * batches if decodes else 0.0,
    )


def seconds_of(load: Load, kind: str, speed: float) -> float:
    """Seconds of one run of this kind."""
    rate = speed * EFFICIENCY
    training = 0.0 if kind == "base" else load.steps * load.flops_a_step / rate
    return START_SECONDS + training + load.evaluation_flops / rate + load.decoded_bytes / BYTES_A_SECOND


class Clock:
    """Expected seconds of runs: the mean of like runs that are finished, else the estimate."""

    def __init__(self, estimates: Mapping[tuple[str, str, str, str], float]):
        self.estimates = dict(estimates)
        self._seen: dict[tuple[str, ...], list[float]] = {}

    def learn(self, job: Job, seconds: float) -> None:
        """A run took so long."""
        for key in _likes(job):
            self._seen.setdefault(key, []).append(seconds)

    def expect(self, job: Job) -> float | None:
        """Seconds that the job will take, by the most similar runs known."""
        for key in _likes(job):
            if key in self._seen:
                return statistics.fmean(self._seen[key])
        return self.estimates.get((job.kind, *job.place, job.method))

    def left(self, jobs: Iterable[Job], workers: int) -> float | None:
        """Seconds until all jobs are done; None while nothing is known about one of them."""
        expected = [self.expect(job) for job in jobs]
        if any(e is None for e in expected):
            return None
        return sum(e for e in expected if e is not None) / max(1, min(workers, len(expected) or 1))


def _likes(job: Job) -> list[tuple[str, ...]]:
    place = (job.kind, *job.place)
    return [(*place, job.method), place]


def estimates(cells: Iterable[Cell], speed: float) -> dict[tuple[str, str, str, str], float]:
    """Seconds of every kind of run of these cells, by arithmetic."""
    loads = [(cell, load_of(cell)) for cell in cells]
    return {
        (kind, cell.model, cell.task, method): seconds_of(load, kind, speed)
        for cell, load in loads
        for kind, method in (("trial", cell.method), ("final", cell.method), ("base", UNTRAINED))
    }


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
    source: str | Path,
    out: str | Path | None = None,
    *,
    runs: str | Path | None = None,
    executor: str = "serial",
    workers: int | None = None,
) -> Forecast:
    """`--dry-run`: the study's runs, sizes and an estimate of its time. Everything is checked, nothing is run."""
    study = read_study(source)
    folder = StudyFolder(Path(out) if out is not None else Path("studies") / study.name).read()
    study, _ = settled_study(study, folder)
    side_by_side = runs_side_by_side(executor, workers)
    cells = lay_out(study)
    place = folder.runs(runs)
    _match_as_far_as_probed(study, cells, place)
    speed = measured_speed()
    clock = Clock(estimates(cells, speed))
    rows, left, done = [], [], 0
    jobs: dict[tuple[str, str, str], list[Job]] = {}
    for cell in cells:
        trials = trial_jobs(study, cell, lambda job: read_outcome(place, job.key))
        settings = choose([(job, read_outcome(place, job.key)) for job in trials])
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
        outcome = read_outcome(place, job.key)
        if outcome:
            done += 1
            clock.learn(job, outcome.seconds)
        else:
            left.append(job)
    for row, cell in zip(rows, cells, strict=True):
        expected = [clock.expect(job) or 0.0 for job in jobs[cell.at]]
        row["seconds"] = sum(expected)
    return Forecast(
        study,
        rows,
        done + len(left),
        done,
        clock.left(left, side_by_side) or 0.0,
        side_by_side,
        sum(4 * cell.size.trainable * len(study.seeds) for cell in cells if cell.entry.name != "full"),
        "finished runs of this study"
        if done
        else f"arithmetic at {speed / 1e9:.0f} GFLOP/s measured (within a factor of 2)",
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
