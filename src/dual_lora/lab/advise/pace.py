"""The time that an advice's runs take, and how many of them fit into the user's minutes.

    seconds of a run = start + steps · step + records · record

A few measured steps and evaluated records of each method give the three numbers; before them, `estimate`'s model of
time does.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dual_lora.lab.advise.paired import EXTEND, TUNING_SEEDS, Length
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.device import crowded_hint
from dual_lora.lab.run.record import read_metrics
from dual_lora.lab.study import metrics
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.budget import planned_steps
from dual_lora.lab.study.cell import Cell, base_jobs
from dual_lora.lab.study.forecast import START_SECONDS, Speed, run_seconds
from dual_lora.lab.study.job import Job, Outcome

TRIALS = (3 + EXTEND) * TUNING_SEEDS
LOOKS = (5, 8, 12, 20)  # seeds at which an answer is given
# The level of each, so that all four together err in 5 % (docs/explanation/calibration.md#repeated-tests-by-advise).
LOOK_LEVEL = 0.015
LEAST_SHARE, LEAST_STEPS = 0.05, 20  # of the recipe's steps: fewer say nothing about it


class Pace(NamedTuple):
    """Seconds that a method's runs take: each one's start, a step, and an evaluated record."""

    start: float
    step: float
    record: float

    def run(self, steps: float, records: int) -> float:
        """Return the seconds of a whole run."""
        return self.start + steps * self.step + records * self.record


class Work(NamedTuple):
    """The work of an advice: the paces of its methods, the numbers of records that decide, and the recipe's own
    steps."""

    paces: tuple[Pace, ...]
    validation: int
    test: int
    steps: int
    bases: int = 0  # runs of the untrained model

    def seconds(self, length: Length) -> float:
        """Return the seconds of all runs together."""
        one = sum(
            TRIALS * pace.run(length.steps, self.validation) + length.seeds * pace.run(length.steps, self.test)
            for pace in self.paces
        )
        return one + self.bases * self.paces[0].run(0, self.test)

    @property
    def least(self) -> Length:
        """The shortest study that says anything."""
        return Length(LOOKS[0], min(self.steps, max(LEAST_STEPS, math.ceil(LEAST_SHARE * self.steps))))

    def fitting(self, seconds: float) -> Length | None:
        """The best study that fits: the recipe's own steps with the most seeds of `LOOKS` that there is time for; else
        the fewest seeds and fewer steps. None where nothing fits.
        """
        for seeds in reversed(LOOKS):
            if self.seconds(whole := Length(seeds, self.steps)) <= seconds:
                return whole
        start = self.seconds(Length(LOOKS[0], 0))
        steps = math.floor((seconds - start) / (self.seconds(Length(LOOKS[0], 1)) - start))
        return Length(LOOKS[0], min(steps, self.steps)) if steps >= self.least.steps else None


def work_of(cells: Sequence[Cell], paces: Sequence[Pace]) -> Work:
    """The work of these cells. cells: of a study with the recipe's own steps."""
    recipe = cells[0].recipe
    validation, test = (len(load_split(recipe.data, split)) for split in ("validation", "test"))
    return Work(tuple(paces), validation, test, planned_steps(recipe), len(base_jobs(cells)))


def estimated_paces(cells: Sequence[Cell], speed: Speed) -> list[Pace]:
    """The paces by arithmetic."""
    paces = []
    for cell in cells:
        training, use = run_seconds(cell, speed)
        records = len(load_split(cell.recipe.data, "test"))
        paces.append(Pace(START_SECONDS, training / planned_steps(cell.recipe), (use - START_SECONDS) / records))
    return paces


def measured_paces(ended: Sequence[tuple[Job, Outcome]], runs: Path) -> list[Pace]:
    """The paces by `pace_job`s that have ended. What the first steps of a process warm up is no step's time."""
    paces = []
    for job, outcome in ended:
        if outcome.training is None or outcome.training.seconds is None:
            raise UserError(f"The first steps of {job.method} came to nothing: the loss was not finite.")
        training, evaluation = outcome.training.seconds, outcome.evaluation_seconds or 0.0
        logged = [
            line
            for line in read_metrics(RunFolder(runs / job.key).metrics)
            if "loss" in line and line.get("seconds") is not None
        ]
        first, last = (logged[0], logged[-1]) if logged else ({}, {})
        if last.get("step", 0) > first.get("step", 0):
            step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
        else:
            step = training / max(1, outcome.training.steps)
        records = len(load_split(job.recipe.data, "validation"))
        found = Pace(outcome.seconds - training - evaluation, max(step, 1e-6), evaluation / records)
        if not all(map(math.isfinite, found)) or found.start < -1 or found.record < 0:
            raise UserError(
                f"{runs / job.key}.json has impossible times for the first steps of {job.method}: remove that file."
            )
        paces.append(found)
    start = min(pace.start for pace in paces)  # the first run of a process imports as well
    return [pace._replace(start=start) for pace in paces]


def too_few_minutes(source: object, minutes: float, work: Work, spent: float, basis: str) -> UserError:
    """Return the error for minutes that no study fits into. spent: seconds that measuring took."""
    least = work.least
    needed = math.ceil((work.seconds(least) + spent) / 60 + 0.05)
    steps, record = [f"{pace.step:.2g} s" for pace in work.paces], max(pace.record for pace in work.paces)
    return UserError(
        f"{minutes:g} minutes are too few for {source} here: three methods, each with {TRIALS} trials and "
        f"{least.seeds} seeds of {least.steps} steps, take about {needed} min (a step {', '.join(steps)}; the "
        f"{work.test} test records {work.test * record:.0f} s a run; by {basis}). Give --minutes {needed}, or fewer "
        f"test records (data.test_limit in the recipe).{crowded_hint()}"
    )


# What runs usually vary by: the deviation of a difference over seeds, and over single test records (three quarters of
# the published comparisons had less). By metric; accuracy's where a metric is not here.
USUAL = {"accuracy": (0.008, 0.11), "choice": (0.025, 0.2), "matthews": (0.073, 0.42), "loss": (0.012, 0.05)}


def settling_length(work: Work, metric: str, margin: float) -> Length | None:
    """The study that would usually rule a difference of the margin out, if there is none; None if no look would."""
    seed, item = USUAL.get(metric, USUAL["accuracy"])
    reach = metrics.usual_reach(metric)
    for seeds in LOOKS:
        parts = seed / math.sqrt(seeds), item / math.sqrt(work.test)
        usual = stats.Spread(0.0, math.hypot(*parts), parts[0], seeds, work.test, reach)
        if _detects_margin(stats.against_margin(usual, margin), margin, LOOK_LEVEL / (len(work.paces) - 1), 0.8):
            return Length(seeds, work.steps)
    return None


def minutes_of(work: Work, length: Length) -> int:
    """Return the minutes to ask for, in fives."""
    return 5 * math.ceil(work.seconds(length) / 300 + 0.1)


def needed_seeds(spread: stats.Spread, margin: float, level: float, power: float) -> int | None:
    """The look at which a difference of the margin would be seen; None where even the last is too early.

    The seeds' part of the error falls with their root, the items' part stays.
    """
    more = (with_seeds(spread, seeds) for seeds in LOOKS)
    return next((s.seeds for s in more if _detects_margin(s, margin, level, power)), None)


def needed_records(spread: stats.Spread, margin: float, level: float, power: float) -> int | None:
    """Test records with which the most seeds would show a difference of the margin; None where the seeds alone vary
    too much. The items' part of the error falls with their root, the seeds' part stays.
    """
    seeds = with_seeds(spread, LOOKS[-1])
    for records in (float(f"{spread.items * 1.1**k:.2g}") for k in range(80)):
        error = math.hypot(seeds.seed_error, spread.item_error * math.sqrt(spread.items / records))
        if _detects_margin(replace(seeds, error=error, items=int(records)), margin, level, power):
            return int(records)
    return None


def _detects_margin(spread: stats.Spread, margin: float, level: float, power: float) -> bool:
    """Whether a study with this noise would see a difference of the margin."""
    visible = stats.smallest_visible(spread, level, power)
    return visible is not None and visible <= margin


def with_seeds(spread: stats.Spread, seeds: int) -> stats.Spread:
    """Return the spread that another number of seeds would have."""
    seed_error = spread.seed_error * math.sqrt(spread.seeds / seeds)
    return replace(spread, error=math.hypot(seed_error, spread.item_error), seed_error=seed_error, seeds=seeds)
