"""The search before the final runs: what is tried, by the same rule for every method, and which of it is chosen."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dual_lora.lab.errors import suggest
from dual_lora.lab.recipe.schema import Section, TrainSection
from dual_lora.lab.study.job import Job, Outcome, Settings
from dual_lora.lab.study.metrics import METRICS, sign

SEARCH_SEED = 1000
MOST_RUNS = 10_000  # of one kind that a study may ask for
MOST_AXES = 100  # settings that are varied together
RATE = "train.learning_rate"


def _known(value: str) -> str:
    if value not in METRICS:
        raise ValueError(f"unknown metric {value!r}.{suggest(value, METRICS)}")
    return value


MetricName = Annotated[str, AfterValidator(_known)]


class Range(Section):
    """An interval that is searched."""

    low: float
    high: float
    scale: Literal["log", "linear"] = "log"

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.scale == "log" and self.low <= 0):
            raise ValueError(f"low {self.low} and high {self.high}: low has to be smaller, and positive on a log scale")
        return self


Axis = list[Any] | Range
Decide = Literal["mean", "worst"]


class Search(Section):
    """The same number of trials for every method, scored on validation records, never on test."""

    space: dict[str, Axis] = Field(description="Name (learning_rate, train.X or method.X): list of values, or a range.")
    trials: int | None = Field(None, ge=1, description="Trials of each method; left out: every point of the lists.")
    metric: MetricName | None = Field(None, description="Metric of the search; left out: the task's metric.")
    why: str = Field("", description="Why the search uses another metric than the task's; needed only then.")
    extend: int = Field(
        2,
        ge=0,
        description="How many learning rates to add at most, one at a time: while the smallest or largest of three or "
        "more is best, one beyond it is tried.",
    )
    holdout: int | None = Field(
        None, ge=1, description="Validation records taken out of training where a recipe has none."
    )
    train: dict[str, Any] = Field(
        default_factory=dict, description="Fields that override train in trials only, e.g. fewer steps."
    )
    seed: int = Field(SEARCH_SEED, ge=0, description="Training seed of the trials; never one of the study's seeds.")
    seeds: int = Field(1, ge=1, le=MOST_RUNS, description="Seeds of each trial, from `seed` on; their mean decides.")

    decide: Decide = Field(
        "mean", description="How a trial's score follows from its seeds: their mean, or the worst of them."
    )

    @model_validator(mode="after")
    def _enough_points(self) -> Search:
        if not self.space:
            raise ValueError("space is empty: name at least learning_rate")
        self.points()
        return self

    @property
    def count(self) -> int:
        """Trials of each method: `trials`, or every point of the lists."""
        axes = [_axis(axis) for axis in self.space.values()]
        points = math.prod(len(axis) if isinstance(axis, list) else 0 for axis in axes)
        if not self.trials and not points:
            raise ValueError("a space with a range needs trials: NUMBER")
        if (self.trials or points) > MOST_RUNS or points > 100 * MOST_RUNS:
            raise ValueError(f"{self.trials or points:,} trials of {points:,} points, expected at most {MOST_RUNS:,}")
        return self.trials or points

    def points(self, own: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The trials' settings, {dotted name: value}; `own` is a method's own space."""
        if len(own or self.space) > MOST_AXES:
            raise ValueError(f"the space has {len(own or self.space):,} settings, expected at most {MOST_AXES}")
        space = {dotted(name): _axis(axis) for name, axis in (own or self.space).items()}
        lists = {name: axis for name, axis in space.items() if isinstance(axis, list)}
        if len(lists) < len(space):
            return _spread_points(space, self.count)
        held = math.prod(map(len, lists.values()))
        if held > 100 * MOST_RUNS:
            raise ValueError(f"the space has more than {100 * MOST_RUNS:,} points, use ranges (low, high)")
        if held < self.count:
            raise ValueError(f"{self.count} trials wanted, but the space holds only {held} points")
        chosen = random.Random(0).sample(range(held), self.count)
        return [_point(lists, number) for number in sorted(chosen)]


def _axis(axis: Any) -> Axis:
    if isinstance(axis, Range):
        return axis
    if isinstance(axis, dict):
        return Range.model_validate(axis)
    if not isinstance(axis, list) or not axis:
        raise ValueError(f"{axis!r} is no search axis: expected a list of values or {{low: , high: }}")
    return axis


def _point(lists: dict[str, list[Any]], number: int) -> dict[str, Any]:
    """The point of this number in the grid of all values, the last name's changing first; the others are not made."""
    found: dict[str, Any] = {}
    for name, values in reversed(lists.items()):
        number, at = divmod(number, len(values))
        found[name] = values[at]
    return {name: found[name] for name in lists}


def _spread_points(space: dict[str, Axis], wanted: int) -> list[dict[str, Any]]:
    """`wanted` points that fill the space evenly, the same at every call and for every method."""
    import numpy as np
    from scipy.stats import qmc

    if len(space) == 1:
        unit = np.linspace(0, 1, wanted)[:, None] if wanted > 1 else np.array([[0.5]])
    else:
        unit = qmc.Halton(len(space), rng=0).random(wanted)
    return [{name: _value_at(axis, u) for (name, axis), u in zip(space.items(), row, strict=True)} for row in unit]


def _value_at(axis: Axis, u: float) -> Any:
    if isinstance(axis, list):
        return axis[min(int(u * len(axis)), len(axis) - 1)]
    if axis.scale == "linear":
        return float(f"{axis.low + u * (axis.high - axis.low):.4g}")
    return float(f"{axis.low * (axis.high / axis.low) ** u:.4g}")


def choose(trials: Sequence[tuple[Job, Outcome | None]], decide: Decide = "mean") -> Settings | None:
    """The settings of the best trial ({} without a search), by the mean over the search's seeds or the worst of them.

    None when a trial is missing or failed (the search was not equal to the others'), and when all of them diverged.
    Settings with which one seed diverged are not chosen.
    """
    if not trials:
        return {}
    if any(outcome is None for _, outcome in trials):
        return None
    better = sign(trials[0][0].metric)
    turned = [(job.settings, None if o.score is None else better * o.score) for job, o in trials if o]
    scored = mean_scores(turned, decide)
    return max(scored, key=lambda pair: pair[1])[0] if scored else None


def mean_scores(
    trials: Iterable[tuple[Settings, float | None]], decide: Decide = "mean"
) -> list[tuple[Settings, float]]:
    """Settings that were tried, with the mean score over their seeds (worst: the lowest); without those with which one
    seed diverged."""
    found = []
    for settings, group in itertools.groupby(trials, key=lambda trial: trial[0]):  # the seeds of one follow each other
        scores = [score for _, score in group]
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            found.append((settings, min(known) if decide == "worst" else sum(known) / len(known)))
    return found


def next_beyond_grid(best: Settings, tried: Sequence[Settings]) -> Settings | None:
    """The best settings with the next learning rate, where theirs is the first or the last of three or more tried.

    The step is that of the grid's end: after 3e-4 and 1e-3 comes 3.3e-3. None where the best rate lies inside.
    """
    rates = sorted({float(point[RATE]) for point in tried if RATE in point})
    if len(rates) < 3 or (rate := float(best[RATE])) not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if rate == rates[0] else rates[-2]
    return best | {RATE: float(f"{rate * rate / neighbour:.2g}")}


def dotted(name: str) -> str:
    """Turn `learning_rate` into `train.learning_rate`. Raises ValueError for a name outside train and method."""
    full = f"train.{name}" if name in TrainSection.model_fields else name
    part, _, field = full.partition(".")
    if part == "method" and field:
        return full
    if part != "train" or field not in TrainSection.model_fields:
        hint = suggest(field or part, TrainSection.model_fields)
        raise ValueError(f"{name!r} can not be varied: expected train.FIELD or method.FIELD.{hint}")
    return full
