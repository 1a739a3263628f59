"""Methods ranked over tasks: Friedman's test and Nemenyi's critical difference (Demšar 2006)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

PERMUTATIONS = 4000  # a p of 0.05 is then known to ±0.007


@dataclass(frozen=True)
class Ranking:
    """Methods ranked over tasks (1 is best), Friedman's test, Nemenyi's critical difference of average ranks.

    groups: sets of methods, none of which is distinguishable from another of its set by rank.
    """

    ranks: dict[str, float]
    tasks: int
    p: float | None
    critical: float | None
    groups: list[list[str]]
    note: str


def rank_methods(scores: Mapping[str, Sequence[float]], level: float = 0.05, seed: int = 0) -> Ranking:
    """scores: method -> one score a task (the same tasks in the same order, higher is better)."""
    values = np.array(list(scores.values()), dtype=np.float64)  # [methods, tasks]
    k, tasks = values.shape
    average = stats.rankdata(-values, axis=0).mean(1)
    ranks = dict(sorted(zip(scores, average.tolist(), strict=True), key=lambda pair: pair[1]))
    if tasks < 2 or k < 2:
        return Ranking(ranks, tasks, None, None, [list(ranks)], "Ranks over tasks need two tasks and two methods.")
    critical = float(
        stats.studentized_range.isf(level, k, np.inf) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * tasks))
    )
    # The chi-square form of Friedman's test is poor for few tasks; permuting methods within each task is not.
    p = stats.permutation_test(
        list(values),
        lambda *v, axis=-1: np.var(np.mean(stats.rankdata(np.stack(v), axis=0), axis=axis), axis=0),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        rng=np.random.default_rng(seed),
    ).pvalue
    names = list(ranks)
    groups: list[list[str]] = []
    for start in range(k):
        members = [n for n in names[start:] if ranks[n] - ranks[names[start]] < critical]
        if not groups or members[-1] != groups[-1][-1]:
            groups.append(members)
    widest = k - 1
    note = "" if critical < widest else f"With {tasks} tasks no two of {k} methods can be told apart by rank."
    return Ranking(ranks, tasks, float(p), critical, groups, note)
