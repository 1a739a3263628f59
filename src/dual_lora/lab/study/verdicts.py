"""Verdicts on one method against another: comparisons, corrected for their number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dual_lora.lab.study import statistics as stats

NAMES = ("candidate", "reference")


class Verdict(StrEnum):
    """The verdict on a candidate against its reference."""

    BETTER = "significantly better"
    WORSE = "significantly worse"
    UNCLEAR = "significantly different, size unclear"
    EQUIVALENT = "equivalent within the margin"
    INCONCLUSIVE = "inconclusive"
    NOT_SIGNIFICANT = "not significant"
    ONE_SEED = "no verdict from one seed"
    ONE_ITEM = "no verdict from one test item"
    DIVERGED = "no verdict, every run diverged"
    UNLEARNED = "neither learned the task"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One candidate against one reference on one task; differences in the metric's unit, positive is better.

    p: chance of a difference this large if there were none (seeds and items both random). p_same: chance of looking
        this alike if the true difference were as large as the margin; same_low, same_high: the interval which that test
        holds against the margin (90 % at a level of 5 %). p_holm, p_same_holm: the two after the correction for all
        comparisons made together (`statistics.corrected`).
    visible: the smallest true difference that a study of this size finds with `power`, at the corrected
    level; None where nothing varied, and noise can't be estimated.
    """

    candidate: str
    reference: str
    task: str = "task"
    metric: str = "score"
    candidate_score: float
    reference_score: float
    difference: float
    low: float
    high: float
    confidence: float
    p: float | None
    p_holm: float | None = None
    p_same: float | None
    p_same_holm: float | None = None
    same_low: float
    same_high: float
    visible: float | None = None  # at a level that `judge` knows
    power: float = 0.8
    margin: float | None
    spread: stats.Spread
    verdict: Verdict
    note: str = ""
    scenario: tuple[str, str] = ("", "")  # model and task, for programs
    better: str = "more"  # or "less", of the metric; the difference is positive where it is better in both cases

    @property
    def seeds(self) -> int:
        """The number of paired seeds."""
        return self.spread.seeds

    @property
    def items(self) -> int:
        """The number of paired test items (1 where the metric has none)."""
        return self.spread.items

    @property
    def sentence(self) -> str:
        """The verdict in words, with the figure, its interval and what the study could have seen."""
        head = f"{self.candidate} against {self.reference} on {self.task}: {self.verdict}"
        figure = f"{'' if self.better == 'more' else 'reduction of '}{self.metric} {self.difference:+.4g}"
        if self.verdict is Verdict.DIVERGED:
            return f"{head}. {self.note}".rstrip()
        if self.verdict is Verdict.ONE_ITEM:
            return f"{head} ({figure} there, {self.seeds} seeds). Give more test items. {self.note}".rstrip()
        if self.verdict is Verdict.ONE_SEED:
            on = f" on {self.items} items" if self.items > 1 else ""
            return (
                f"{head} ({figure}, for these two trained models{on} only). "
                f"Give at least two seeds, better five. {self.note}"
            ).rstrip()
        if self.verdict is Verdict.EQUIVALENT:
            share, low, high, p = 2 * self.confidence - 1, self.same_low, self.same_high, self.p_same_holm
            head += f" of ±{self.margin:.3g}"
            end = f"p of a difference as large as the margin {p:.3g} corrected, {self.seeds} seeds"
        else:
            share, low, high = self.confidence, self.low, self.high
            seen = "" if self.visible is None else f"; minimum detectable effect {self.visible:.3g}"
            end = f"p {self.p_holm:.3g} corrected, {self.seeds} seeds{seen}"
        figure += f", {percent(share)} interval {low:+.4g} to {high:+.4g}"
        return f"{head} ({figure}, {end}). {self.note}".rstrip()


def percent(share: float) -> str:
    """A confidence or a level as people write it: 95%, 99.6%."""
    return f"{100 * share:.4g}%"


def false_alarm(comparisons: Sequence[Comparison], level: float, missing: int = 0) -> float | None:
    """Chance of any false alarm among these comparisons, if there were no difference anywhere and the noise were what
    it was seen to be; None where no noise was seen. It is `level` at most: the interval holds its level everywhere, and
    gives away some of it where seeds and items both matter."""
    many = [c.spread for c in comparisons if c.p is not None]
    chances = [2 * stats.power(0.0, s, level / (len(many) + missing)) for s in many if s.error > 0]
    return 1 - math.prod(1 - chance for chance in chances) if chances else None


def compare_pair(
    candidate: ArrayLike,
    reference: ArrayLike,
    *,
    names: tuple[str, str] = NAMES,
    scale: float = 1.0,
    reach: float | None = None,
    **about: Any,
) -> Comparison:
    """One comparison before correction, from scores [S, N] (higher is better); `about` as in `compare_spread`.

    scale: the order of the scores, see `statistics.spread`. reach: see `statistics.Spread`.
    """
    a, b = stats.table(candidate), stats.table(reference)
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} has scores {a.shape} and {names[1]} {b.shape} on {about.get('task', 'task')}: pairing needs "
            "the same seeds and items."
        )
    spread = replace(stats.spread(a - b, scale), reach=reach)
    return compare_spread(spread, (float(a.mean()), float(b.mean())), names, **about)


def compare_spread(
    s: stats.Spread,
    scores: tuple[float, float],
    names: tuple[str, str],
    *,
    margin: float | None = None,
    confidence: float = 0.95,
    **about: Any,
) -> Comparison:
    """One comparison before correction, from the spread of its differences; pass all of them to `judge`.

    about: further fields of `Comparison`.
    """
    low, high = stats.interval(s, confidence)
    alike = s if margin is None else stats.against_margin(s, margin)
    same_low, same_high = stats.interval(alike, 2 * confidence - 1)
    many = s.seeds > 1
    return Comparison(
        candidate=names[0],
        reference=names[1],
        candidate_score=scores[0],
        reference_score=scores[1],
        difference=s.difference,
        low=low,
        high=high,
        confidence=confidence,
        p=stats.difference_p(s) if many else None,
        p_same=stats.same_p(s, margin) if many and margin is not None else None,
        same_low=same_low,
        same_high=same_high,
        margin=margin,
        spread=s,
        verdict=Verdict.INCONCLUSIVE if many else Verdict.ONE_SEED,
        **about,
    )


def judge(comparisons: Sequence[Comparison], level: float = 0.05, missing: int = 0) -> list[Comparison]:
    """Return verdicts for comparisons that are made together, corrected for their number and for those that are yet to
    come.

    `level` bounds the chance that any of them is wrong: a difference where there is none, or equivalence where the
    difference is as large as the margin (`statistics.corrected`).

    Equivalence comes first: the margin is the user's word for what is too small to matter, so a difference
    that is surely inside it is no victory, however sure its sign. Nor is a significant difference whose estimate lies
    inside the margin, though it may be larger. A comparison without a p gets no verdict, and is not corrected for: it
    keeps the reason that it came with.
    """
    asked = [c for c in comparisons if c.p is not None]
    apart = np.array([c.p for c in asked] + [1.0] * missing, np.float64)
    alike = np.array([math.nan if c.p_same is None else c.p_same for c in asked] + [1.0] * missing)
    corrected = iter(np.transpose(stats.corrected(apart, alike)).tolist())
    judged = []
    for c in comparisons:
        if c.p is None:
            judged.append(c)
            continue
        p, same = next(corrected)
        same = None if c.p_same is None else same
        verdict, note = _verdict(c, p < level, same is not None and same < level)
        note = f"{note} {c.note}".strip()
        visible = stats.smallest_visible(c.spread, level / len(apart), c.power)
        judged.append(replace(c, p_holm=p, p_same_holm=same, verdict=verdict, note=note, visible=visible))
    return judged


def _unvaried(c: Comparison) -> str:
    """Say why an interval without a width decides nothing."""
    if c.spread.error > 0:
        return ""
    few = (
        f"; with {c.items:,} items that happens by chance too often to show equivalence"
        if c.margin and c.items > 1
        else ""
    )
    return f"Both scored the same with every seed and on every item, so the interval has no width{few}."


def _verdict(c: Comparison, significant: bool, same: bool) -> tuple[Verdict, str]:
    sign = "better" if c.difference > 0 else "worse"
    if same:
        return Verdict.EQUIVALENT, f"Significantly {sign}, but by less than the margin." if significant else ""
    if not significant:
        return (Verdict.NOT_SIGNIFICANT if c.margin is None else Verdict.INCONCLUSIVE), _unvaried(c)
    if c.margin is not None and abs(c.difference) < c.margin:
        return Verdict.UNCLEAR, f"The estimate is {sign} by less than the margin of ±{c.margin:.3g}."
    return (Verdict.BETTER if c.difference > 0 else Verdict.WORSE), ""
