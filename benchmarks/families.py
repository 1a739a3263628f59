"""How often a study has a wrong word anywhere, where some of its methods are alike and others at the margin.

A word is wrong that says *significantly* where there is no difference, or *equivalent* where the difference is as large
as the margin. Compared are the rule in use (`statistics.corrected`, one family) and its predecessor until 2026-11-30
(Holm over the differences and over the equivalences apart).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import special

from dual_lora.lab.advise.pace import LOOKS
from dual_lora.lab.study import statistics as stats

Array = np.ndarray[Any, Any]
LEVEL = 0.05
SEEDS = (3, 5, 8, 1000)  # the last: errors that are known
METHODS = (1, 2, 4, 6, 10)
MARGINS = (4.0, 8.0, 16.0)  # in standard errors of a difference
SHARED = (0.0, 0.5)  # of a difference's variance, what all differences have in common: the reference's own


def apart(p: Array, p_same: Array) -> tuple[Array, Array]:
    """Holm's procedure twice [..., K]: the former rule."""
    nothing = np.full_like(p, np.nan)
    return stats.corrected(p, nothing)[0], stats.corrected(p_same, nothing)[0]


HEAD = ("methods", "wrong word, former", "wrong word, now", "right words, former", "now", "worst mixture of the former")
RULES = {"until 2026-11-30, two families": apart, "now, one family": stats.corrected}


def wrong(
    studies: int, random: np.random.Generator, seeds: int, truth: Array, margin: float, shared: float
) -> dict[str, tuple[float, float]]:
    """The share of studies with a wrong word, and the share of right words that are said, by each rule.

    truth [K]: true differences in standard errors. The noise is that of seeds alone, where each test holds its level
    exactly.
    """
    noise = random.standard_normal((studies, len(truth), 1)) if seeds == SEEDS[-1] else None
    if noise is None:
        common = random.standard_normal((studies, 1, seeds))
        d = np.sqrt(seeds) * (
            np.sqrt(1 - shared) * random.standard_normal((studies, len(truth), seeds)) + np.sqrt(shared) * common
        )
        mean, error = d.mean(-1), d.std(-1, ddof=1) / np.sqrt(seeds)
    else:
        common = random.standard_normal((studies, 1))
        mean, error = np.sqrt(1 - shared) * noise[..., 0] + np.sqrt(shared) * common, np.ones((studies, len(truth)))
    mean = mean + truth
    p = 2 * special.stdtr(seeds - 1, -np.abs(mean) / error)
    p_same = special.stdtr(seeds - 1, (np.abs(mean) - margin) / error)
    null, large = truth == 0, np.abs(truth) >= margin
    found = {}
    for name, rule in RULES.items():
        differ, same = (adjusted < LEVEL for adjusted in rule(p, p_same))
        bad = (differ & null) | (differ & (np.sign(mean) != np.sign(truth)) & ~null) | (same & large)
        good = (differ & ~null) | (same & ~large)
        found[name] = float(bad.any(-1).mean()), float(good.mean())
    return found


def looks(studies: int, random: np.random.Generator, level: float, shared: float) -> float:
    """The share of answers that call one of two methods better or worse than LoRA at any look, where none is."""
    common = random.standard_normal((studies, 1, LOOKS[-1]))
    own = random.standard_normal((studies, 2, LOOKS[-1]))
    d, found = np.sqrt(1 - shared) * own + np.sqrt(shared) * common, np.zeros(studies, bool)
    for seeds in LOOKS:
        seen = d[..., :seeds]
        p = 2 * special.stdtr(seeds - 1, -np.abs(seen.mean(-1)) / (seen.std(-1, ddof=1) / np.sqrt(seeds)))
        found |= (stats.corrected(p, np.ones_like(p))[0] < level).any(-1)
    return float(found.mean())


FAILS = (0.1, 0.2, 0.5)  # a run's chance to learn nothing
FAILS_SEEDS, FAILS_METHODS = (2, 3, 4, 5, 8), (1, 3, 10)
LOST, OF_RUNS, OF_ITEMS = 0.34, (0.002, 0.01, 0.04), 0.012  # what a failure costs; deviations of runs, and by the items
FAILS_HEAD = ("seeds", "methods", *(f"{chance:.0%} of the runs fail" for chance in FAILS))


def failing(studies: int, random: np.random.Generator, seeds: int, many: int, chance: float, noise: float) -> float:
    """The share of studies with a false alarm, where `many` methods and their reference are alike: a run of any learns
    nothing with this chance, and else has this noise."""
    lost = LOST * (random.random((studies, many + 1, seeds)) < chance)
    scores = noise * random.standard_normal(lost.shape) - lost
    scores = scores + OF_ITEMS / np.sqrt(2) * random.standard_normal((studies, many + 1, 1))
    d = scores[:, 1:] - scores[:, :1]
    half = stats.half_width(LEVEL / many, d.std(-1, ddof=1) / np.sqrt(seeds), OF_ITEMS, seeds, 1000)
    return float((np.abs(d.mean(-1)) > half).any(-1).mean())


def fails(studies: int, random: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """The worst of the noises, by the seeds, the number of methods and the chance of a failure."""
    for seeds in FAILS_SEEDS:
        for many in FAILS_METHODS:
            worst = [max(failing(studies, random, seeds, many, chance, s) for s in OF_RUNS) for chance in FAILS]
            yield seeds, many, *(f"{share:.3f}" for share in worst)


# LoRA on CoLA at 3e-4 and at 1e-3, from the published runs: Matthews' mean and deviation on the validation and on the
# test records where a run learns, and its chance to learn nothing (score 0).
ON_COLA = {"validation": ((0.187, 0.017), (0.235, 0.046)), "test": ((0.164, 0.030), (0.131, 0.044))}
COLA_FAILS, COLA_ITEMS = (0.0, 0.2), 0.012


def searched(studies: int, random: np.random.Generator, seeds: int, tuning: int, each: bool = False) -> float:
    """The share of studies that find a difference between two methods that are LoRA on CoLA, each tuned by itself with
    the mean of `tuning` seeds a rate, or with as many for each final seed."""

    def scores(what: str, rates: Array) -> Array:
        mean, deviation = np.array(ON_COLA[what]).T[:, rates]
        fails = np.array(COLA_FAILS)[rates]
        learned = random.random(mean.shape) >= fails
        return np.asarray(learned * (mean + deviation * random.standard_normal(mean.shape)))

    found = []
    for _ in range(2):
        tried = np.broadcast_to(np.arange(2)[:, None], (studies, seeds if each else 1, 2, tuning))
        chosen = scores("validation", tried).mean(-1).argmax(-1)
        found.append(scores("test", np.broadcast_to(chosen, (studies, seeds))))
    d = found[0] - found[1]
    mean = d.mean(1) + COLA_ITEMS * random.standard_normal(studies)
    half = stats.half_width(LEVEL, d.std(1, ddof=1) / np.sqrt(seeds), COLA_ITEMS, seeds, 516)
    return float((np.abs(mean) > half).mean())


def worst(studies: int, random: np.random.Generator) -> Iterator[tuple[Any, ...]]:
    """For every number of methods: the worst share of studies with a wrong word by each rule, and at which mixture; and
    what of the right words is said, in the mean over all mixtures."""
    for many in METHODS:
        cells: dict[str, list[tuple[float, float, str]]] = {name: [] for name in RULES}
        for seeds in SEEDS:
            for margin in MARGINS:
                for shared in SHARED:
                    for alike in range(many + 1):
                        truth = np.where(np.arange(many) < alike, 0.0, margin)
                        what = f"{alike} alike, {many - alike} at the margin"
                        for name, (bad, good) in wrong(studies, random, seeds, truth, margin, shared).items():
                            cells[name].append((bad, good, what))
        bad = [max(own) for own in cells.values()]
        good = [np.mean([said for _, said, _ in own]) for own in cells.values()]
        yield many, *(f"{b:.3f}" for b, _, _ in bad), *(f"{g:.3f}" for g in good), bad[0][2]
