"""How long will a study take? By its own runs as soon as there are any, else by `cost/calibrate`'s model of time."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dual_lora.lab.cost.calibrate import (
    DECODE_SECONDS,
    Card,
    Cost,
    card,
    cost_of,
    flops_a_weight,
    known_rates,
    rough_cost,
)
from dual_lora.lab.cost.memory import memory_of
from dual_lora.lab.cost.options import from_recipe
from dual_lora.lab.cost.simulate import simulate
from dual_lora.lab.data.encode import ALPACA, LLM_ADAPTERS
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.recipe.schema import DataSection, Recipe
from dual_lora.lab.study.budget import match_by_probes, planned_steps
from dual_lora.lab.study.cell import PROBE_STEPS, UNTRAINED, Cell, base_jobs, final_jobs, rank_field, trial_jobs
from dual_lora.lab.study.execute import runs_side_by_side
from dual_lora.lab.study.folder import StudyFolder, study_folder
from dual_lora.lab.study.job import Job, Outcome, outcomes_here
from dual_lora.lab.study.plan import lay_out, settled_plan
from dual_lora.lab.study.read import read_study
from dual_lora.lab.study.search import choose
from dual_lora.lab.study.study import Study

START_SECONDS = 8.0  # imports, loading, tokenizing
BYTES_A_SECOND = 1e10  # of weights read while decoding, on a CPU core
CHARACTERS_A_TOKEN = 4.0
RECORD_SECONDS = 2e-4  # to tokenize a training record
SOME = 200  # records whose lengths are looked at
TEMPLATES = {"alpaca": ALPACA, "llm-adapters": " ".join(LLM_ADAPTERS.split())}  # blanks in a row are one token


class Records(NamedTuple):
    """A set of records: how many, the tokens of one, by the lengths of some, and the choices of the first."""

    number: int
    tokens: float
    choices: int


class Speed:
    """The speed of a cell's steps by this machine's calibration; without one, a guess from plain products.

    card: a GPU that is taken by its published figures instead.
    """

    def __init__(self, card: Card | None = None) -> None:
        self.card, self.known = card, None if card else known_rates()
        self._records: dict[tuple[str, str], Records] = {}

    @cached_property
    def rough(self) -> Cost:
        return self.card.cost if self.card else rough_cost()

    @property
    def basis(self) -> str:
        """Say in words what the estimates are based on."""
        if self.card:
            return self.card.basis
        if self.known:
            return f"arithmetic and this machine's calibration of {self.known.get('date')}"
        rate = self.rough.rate / 1e9
        guess = "which is a guess from plain matrix products and may be wrong by a factor of 2"
        return f"arithmetic at {rate:.0f} GFLOP/s of training, {guess}"

    def of(self, cell: Cell) -> Cost:
        """A method that the calibration has not measured counts like LoRA."""
        recipe = cell.recipe
        dtype = "float32" if recipe.model.dtype == "float32" and recipe.train.autocast == "none" else "bfloat16"
        names = (str(recipe.method["name"]), "lora") if self.known else ()
        found = (cost_of(self.known or {}, name, dtype, cell.size.width) for name in names)
        return next((cost for cost in found if cost is not None), None) or self.rough

    def records(self, data: DataSection, split: str) -> Records:
        """Return the counts and lengths of a set of records, which is read once."""
        asked = data.model_dump_json(), split
        if asked not in self._records:
            self._records[asked] = _records(data, split)
        return self._records[asked]

    def token(self, cell: Cell) -> float:
        """Seconds of one more token of a batch of answers."""
        return DECODE_SECONDS if self.card else 4.0 * cell.size.multiplied / BYTES_A_SECOND


def _records(data: DataSection, split: str) -> Records:
    examples = load_split(data, split)
    frame = TEMPLATES.get(data.template, "")
    some = examples[:: max(1, len(examples) // SOME)]
    texts = ("".join(e.text) or frame + "".join(str(m["content"]) for m in e.messages) for e in some)
    tokens = (min(data.max_length, len(text) / CHARACTERS_A_TOKEN + 8) for text in texts)
    return Records(len(examples), statistics.fmean(tokens), len(examples[0].choices))


def estimates(study: Study, cells: Iterable[Cell], speed: Speed) -> dict[tuple[str, str, str, str], float]:
    """Seconds of every kind of run of these cells, by arithmetic."""
    found: dict[tuple[str, str, str, str], float] = {}
    for cell in cells:
        training, use = run_seconds(cell, speed)
        found["final", *cell.scenario, cell.method] = training + use
        found["base", *cell.scenario, UNTRAINED] = use
        for job in trial_jobs(study, cell)[:1]:
            found["trial", *cell.scenario, cell.method] = sum(run_seconds(cell, speed, job.recipe, "validation"))
    return found


def run_seconds(cell: Cell, speed: Speed, recipe: Recipe | None = None, split: str = "test") -> tuple[float, float]:
    """Seconds of training, and of everything else, of one run; by the lengths of some of its records.

    recipe: of a run that differs from the cell's; split: the records that judge it.
    """
    recipe, size, cost = recipe or cell.recipe, cell.size, speed.of(cell)
    rows, judged = speed.records(recipe.data, "train"), speed.records(recipe.data, split)
    a_pass = rows.tokens * recipe.train.batch_size
    method = {k: v for k, v in recipe.method.items() if k in ("name", rank_field(str(recipe.method["name"])))}
    a_weight = flops_a_weight(method, size.width, a_pass, recipe.train.gradient_checkpointing)
    step = cost.seconds(a_weight * size.multiplied * a_pass, size.multiplied + size.trainable)
    choices = max(1, judged.choices) if "choice" in recipe.evaluate.tasks[:1] else 1
    read = judged.tokens * judged.number * choices
    use = START_SECONDS + RECORD_SECONDS * rows.number + cost.seconds(2 * size.multiplied * read, 0)
    if cell.metric in ("exact_match", "bleu"):
        use += (
            speed.token(cell) * recipe.evaluate.max_new_tokens * math.ceil(judged.number / recipe.evaluate.batch_size)
        )
    return planned_steps(recipe) * recipe.train.accumulate * step, use


class RunTimes:
    """Expected seconds of runs: the mean of like runs that have ended, else the estimate times the others' error."""

    def __init__(self, estimates: dict[tuple[str, str, str, str], float] | None = None):
        self.estimates = estimates or {}
        self._seconds_by_key: dict[tuple[str, ...], list[float]] = {}
        self._off: list[float] = []  # seconds that a run took, over its estimate

    def learn(self, job: Job, seconds: float) -> None:
        """Record the duration of a run."""
        for key in _similarity_keys(job):
            self._seconds_by_key.setdefault(key, []).append(seconds)
        if estimate := self._estimate(job):
            self._off.append(seconds / estimate)

    def expect(self, job: Job) -> float | None:
        """Seconds that the job will take, by the most similar runs known."""
        if seen := next(
            (self._seconds_by_key[key] for key in _similarity_keys(job) if key in self._seconds_by_key), None
        ):
            return statistics.fmean(seen)
        estimate = self._estimate(job)
        return estimate * statistics.median(self._off) if estimate and self._off else estimate

    def _estimate(self, job: Job) -> float | None:
        return self.estimates.get((job.kind, *job.scenario, job.method))

    def left(self, jobs: Iterable[Job], workers: int) -> float | None:
        """Seconds until all jobs are done; None while nothing is known about one of them."""
        expected = [self.expect(job) for job in jobs]
        known = [e for e in expected if e is not None]
        return sum(known) / max(1, min(workers, len(known))) if len(known) == len(expected) else None


def _similarity_keys(job: Job) -> list[tuple[str, ...]]:
    """Return the keys by which runs of similar duration are grouped, the most specific first."""
    return [(job.kind, *job.scenario, job.method), (job.kind, *job.scenario)]


@dataclass(frozen=True)
class Forecast:
    """The forecast of a study. rows: one a cell; seconds: of everything that is left, with `workers` runs at a time."""

    study: Study
    rows: list[dict[str, Any]]
    runs: int
    done: int
    seconds: float
    workers: int
    adapter_bytes: int
    basis: str
    memory: float | None = None  # of the card, where one was named
    said: str = ""  # what else is to be said, of an advice


def forecast(
    source: str | Path | Study,
    out: str | Path | None = None,
    *,
    runs: str | Path | None = None,
    executor: str = "serial",
    workers: int | None = None,
    on: str | None = None,
) -> Forecast:
    """`--dry-run`: the study's runs, sizes and an estimate of its time. Everything is checked, nothing is run.

    on: a card of `calibrate`, whose published figures are taken instead of this machine's speed.
    """
    study = read_study(source)
    folder = StudyFolder(study_folder(study.name, out)).read()
    plan = settled_plan(study, folder, "bf16" if on else None)
    study = plan.study
    side_by_side = runs_side_by_side(executor, workers)
    cells = lay_out(plan)
    runs_folder = folder.runs(runs)
    _match_as_far_as_probed(study, cells, runs_folder)
    speed = Speed(card(on) if on else None)
    times = RunTimes(estimates(study, cells, speed))
    outcome = outcomes_here(runs_folder)
    trials = [trial_jobs(study, cell, outcome) for cell in cells]
    finals = [
        final_jobs(
            study,
            cell,
            choose([(job, outcome(job)) for job in tried], study.search.decide if study.search else "mean") or {},
        )
        for cell, tried in zip(cells, trials, strict=True)
    ]
    left, done = [], 0
    for job in itertools.chain(*trials, *finals, base_jobs(cells)):
        if ended := outcome(job):
            done += 1
            if speed.card is None:  # a card's times do not follow from this machine's
                times.learn(job, ended.seconds)
        else:
            left.append(job)
    rows = [
        _row(cell, len(tried), len(last), speed, sum(times.expect(job) or 0.0 for job in [*tried, *last]))
        for cell, tried, last in zip(cells, trials, finals, strict=True)
    ]
    return Forecast(
        study,
        rows,
        done + len(left),
        done,
        times.left(left, side_by_side) or 0.0,
        side_by_side,
        sum(4 * cell.size.trainable * len(study.seeds) for cell in cells if cell.entry.name != "full"),
        "finished runs of this study" if done and speed.card is None else speed.basis,
        speed.card.memory if speed.card else None,
    )


def _row(cell: Cell, trials: int, seeds: int, speed: Speed, seconds: float) -> dict[str, Any]:
    return {
        "model": cell.model,
        "task": cell.task,
        "method": cell.method,
        "rank": cell.rank,
        "trainable_parameters": cell.size.trainable,
        "mismatch": cell.mismatch,
        "notes": cell.notes,
        "steps": planned_steps(cell.recipe),
        "trials": trials,
        "seeds": seeds,
        "metric": cell.metric,
        "peak_memory": _peak_memory(cell) if speed.card else None,
        "seconds": seconds,
    }


def _peak_memory(cell: Cell) -> float:
    """Bytes of a GPU at the fullest moment of a training step, every row at full length."""
    options = from_recipe(cell.recipe, on="gpu", **({"classes": cell.classes} if cell.classes else {}))
    return memory_of(options, simulate(options)).peak


def _match_as_far_as_probed(study: Study, cells: Sequence[Cell], runs: Path) -> None:
    """A budget in time or memory by the probes that are there; where some are not, say what they will decide."""

    class Unknown(Exception):
        pass

    outcome_of = outcomes_here(runs)

    def known(jobs: Sequence[Job]) -> list[Outcome]:
        outcomes = [outcome for job in jobs if (outcome := outcome_of(job)) and outcome.status == "done"]
        if len(outcomes) < len(jobs):
            raise Unknown
        return outcomes

    try:
        match_by_probes(study, cells, known)
    except Unknown:
        what = "steps" if study.budget.match == "time" else "rank"
        for cell in cells:
            if not cell.entry.unmatched:
                cell.notes.append(f"{what}: by a probe of {PROBE_STEPS} steps")
