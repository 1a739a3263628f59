"""Which method is better, and how sure can we be? Statistics for paired runs.

Two methods are trained with the same seeds and scored on the same test items. Their difference is a table

    d[s, i] = score of the candidate - score of the reference        [S seeds, N items], higher is better

and a claim about the *method* has to hold for other seeds and for other items. Both are random, and crossed:

    d[s, i] = δ + seed_s + item_i + rest_si
    Var(mean d) = seed_error² + item_error²,   seed_error² = MS_seeds / (S N)
                                               item_error² = (MS_items - min(MS_rest, MS_seeds)) / (S N)

from the two-way table's mean squares (of few items MS_items / (S N): `standard_errors`). The first part is known from
S seeds, the second from N items, so each gets the quantile t of its own degrees of freedom:

    δ = mean d ± √(t²[S - 1] seed_error² + t²[N - 1] item_error²)

This holds its level whatever the true parts are: the distribution function F of a squared standard normal is concave,
so E F(Σ w t² χ²/df) ≥ Σ w E F(t² χ²/df) = 1 - level for shares w of the two parts. One pooled error with
Satterthwaite's degrees of freedom does not: where three seeds happen to agree it takes N - 1 for S - 1, and its level
of 0.005 is 0.04 in truth (docs/explanation/calibration.md).

A test against a margin asks what would be seen if the true difference were that margin m. Where answers are right or
wrong, few of those that differ may happen to be among the items, and then the error that was seen is too small as well.
If one answer moves the score by R / N, a difference of m takes a share m / R of the answers at least. Where those are
right or wrong an item's part in it varies by m (R - m) or more: the items' error is never taken for less
(`against_margin`), and p for no less than the chance that so few of them are seen. Nor is p of "no difference" below
the chance that none of the answers is seen that would make up for the difference (`difference_p`).

Sources: Clark 1973 (crossed random effects), Banerjee 1960 (the interval), Schuirmann 1987 (two one-sided tests),
Holm 1979 and Shaffer 1986 (many comparisons).
"""

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """A mean difference and its standard error; `seed_error` is the seeds' part of it (0 with one seed: unknown).

    reach: how far one answer can move the score, times N, where answers are right or wrong (for one test set's accuracy
        1); None where items are measured.
    """

    difference: float
    error: float
    seed_error: float
    seeds: int
    items: int
    reach: float | None = None

    @property
    def item_error(self) -> float:
        """The items' part of the error."""
        return math.sqrt(max(self.error**2 - self.seed_error**2, 0.0))


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


def with_lost_runs(*methods: Table) -> list[Table]:
    """Tables [S, N] whose lost runs (NaN) have the worst score of all runs of these methods; 0 where no run has one.

    Of the two that are compared, and of no third: another method's failure would decide how bad this one's is.
    """
    means = np.concatenate([method.mean(1) for method in methods])
    worst = np.nanmin(means) if np.isfinite(means).any() else 0.0
    return [np.where(np.isnan(method), worst, method) for method in methods]


def error_parts(d: Table) -> tuple[Table, Table, Table]:
    """Mean difference, its standard error and the seeds' part of that, of tables d [..., S, N] with S, N ≥ 2."""
    S, N = d.shape[-2:]
    rows, columns, mean = d.mean(-1), d.mean(-2), d.mean((-2, -1))
    seeds, items = N * rows.var(-1, ddof=1), S * columns.var(-1, ddof=1)
    left = d - rows[..., :, None] - columns[..., None, :] + mean[..., None, None]
    rest = (left**2).sum((-2, -1)) / ((S - 1) * (N - 1))
    error, seed_error = standard_errors(seeds, items, rest, S, N)
    unseen = unseen_error(mean, seeds + rest <= 1e-20 * items, S)
    return mean, np.hypot(error, unseen), np.hypot(seed_error, unseen)


def unseen_error(mean: Table, agree: NDArray[np.bool_], S: int) -> Table:
    """The seeds' error of means [...] where two seeds `agree` on every item, else 0.

    That does not show that others would: as in `spread`, one of them might have had 0. Of three and more so few agree
    by luck that the level holds without it.
    """
    return np.where((S == 2) & agree, np.abs(mean) / S, 0.0)


def standard_errors(seeds: Table, items: Table, rest: Table, S: int, N: int) -> tuple[Table, Table]:
    """The standard error and the seeds' part of it, from mean squares."""
    # Seeds whose means are all the same are no sign of less noise than single answers have.
    seeds = np.where(seeds <= 1e-20 * (items + rest), rest, seeds)
    # MS_items of few items is often below MS_rest by luck, and then the items would have no part. With two items and
    # eight seeds 10 % of studies would have a false alarm by that: nothing is taken from it.
    few = max(S, 6) >= 2 * N
    total = seeds + items if few else np.maximum(seeds + items - rest, np.maximum(seeds, items))
    return np.sqrt(total / (S * N)), np.sqrt(seeds / (S * N))


def spread(d: ArrayLike, scale: float = 1.0) -> Spread:
    """Mean of the differences d [S, N]; seeds and items are both random samples (the module's formula).

    scale: the order of the scores that were subtracted, by which their rounding is bounded.
    """
    d = table(d)
    S, N = d.shape
    mean = float(d.mean())
    rounding = 1e-12 * max(scale, float(np.abs(d).max()))  # what scores that are equal may differ by
    if np.ptp(d) <= rounding:
        # The same difference for every seed and item. Noise is not zero because none was seen: the error is what one
        # of the S N differences would make of it if it had been 0; where all are 0, none can be told.
        mean = 0.0 if abs(mean) <= rounding else mean
        error = abs(mean) / (S * N) if S > 1 else 0.0
        return Spread(mean, error, error, S, N)
    if S == 1:
        return Spread(mean, float(d.std(ddof=1) / math.sqrt(N)), 0.0, S, N)
    if N == 1:
        error = float(d.std(ddof=1) / math.sqrt(S))
        return Spread(mean, error, error, S, N)
    _, error, seed_error = error_parts(d)
    return Spread(0.0 if abs(mean) <= rounding else mean, float(error), float(seed_error), S, N)


def against_margin(s: Spread, margin: float) -> Spread:
    """The spread with the items' error that a true difference of the margin has at least (the module's words), or `s`
    itself where no less was seen."""
    if s.reach is None or s.items < 2 or margin >= s.reach:
        return s
    least = math.sqrt(margin * (s.reach - margin) / s.items)
    return s if s.item_error >= least else replace(s, error=math.hypot(s.seed_error, least))


def half_width(level: float, seed_error: ArrayLike, item_error: ArrayLike, seeds: int, items: int) -> Table:
    """Half of the interval's width at 1 - level (the module's formula); arrays are taken as they come."""
    parts = ((seed_error, seeds - 1), (item_error, items - 1))
    # Student's t from `special`: the numbers of `stats.t.isf` and `stats.t.sf` without their checks.
    ends = [-special.stdtrit(df, level / 2) * np.asarray(error) for error, df in parts if df > 0]
    return np.asarray(functools.reduce(np.hypot, ends, 0.0))


def interval(s: Spread, confidence: float) -> tuple[float, float]:
    """The interval of the mean difference. With one seed: for other items only."""
    half = float(half_width(1 - confidence, s.seed_error, s.item_error, s.seeds, s.items))
    return s.difference - half, s.difference + half


def _two_sided(distance: float, s: Spread) -> float:
    """The level at which the interval's half-width is `distance`."""
    if s.seeds < 2:
        raise ValueError("One seed says nothing about other seeds: give at least two.")
    if s.error == 0 or distance == 0:
        return 1.0 if distance == 0 else 0.0
    ends = [2 * float(special.stdtr(df, -distance / s.error)) for df in (s.seeds - 1, s.items - 1) if df > 0]
    low, high = max(min(ends), 1e-300), max(ends)
    if high <= low * (1 + 1e-12):
        return high

    def over(log: float) -> float:
        return float(half_width(math.exp(log), s.seed_error, s.item_error, s.seeds, s.items)) - distance

    low, high = math.log(low) - 1e-6, min(math.log(high) + 1e-6, 0.0)
    return math.exp(optimize.brentq(over, low, high)) if over(low) > 0 > over(high) else math.exp(high)


def difference_p(s: Spread) -> float:
    """Two-sided p of "no difference".

    Answers that move the score by R / N each make up for a difference d if a share d / (R + d) of them does: p is never
    below twice the chance that none of N is such a one.
    """
    unseen = 0.0 if s.reach is None else 2 * (1 + abs(s.difference) / s.reach) ** -s.items
    return max(_two_sided(abs(s.difference), s), min(unseen, 1.0))


def same_p(s: Spread, margin: float) -> float:
    """Two one-sided tests: p of "the true difference is as large as the margin, one way or the other".

    p of right and wrong answers is never below the chance that no more of those N that would differ are seen. Measured
    scores that agree to the last bit are of one and the same function; single ones for a whole test set prove nothing
    by that.
    """
    if margin <= 0:
        raise ValueError(f"Margin {margin}: equivalence needs a positive margin, in the metric's unit.")
    distance = margin - abs(s.difference)
    few = 0.0
    if s.reach is not None and distance > 0:
        seen = math.floor(s.items * abs(s.difference) / s.reach + 1e-6)
        few = float(stats.binom.cdf(seen, s.items, min(margin / s.reach, 1.0)))
    s = against_margin(s, margin)
    if s.error == 0:
        return 1.0 if s.reach is None and s.items == 1 else few
    p = _two_sided(abs(distance), s) / 2
    return max(few, p if distance > 0 else 1 - p)


def corrected(p: ArrayLike, p_same: ArrayLike) -> tuple[Table, Table]:
    """Adjusted p values [..., K] of K comparisons made together: the chance of *any* wrong word stays at the level.

    p: of "no difference" [..., K]; p_same: of "as large as the margin", NaN where it is not asked. All are one family.
    Of the two hypotheses about one comparison at most one is true: a difference that is as large as the margin is not
    zero. So before anything is rejected no more than K of the 2 K can be true, and later no more than there are
    comparisons with one that is not rejected yet. By that number the next p is multiplied (Shaffer 1986, his second
    procedure; Holm's, where equivalence is not asked).
    """
    both = np.stack(np.broadcast_arrays(np.asarray(p, np.float64), np.asarray(p_same, np.float64)), -1)
    family = both.reshape(*both.shape[:-2], -1)  # [..., 2 K], the two of one comparison next to each other
    order = np.argsort(family, -1, kind="stable")  # NaN last
    place = np.argsort(order, -1, kind="stable").reshape(both.shape)
    last = np.where(np.isnan(both), -1, place).max(-1)  # where a comparison has nothing more to reject
    open_ = (last[..., None, :] >= np.arange(family.shape[-1])[:, None]).sum(-1)
    grown = np.maximum.accumulate(np.minimum(1.0, open_ * np.take_along_axis(family, order, -1)), -1)
    adjusted = np.empty_like(family)
    np.put_along_axis(adjusted, order, grown, -1)
    apart, alike = np.moveaxis(adjusted.reshape(both.shape), -1, 0)
    return apart, alike


@functools.cache
def _seed_error_quantiles(seeds: int) -> Table:
    """Return the quantiles, over studies, of the estimated seed error for a true seed error of 1."""
    points = (np.arange(1000) + 0.5) / 1000
    return np.asarray(np.sqrt(stats.chi2.ppf(points, seeds - 1) / (seeds - 1)))


def power(difference: float, s: Spread, level: float) -> float:
    """Chance that a true difference of this size is significant, with the right sign, if the two parts of the error are
    in truth what they were seen to be. With a difference of 0 it is half of the chance of a false alarm."""
    half = half_width(level, s.seed_error * _seed_error_quantiles(s.seeds), s.item_error, s.seeds, s.items)
    return float(stats.norm.cdf((abs(difference) - half) / s.error).mean())


def smallest_visible(s: Spread, level: float, wanted: float) -> float | None:
    """The smallest true difference found with chance `wanted`; None with one seed, where none ever is, and without
    any noise to judge it by."""
    if s.seeds < 2 or s.error == 0:
        return None
    top = s.error
    while power(top, s, level) < wanted:
        top *= 2
    return float(optimize.brentq(lambda x: power(x, s, level) - wanted, 0.0, top))
