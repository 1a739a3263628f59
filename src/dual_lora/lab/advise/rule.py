"""The rule from verdicts and cost to a recommendation, and nothing else:

1. A method that is significantly better than LoRA is recommended; of two such, the one with the larger difference.
2. Else LoRA, where a gain that matters (the margin) is ruled out for every other method. A tie goes to LoRA, because it
   costs less; to another method only if that is equivalent and its step takes `QUICKER` times LoRA's time or less.
3. Else nothing is known yet.

A method that has not learned the task, or of which a run diverged, is never recommended. Where LoRA is such a method,
nothing is known of a gain either.

A gain is ruled out where a method is significantly worse, or none of its runs came to an end, or by the upper end of
the interval where that lies below the margin: half of a look's level for each of two methods, so that LoRA too is
recommended wrongly in 5 % of studies at most, all looks together. For shares of right answers the interval has a least
width (`advice.upper`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from dual_lora.lab.study.verdicts import Verdict

QUICKER = 0.9  # a step's time, as a multiple of LoRA's: less of a saving is not worth another method
SAYS_NOTHING = (Verdict.ONE_SEED, Verdict.ONE_ITEM, Verdict.UNLEARNED, Verdict.DIVERGED)


class Why(StrEnum):
    """The reason for a recommendation."""

    BETTER = "significantly better than LoRA"
    QUICKER = "equivalent to LoRA and quicker"
    NO_GAIN = "no other method gains what matters"
    OPEN = "a gain that matters may exist"
    NOTHING_LEARNED = "LoRA did not learn the task"
    DIVERGED = "runs of LoRA diverged"


@dataclass(frozen=True)
class Rival:
    """A method that was compared with LoRA. difference, high: how much better it is, and the upper end of the interval,
    None where it has no score. time: of its step, as a multiple of LoRA's; None if unknown. failed: it has not learned
    the task, or a run of it diverged.
    """

    name: str
    verdict: Verdict
    difference: float | None
    high: float | None
    margin: float
    time: float | None = None
    failed: bool = False

    @property
    def ruled_out(self) -> bool:
        """Whether it surely gains less than the margin."""
        if self.verdict in (Verdict.WORSE, Verdict.DIVERGED):
            return True
        return self.verdict not in SAYS_NOTHING and self.high is not None and self.high < self.margin


@dataclass(frozen=True)
class Recommendation:
    """The method to use, None if that is not known, and why."""

    use: str | None
    why: Why


def recommend(rivals: Sequence[Rival], lora: str = "LoRA", lora_failed: Why | None = None) -> Recommendation:
    """The module's rule. lora: the name of the method that all others were compared with; lora_failed: in what way."""
    better = [r for r in rivals if r.verdict is Verdict.BETTER and not r.failed]
    if better:
        return Recommendation(max(better, key=lambda r: r.difference or 0.0).name, Why.BETTER)
    if lora_failed is not None:
        return Recommendation(None, lora_failed)
    if not all(r.ruled_out for r in rivals):
        return Recommendation(None, Why.OPEN)
    alike = [r for r in rivals if r.verdict is Verdict.EQUIVALENT and not r.failed]
    quick = [(r.time, r.name) for r in alike if r.time is not None and r.time <= QUICKER]
    return Recommendation(min(quick)[1], Why.QUICKER) if quick else Recommendation(lora, Why.NO_GAIN)
