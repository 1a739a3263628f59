"""Several tasks at once: how often a method is better, how its scores are distributed, which ranks differ.

improvement   chance that a run of one method beats a run of the other on a task drawn at random, with its interval
profile       share of runs above each score, with its interval
ranks         mean rank of each method over tasks, and from which difference two of them are told apart

Scores are tables {task: {method: [S]}}, more is better. Intervals are by a stratified bootstrap: seeds are drawn again
within each task, as arXiv 2108.13264 (rliable) has it. They say nothing about other tasks; the pooled effect does
(`pooled.across`).

Sources: Agarwal et al. 2021; Demšar 2006 (Friedman's test, Nemenyi's critical difference).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dual_lora.lab.errors import UserError

Scores = Mapping[str, Mapping[str, ArrayLike]]
DRAWS = 2000


class Interval(NamedTuple):
    """A figure with its interval."""

    value: float
    low: float
    high: float


class Ranks(NamedTuple):
    """mean: of each method's rank over tasks, 1 is best. p: of Friedman's test that no two differ. critical: from which
    difference of mean ranks two are told apart (Nemenyi). groups: methods that are not, longest groups only."""

    mean: dict[str, float]
    p: float
    critical: float
    groups: list[list[str]]


def improvement(scores: Scores, method: str, reference: str, confidence: float = 0.95, seed: int = 0) -> Interval:
    """P(a run of the method beats one of the reference), the mean over tasks; ties count half."""
    tasks = [_scores_of_both(task, own, method, reference) for task, own in scores.items()]
    better = [0.5 + 0.5 * np.sign(a[:, None] - b) for a, b in tasks]  # of each pair of runs
    random = np.random.default_rng(seed)
    # How often each run is drawn: of its pairs no draw has to be made.
    each = [
        ((_shares(len(a), random) @ won) * _shares(len(b), random)).sum(1)
        for (a, b), won in zip(tasks, better, strict=True)
    ]
    value = float(np.mean([won.mean() for won in better]))
    return Interval(value, *_percentile_interval(np.asarray(np.mean(each, axis=0)), confidence))


def profile(
    scores: Scores, method: str, at: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> list[Interval]:
    """The share of runs with a score above each of `at`, the mean over tasks. Give scores in one unit, such as margins
    above LoRA's mean."""
    random, thresholds = np.random.default_rng(seed), np.asarray(at, np.float64)
    tasks = [np.asarray(own[method], np.float64) for own in scores.values()]

    def above(runs: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.asarray(np.mean([(own[..., None] > thresholds).mean(-2) for own in runs], axis=0))

    again = above([own[_resampled_indices(len(own), random)] for own in tasks])
    value = above(tasks)
    return [
        Interval(float(v), *_percentile_interval(draws, confidence)) for v, draws in zip(value, again.T, strict=True)
    ]


def ranks(scores: Scores, level: float = 0.05) -> Ranks:
    """Mean ranks over the tasks, and which of them differ. Raises UserError for fewer than three methods or two tasks,
    and for tasks with other methods."""
    methods = list(next(iter(scores.values()), {}))
    if len(methods) < 3 or len(scores) < 2 or any(set(own) != set(methods) for own in scores.values()):
        raise UserError(
            f"{len(scores)} tasks with {len(methods)} methods: ranks need two tasks and three methods at least, the "
            "same ones on every task."
        )
    means = np.array([[np.mean(np.asarray(own[m], np.float64)) for m in methods] for own in scores.values()])
    placed = stats.rankdata(-means, axis=1)
    k, n = len(methods), len(scores)
    mean = placed.mean(0)
    p = float(stats.friedmanchisquare(*means.T).pvalue) if np.ptp(placed) else 1.0
    critical = float(stats.studentized_range.isf(level, k, np.inf)) * np.sqrt(k * (k + 1) / (12 * n))
    order = np.argsort(mean, kind="stable")
    groups: list[list[str]] = []
    end = 0
    for i in range(k):
        last = max(j for j in range(i, k) if mean[order[j]] - mean[order[i]] < critical)
        if last > i and last + 1 > end:
            groups.append([methods[order[j]] for j in range(i, last + 1)])
            end = last + 1
    return Ranks({methods[i]: float(mean[i]) for i in order}, p, float(critical), groups)


def _scores_of_both(
    task: str, own: Mapping[str, ArrayLike], method: str, reference: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if missing := [name for name in (method, reference) if name not in own]:
        raise UserError(f"{task} has no scores of {missing[0]}: expected both methods on every task.")
    return np.asarray(own[method], np.float64), np.asarray(own[reference], np.float64)


def _shares(runs: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Return the share of every run in each bootstrap draw, [DRAWS, runs]."""
    places = _resampled_indices(runs, random) + runs * np.arange(DRAWS)[:, None]
    return np.bincount(places.ravel(), minlength=DRAWS * runs).reshape(DRAWS, runs) / runs


def _resampled_indices(runs: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Runs by their numbers, [DRAWS, runs]; whole numbers are drawn alike on every machine."""
    return random.integers(0, runs, (DRAWS, runs))


def _percentile_interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(draws, ((1 - confidence) / 2, (1 + confidence) / 2))
    return float(low), float(high)
