"""Which method is better, and how sure can we be? Statistics for paired runs.

Two methods are trained with the same seeds and judged on the same test items. Their difference is a table

    d[s, i] = score of the candidate - score of the reference        [S seeds, N items], higher is better

and a claim about the *method* has to hold for other seeds and for other items. Both are random, and crossed:

    d[s, i] = δ + seed_s + item_i + rest_si
    Var(mean d) = (MS_seeds + MS_items - MS_rest) / (S N)             (the two-way table's mean squares)

with Satterthwaite's degrees of freedom. A test over items alone would call the luck of one training run a
better method; one over seeds alone throws away what the items say about the noise. Three or five seeds are
few, so intervals are as wide as Student's t demands at these degrees of freedom.

Sources: Clark 1973 (crossed random effects), Owen 2007 (the pigeonhole bootstrap), Hesterberg 2015 (bootstrap
intervals that are not too short for small samples), Schuirmann 1987 (two one-sided tests), Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Table = NDArray[np.float64]

RESAMPLES = 4000  # the interval's ends then move by about 2 % of its width between random streams


class Verdict(StrEnum):
    """What may be said about a candidate against its reference."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent within the margin"
    OPEN = "not distinguishable"
    ONE_SEED = "no verdict from one seed"
    ONE_ITEM = "no verdict from one test item"
    DIVERGED = "no verdict, every run diverged"
    UNLEARNED = "neither learned the task"


@dataclass(frozen=True)
class Spread:
    """A mean difference with its standard error and degrees of freedom (0 with one seed: unknown)."""

    difference: float
    error: float
    freedom: float
    seeds: int
    items: int


@dataclass(frozen=True)
class Comparison:
    """One candidate against one reference on one task; differences in the metric's unit, positive is better.

    p: chance of a difference this large if there were none (seeds and items both random); `p_holm` after
        Holm's correction over all comparisons made together. p_same: chance of looking this alike if the true
        difference were as large as the margin. p_seeds: exact sign-flip test over seeds, which cannot fall
        below 2 / 2^seeds. p_items: the same over items, a statement about these trained models only, never
        used for the verdict.
    visible: the smallest true difference that a study of this size finds with `power`, at the corrected
    level; None where nothing varied, and noise can't be judged.
    """

    candidate: str
    reference: str
    task: str
    metric: str
    candidate_score: float
    reference_score: float
    difference: float
    low: float
    high: float
    confidence: float
    p: float | None
    p_holm: float | None
    p_same: float | None
    p_same_holm: float | None
    p_seeds: float | None
    p_items: float | None
    visible: float | None
    power: float
    margin: float | None
    spread: Spread
    verdict: Verdict
    note: str = ""
    place: tuple[str, str] = ("", "")  # model and task, for programs
    better: str = "more"  # or "less", of the metric; the difference is positive where it is better in both cases

    @property
    def seeds(self) -> int:
        """How many paired seeds there were."""
        return self.spread.seeds

    @property
    def items(self) -> int:
        """How many paired test items there were (1 where the metric has none)."""
        return self.spread.items

    @property
    def sentence(self) -> str:
        """The verdict in words, with the figure, its interval and what the study could have seen."""
        head = f"{self.candidate} against {self.reference} on {self.task}: {self.verdict}"
        if self.verdict is Verdict.EQUIVALENT:
            head += f" of ±{self.margin:.3g}"
        figure = f"{'' if self.better == 'more' else 'reduction of '}{self.metric} {self.difference:+.4g}"
        if self.verdict is Verdict.DIVERGED:
            return f"{head}. {self.note}".rstrip()
        if self.verdict is Verdict.ONE_ITEM:
            return f"{head} ({figure} there, {self.seeds} seeds). Give more test items. {self.note}".rstrip()
        if self.verdict is Verdict.ONE_SEED:
            return (
                f"{head} ({figure}, for these two trained models on {self.items} items only). "
                f"Give at least two seeds, better five. {self.note}"
            ).rstrip()
        figure += f", {self.confidence:.0%} interval {self.low:+.4g} to {self.high:+.4g}"
        seen = "" if self.visible is None else f"; visible from {self.visible:.3g}"
        sure = f"p {self.p_holm:.3g} corrected, {self.seeds} seeds{seen}"
        return f"{head} ({figure}, {sure}). {self.note}".rstrip()


def table(scores: ArrayLike) -> Table:
    """scores [S, N], or [S] where a metric has no items, as a checked table [S, N]."""
    t = np.asarray(scores, dtype=np.float64)
    t = t[:, None] if t.ndim == 1 else t
    if t.ndim != 2 or 0 in t.shape:
        raise ValueError(f"Scores of shape {t.shape}: expected [seeds, items], at least one of each.")
    if not np.isfinite(t).all():
        raise ValueError(
            f"{int((~np.isfinite(t)).sum())} of {t.size} scores are not finite: give a diverged run "
            "the worst score of its task, do not leave it out."
        )
    return t


def spread(d: ArrayLike) -> Spread:
    """Mean of the differences d [S, N]; seeds and items are both random samples (the module's formula)."""
    d = table(d)
    S, N = d.shape
    mean = float(d.mean())
    rounding = 1e-12 * max(1.0, float(np.abs(d).max()))  # what scores that are equal may differ by
    if np.ptp(d) <= rounding:
        return _unvaried(0.0 if abs(mean) <= rounding else mean, S, N)
    if S == 1:
        return Spread(mean, float(d.std(ddof=1) / math.sqrt(N)), 0.0, S, N)
    rows, columns = d.mean(1), d.mean(0)
    seeds = N * rows.var(ddof=1)
    if N == 1:
        return Spread(mean, math.sqrt(seeds / S), S - 1.0, S, N)
    items = S * columns.var(ddof=1)
    rest_sum = float(((d - rows[:, None] - columns[None] + mean) ** 2).sum())
    rest = rest_sum / ((S - 1) * (N - 1))
    # The sum may come out too small by chance: never below what seeds alone, or items alone, would give.
    total = max(seeds + items - rest, seeds, items)
    if total <= rounding**2:  # seeds and items both cancel: the rest is all the noise that is seen
        return Spread(0.0 if abs(mean) <= rounding else mean, math.sqrt(rest / (S * N)), (S - 1.0) * (N - 1.0), S, N)
    if total == seeds + items - rest:
        parts = seeds**2 / (S - 1) + items**2 / (N - 1) + rest**2 / ((S - 1) * (N - 1))
        freedom = total**2 / parts
    else:
        freedom = S - 1.0 if total == seeds else N - 1.0
    return Spread(mean, math.sqrt(total / (S * N)), float(max(freedom, 1.0)), S, N)


def _unvaried(mean: float, S: int, N: int) -> Spread:
    """The same difference for every seed and item. Noise is not zero because none was seen: the error is what one of
    the S N differences would make of it if it had been 0, |mean| / (S N); where all are 0, none can be told.
    """
    return Spread(mean, abs(mean) / (S * N) if S > 1 else 0.0, S - 1.0, S, N)


def difference_p(s: Spread) -> float:
    """Two-sided p of "no difference"."""
    if s.freedom == 0:
        raise ValueError("One seed says nothing about other seeds: give at least two.")
    if s.error == 0:
        return 1.0
    return float(2 * stats.t.sf(abs(s.difference) / s.error, s.freedom))


def same_p(s: Spread, margin: float, counted: bool = False) -> float:
    """Two one-sided tests: p of "the true difference is as large as the margin, one way or the other".

    counted: an item adds a right or a wrong answer. Two methods may then agree on few items by luck, which has the
    chance (1 - margin)^N at most. Measured scores that agree to the last bit are of one and the same function.
    """
    if margin <= 0:
        raise ValueError(f"Margin {margin}: equivalence needs a positive margin, in the metric's unit.")
    if s.freedom == 0:
        raise ValueError("One seed says nothing about other seeds: give at least two.")
    if s.error == 0:
        return max(0.0, 1 - margin) ** s.items if counted else 0.0
    return float(stats.t.sf((margin - abs(s.difference)) / s.error, s.freedom))


def student_interval(s: Spread, confidence: float = 0.95) -> tuple[float, float]:
    """The symmetric interval of Student's t."""
    half = s.error * float(stats.t.isf((1 - confidence) / 2, s.freedom))
    return s.difference - half, s.difference + half


def bootstrap_interval(
    d: ArrayLike, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Interval of the mean of d [S, N] by resampling whole seeds and whole items, independently.

    Resampling rows and columns counts the rest up to three times (Owen) and misses (S - 1)/S of the seeds'
    variance (Hesterberg). So the resampled deviations keep their shape, their size is set to the crossed
    standard error, and they are stretched from the normal's to Student's quantile. With one seed only the
    items are resampled.
    """
    d = table(d)
    s = spread(d)
    if s.error == 0:
        return s.difference, s.difference
    S, N = d.shape
    random = np.random.default_rng(seed)
    rows = random.multinomial(S, np.full(S, 1 / S), resamples) / S
    columns = random.multinomial(N, np.full(N, 1 / N), resamples) / N if N > 1 else np.ones((resamples, 1))
    deviation = np.einsum("bs,bs->b", rows, columns @ d.T) - s.difference
    if deviation.std() <= 1e-12 * s.error:  # nothing to resample: means of seeds and items are all the same
        return student_interval(s, confidence)
    tail = (1 - confidence) / 2
    stretch = stats.t.isf(tail, s.freedom) / stats.norm.isf(tail) if s.freedom else 1.0
    size = s.error / deviation.std() * stretch
    low, high = np.quantile(deviation, [tail, 1 - tail]) * size + s.difference
    return float(low), float(high)


def sign_flip_p(differences: ArrayLike, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided paired permutation test of mean 0 on differences [n]; exact while 2^n <= `resamples`."""
    x = np.asarray(differences, dtype=np.float64)
    x = x[np.abs(x) > 1e-12]  # flipping a zero, or the rounding of one, changes nothing
    if len(x) < 2:
        return 1.0  # one difference lies as far from 0 as its flip
    exact = len(x) <= math.log2(resamples)  # 2 to the number of items may be more than a float holds
    result = stats.permutation_test(
        (x,),
        lambda v, axis: np.mean(v, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else resamples,
        batch=max(1, int(4e6 // len(x))),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: the chance of *any* false alarm stays at the level."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    running = 0.0
    for step, index in enumerate(order):
        running = max(running, min(1.0, (len(p) - step) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()


def power(difference: float, error: float, freedom: float, level: float) -> float:
    """Chance that a two-sided t test at `level` finds a true difference of this size, with the right sign."""
    return float(stats.nct.sf(stats.t.isf(level / 2, freedom), freedom, abs(difference) / error))


def smallest_visible(s: Spread, level: float = 0.05, wanted: float = 0.8) -> float | None:
    """The smallest true difference found with chance `wanted`; None with one seed, where none ever is, and without
    any noise to judge it by."""
    if s.freedom == 0 or s.error == 0:
        return None
    top = 2 * (stats.t.isf(level / 2, s.freedom) + stats.t.isf(1 - wanted, s.freedom))
    while power(top, 1.0, s.freedom, level) < wanted:
        top *= 2
    return float(optimize.brentq(lambda x: power(x, 1.0, s.freedom, level) - wanted, 0.0, top) * s.error)


def compare_pair(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    names: tuple[str, str] = ("candidate", "reference"),
    task: str = "task",
    metric: str = "score",
    margin: float | None = None,
    confidence: float = 0.95,
    wanted_power: float = 0.8,
    seed: int = 0,
    counted: bool = False,
) -> Comparison:
    """One comparison before correction; pass all of them to `judge`. Scores are [S, N], higher is better.

    counted: see `same_p`.
    """
    a, b = table(candidate), table(reference)
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} has scores {a.shape} and {names[1]} {b.shape} on {task}: pairing needs the same "
            "seeds and items."
        )
    d = a - b
    s = spread(d)
    low, high = bootstrap_interval(d, confidence, seed=seed)
    many = s.freedom > 0
    return Comparison(
        candidate=names[0],
        reference=names[1],
        task=task,
        metric=metric,
        candidate_score=float(a.mean()),
        reference_score=float(b.mean()),
        difference=s.difference,
        low=low,
        high=high,
        confidence=confidence,
        p=difference_p(s) if many else None,
        p_holm=None,
        p_same=same_p(s, margin, counted) if many and margin is not None else None,
        p_same_holm=None,
        p_seeds=sign_flip_p(d.mean(1)) if many else None,
        p_items=sign_flip_p(d.mean(0)) if s.items > 1 else None,
        visible=smallest_visible(s, 1 - confidence, wanted_power),
        power=wanted_power,
        margin=margin,
        spread=s,
        verdict=Verdict.OPEN if many else Verdict.ONE_SEED,
    )


def judge(comparisons: Sequence[Comparison], level: float = 0.05) -> list[Comparison]:
    """Verdicts for comparisons that are made together, corrected for their number.

    Equivalence comes first: the margin is the user's word for what is too small to matter, so a difference
    that is surely inside it is no victory, however sure its sign. A comparison without a p gets no verdict, and is
    not corrected for: it keeps the reason that it came with.
    """
    many = [c for c in comparisons if c.p is not None]
    apart = dict(zip(map(id, many), holm([c.p for c in many if c.p is not None]), strict=True))
    margins = [c for c in many if c.p_same is not None]
    alike = dict(zip(map(id, margins), holm([c.p_same for c in margins if c.p_same is not None]), strict=True))
    judged = []
    for c in comparisons:
        if id(c) not in apart:
            judged.append(c)
            continue
        p, same = apart[id(c)], alike.get(id(c))
        verdict, note = Verdict.OPEN, c.note
        if same is not None and same < level:
            verdict = Verdict.EQUIVALENT
            if p < level:
                sign = "better" if c.difference > 0 else "worse"
                note = f"The sign is sure ({sign}), the size does not matter. {note}".rstrip()
        elif p < level:
            verdict = Verdict.BETTER if c.difference > 0 else Verdict.WORSE
        visible = smallest_visible(c.spread, level / len(many), c.power)
        judged.append(replace(c, p_holm=p, p_same_holm=same, verdict=verdict, note=note, visible=visible))
    return judged


def over_tasks(comparisons: Sequence[Comparison]) -> Spread:
    """The mean difference over tasks that share a unit: over these tasks, not over a sample of others."""
    T = len(comparisons)
    parts = [c.spread.error / T for c in comparisons]
    total = sum(e**2 for e in parts)
    below = sum(e**4 / c.spread.freedom for e, c in zip(parts, comparisons, strict=True) if c.spread.freedom)
    freedom = total**2 / below if below else min(c.spread.freedom for c in comparisons)
    mean = math.fsum(c.difference for c in comparisons) / T
    return Spread(mean, math.sqrt(total), freedom, min(c.seeds for c in comparisons), sum(c.items for c in comparisons))
