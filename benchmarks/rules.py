"""Rules for a difference of two methods that were tried and rejected, and the one that is used, on one grid.

A rule gives half of an interval's width at a level, from the parts of the error (`statistics`): seeds' and items'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy import stats as distributions

from dual_lora.lab.study import statistics as stats

Array = np.ndarray[Any, Any]
LEVEL = 0.005  # of one comparison among ten
POINTS = 41  # of the table of Behrens' and Fisher's quantile, over the share of the seeds


class Drawn(NamedTuple):
    """Mean squares of so many studies: seeds, items, rest; and how many seeds and items there are."""

    seed: Array
    item: Array
    rest: Array
    seeds: int
    items: int

    @property
    def errors(self) -> tuple[Array, Array, Array]:
        """The whole error, the seeds' part and the items' part."""
        whole, seed = stats.standard_errors(self.seed, self.item, self.rest, self.seeds, self.items)
        return whole, seed, np.sqrt(np.maximum(whole**2 - seed**2, 0))


def quantile(level: float, df: Any) -> Array:
    """Student's two-sided t."""
    return np.asarray(distributions.t.isf(level / 2, df))


def freedom(drawn: Drawn, jumps: bool) -> Array:
    """Satterthwaite's degrees of freedom of the pooled error. jumps: to those of seeds or of items alone where the
    error is no smaller by itself."""
    S, N = drawn.seeds - 1, drawn.items - 1
    summed = drawn.seed + drawn.item - drawn.rest
    total = np.maximum(summed, np.maximum(drawn.seed, drawn.item))
    df = total**2 / (drawn.seed**2 / S + drawn.item**2 / N + drawn.rest**2 / (S * N))
    if jumps:
        df = np.where(total == summed, df, np.where(total == drawn.seed, S, N))
    return np.maximum(df, 1.0)


def pooled(drawn: Drawn) -> Array:
    """The rule until 2026-11-26."""
    return drawn.errors[0] * quantile(LEVEL, freedom(drawn, jumps=True))


def no_jump(drawn: Drawn) -> Array:
    """The same with Satterthwaite's degrees of freedom everywhere."""
    return drawn.errors[0] * quantile(LEVEL, freedom(drawn, jumps=False))


def larger_p(drawn: Drawn) -> Array:
    """Significant by the pooled error and by the paired t test over seeds."""
    return np.maximum(pooled(drawn), drawn.errors[1] * quantile(LEVEL, drawn.seeds - 1))


def cochran_cox(drawn: Drawn) -> Array:
    """Each part's quantile, weighed by its share of the variance."""
    whole, seed, item = drawn.errors
    t = [quantile(LEVEL, n - 1) for n in (drawn.seeds, drawn.items)]
    return (seed**2 * t[0] + item**2 * t[1]) / whole


def behrens_fisher(drawn: Drawn) -> Array:
    """The quantile of a sum of two t variables, weighed as the parts are; from a table over their share."""
    whole, seed, _ = drawn.errors
    shares = np.linspace(0, 1, POINTS)
    return whole * np.interp((seed / whole) ** 2, shares, _sum_of_t(drawn.seeds - 1, drawn.items - 1))


_known: dict[tuple[int, int], Array] = {}


def _sum_of_t(first: int, second: int) -> Array:
    """Two-sided quantiles of sqrt(share) t[first] + sqrt(1 - share) t[second], by the integral over the first."""
    if (first, second) not in _known:
        probability = (np.arange(4000) + 0.5) / 4000
        x = distributions.t.ppf(probability, first)
        found = []
        for share in np.linspace(0, 1, POINTS):
            low, high = 0.0, 2 * float(max(quantile(LEVEL, first), quantile(LEVEL, second)))
            for _ in range(50):
                middle = (low + high) / 2
                if share == 1:
                    beyond = float(distributions.t.sf(middle, first))
                else:
                    beyond = float(
                        distributions.t.sf((middle - np.sqrt(share) * x) / np.sqrt(1 - share), second).mean()
                    )
                low, high = (middle, high) if beyond > LEVEL / 2 else (low, middle)
            found.append(high)
        _known[first, second] = np.array(found)
    return _known[first, second]


def banerjee(drawn: Drawn) -> Array:
    """The rule that is used."""
    _, seed, item = drawn.errors
    return stats.half_width(LEVEL, seed, item, drawn.seeds, drawn.items)


RULES: dict[str, tuple[Callable[[Drawn], Array], str]] = {
    "one pooled error, Satterthwaite's degrees of freedom": (pooled, "the rule until 2026-11-26"),
    "the same without its jump from S − 1 to N − 1": (no_jump, "no better"),
    "the larger of the pooled p and the paired t test over seeds": (larger_p, "nearly"),
    "weighted mean of the two quantiles (Cochran and Cox)": (cochran_cox, "too short with two seeds"),
    "sum of two t variables (Behrens and Fisher)": (behrens_fisher, "holds; needs an integral"),
    "**seeds and items apart (Banerjee)**": (banerjee, "holds by proof; the one that is used"),
}


def worst_levels(
    studies: int, random: np.random.Generator, seeds: tuple[int, ...], items: tuple[int, ...],
    seed_squares: tuple[float, ...], item_squares: tuple[float, ...],
) -> Iterator[tuple[str, ...]]:  # fmt: skip
    """A row a rule: how often it errs in its worst cell, for each number of seeds; and what became of it."""
    worst = {name: dict.fromkeys(seeds, 0.0) for name in RULES}
    for S in seeds:
        for N in items:
            for seed_square in (square for square in seed_squares if square >= 1):
                for item_square in item_squares:
                    drawn = Drawn(
                        seed_square * random.chisquare(S - 1, studies) / (S - 1),
                        item_square * random.chisquare(N - 1, studies) / (N - 1),
                        random.chisquare((S - 1) * (N - 1), studies) / ((S - 1) * (N - 1)),
                        S,
                        N,
                    )
                    true = np.sqrt((seed_square + item_square - 1) / (S * N))
                    mean = np.abs(true * random.standard_normal(studies))
                    for name, (rule, _) in RULES.items():
                        worst[name][S] = max(worst[name][S], float((mean > rule(drawn)).mean()))
    for name, (_, became) in RULES.items():
        yield (name, *(f"{worst[name][S]:.3f}" for S in seeds), became)
