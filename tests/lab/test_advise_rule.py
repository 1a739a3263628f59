"""The rule of `dual-lora advise`, alone: every verdict of two methods, with every interval and cost that changes it."""

from __future__ import annotations

import itertools

import pytest

from dual_lora.lab.advise.rule import QUICKER, SAYS_NOTHING, Recommendation, Rival, Why, recommend
from dual_lora.lab.study.verdicts import Verdict

MARGIN = 0.01
FIGURES = {"gain": (0.02, 0.05), "small": (0.002, 0.009), "loss": (-0.03, -0.01), "open": (-0.002, 0.02)}


def rival(verdict, figures="open", time=1.4, failed=False, name="Dual LoRA"):
    difference, high = (None, None) if verdict is Verdict.DIVERGED else FIGURES[figures]
    return Rival(name, verdict, difference, high, MARGIN, time, failed)


ALL = [
    rival(verdict, figures, time, failed)
    for verdict in Verdict
    for figures in FIGURES
    for time in (None, QUICKER - 0.01, QUICKER + 0.01, 1.4)
    for failed in (False, True)
]


def test_every_combination():
    """What may be recommended is said here in other words than the rule's."""
    for one, other in itertools.product(ALL, ALL):
        other = Rival("no Sign", *[getattr(other, name) for name in list(other.__dataclass_fields__)[1:]])
        for lora_failed in (False, True):
            found = recommend([one, other], "LoRA", lora_failed)
            chosen = next((r for r in (one, other) if r.name == found.use), None)
            winners = [r for r in (one, other) if r.verdict is Verdict.BETTER and not r.failed]
            assert (found.why is Why.BETTER) == bool(winners)
            if winners:
                assert chosen in winners
                assert chosen.difference == max(r.difference for r in winners)
                continue
            if lora_failed:
                assert found == Recommendation(None, Why.NOTHING_LEARNED)
                continue
            may_gain = [r for r in (one, other) if not r.failed and could_gain(r)]
            assert (found.use is None) == bool(may_gain)
            if chosen is not None:
                assert (chosen.verdict, chosen.failed) == (Verdict.EQUIVALENT, False)
                assert chosen.time <= QUICKER
            elif found.use == "LoRA":
                assert not [
                    r
                    for r in (one, other)
                    if r.verdict is Verdict.EQUIVALENT and not r.failed and r.time is not None and r.time <= QUICKER
                ]


def could_gain(r):
    if r.verdict in (Verdict.WORSE, Verdict.EQUIVALENT):
        return False
    return r.verdict in SAYS_NOTHING or r.high is None or r.high >= MARGIN


@pytest.mark.parametrize(
    ("dual", "no_sign", "use"),
    [
        (rival(Verdict.BETTER, "gain"), rival(Verdict.INCONCLUSIVE), "Dual LoRA"),
        (rival(Verdict.BETTER, "gain", time=9.0), rival(Verdict.WORSE, "loss"), "Dual LoRA"),
        (rival(Verdict.EQUIVALENT, "small"), rival(Verdict.WORSE, "loss"), "LoRA"),
        (rival(Verdict.EQUIVALENT, "small", time=None), rival(Verdict.EQUIVALENT, "small"), "LoRA"),
        (rival(Verdict.EQUIVALENT, "small", time=0.7), rival(Verdict.WORSE, "loss"), "Dual LoRA"),
        (rival(Verdict.EQUIVALENT, "small", time=0.7), rival(Verdict.INCONCLUSIVE), None),
        (rival(Verdict.INCONCLUSIVE), rival(Verdict.WORSE, "loss"), None),
        (rival(Verdict.INCONCLUSIVE, "small"), rival(Verdict.WORSE, "loss"), "LoRA"),
        (rival(Verdict.UNCLEAR, "gain"), rival(Verdict.WORSE, "loss"), None),
        (rival(Verdict.UNCLEAR, "loss"), rival(Verdict.WORSE, "loss"), "LoRA"),
        (rival(Verdict.ONE_SEED, "loss"), rival(Verdict.ONE_SEED, "loss"), None),
        (rival(Verdict.DIVERGED, failed=True), rival(Verdict.WORSE, "loss"), "LoRA"),
        (rival(Verdict.UNLEARNED, failed=True), rival(Verdict.UNLEARNED, failed=True), "LoRA"),
    ],
)
def test_examples(dual, no_sign, use):
    assert recommend([dual, no_sign]).use == use


def test_lora_that_learned_nothing_is_not_recommended():
    worse = [rival(Verdict.WORSE, "loss"), rival(Verdict.EQUIVALENT, "small")]
    assert recommend(worse, lora_failed=True) == Recommendation(None, Why.NOTHING_LEARNED)
    better = [rival(Verdict.BETTER, "gain"), rival(Verdict.WORSE, "loss")]
    assert recommend(better, lora_failed=True) == Recommendation("Dual LoRA", Why.BETTER)
    assert recommend([rival(Verdict.BETTER, "gain", failed=True)], lora_failed=True).use is None


def test_of_two_better_methods_the_larger_difference_counts():
    two = [rival(Verdict.BETTER, "small"), rival(Verdict.BETTER, "gain", name="no Sign")]
    assert recommend(two).use == "no Sign"
    assert recommend(two[::-1]).use == "no Sign"


def test_how_often_it_is_wrong():
    """On made-up studies of methods that really gain the margin, or nothing, judged as the laboratory judges."""
    import numpy as np

    from dual_lora.lab.study.verdicts import compare_pair, judge

    random, wrong, said = np.random.default_rng(0), {0.0: 0, MARGIN: 0}, {0.0: 0, MARGIN: 0}
    for true, _ in itertools.product(wrong, range(300)):
        pairs = []
        for name in ("Dual LoRA", "no Sign"):
            seeds, items = random.normal(0, 0.004, (5, 1)), random.normal(0, 0.1, (1, 400))
            d = true + seeds + items + random.normal(0, 0.05, (5, 400))
            pairs.append(compare_pair(d, np.zeros_like(d), names=(name, "LoRA"), margin=MARGIN))
        rivals = [Rival(c.candidate, c.verdict, c.difference, c.high, MARGIN, 1.4) for c in judge(pairs)]
        use = recommend(rivals).use
        said[true] += use is not None
        wrong[true] += use is not None and (use == "LoRA") == (true == MARGIN)
    assert max(wrong.values()) <= 0.05 * 300 + 2 * (300 * 0.05 * 0.95) ** 0.5, wrong
    assert said[0.0] > 20, "a rule that never says anything is never wrong"
