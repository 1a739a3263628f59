"""The rule of `dual-lora advise`, alone: every verdict of two methods, with every interval and cost that changes it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dual_lora.lab.advise import advice
from dual_lora.lab.advise.pace import LOOK_LEVEL, LOOKS, Pace, Work, needed_records, settling_length, with_seeds
from dual_lora.lab.advise.rule import QUICKER, SAYS_NOTHING, Recommendation, Rival, Why, recommend
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.metrics import usual_reach
from dual_lora.lab.study.verdicts import Verdict, compare_pair, judge

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
        for lora_failed in (None, Why.NOTHING_LEARNED, Why.DIVERGED):
            found = recommend([one, other], "LoRA", lora_failed)
            chosen = next((r for r in (one, other) if r.name == found.use), None)
            winners = [r for r in (one, other) if r.verdict is Verdict.BETTER and not r.failed]
            assert (found.why is Why.BETTER) == bool(winners)
            if winners:
                assert chosen in winners
                assert chosen.difference == max(r.difference for r in winners)
                continue
            if lora_failed:
                assert found == Recommendation(None, lora_failed)
                continue
            may_gain = [r for r in (one, other) if could_gain(r)]
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
    if r.verdict in (Verdict.WORSE, Verdict.DIVERGED):
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
        (rival(Verdict.UNLEARNED, failed=True), rival(Verdict.WORSE, "loss", failed=True), None),
        (rival(Verdict.INCONCLUSIVE, failed=True), rival(Verdict.WORSE, "loss"), None),
        (rival(Verdict.BETTER, "gain", failed=True), rival(Verdict.WORSE, "loss"), None),
        (rival(Verdict.EQUIVALENT, "open"), rival(Verdict.WORSE, "loss"), None),
    ],
)
def test_examples(dual, no_sign, use):
    assert recommend([dual, no_sign]).use == use


def test_lora_that_learned_nothing_is_not_recommended():
    worse = [rival(Verdict.WORSE, "loss"), rival(Verdict.EQUIVALENT, "small")]
    assert recommend(worse, lora_failed=Why.NOTHING_LEARNED) == Recommendation(None, Why.NOTHING_LEARNED)
    better = [rival(Verdict.BETTER, "gain"), rival(Verdict.WORSE, "loss")]
    assert recommend(better, lora_failed=Why.DIVERGED) == Recommendation("Dual LoRA", Why.BETTER)
    assert recommend([rival(Verdict.BETTER, "gain", failed=True)], lora_failed=Why.DIVERGED).use is None


def test_of_two_better_methods_the_larger_difference_counts():
    two = [rival(Verdict.BETTER, "small"), rival(Verdict.BETTER, "gain", name="no Sign")]
    assert recommend(two).use == "no Sign"
    assert recommend(two[::-1]).use == "no Sign"


def test_how_often_it_is_wrong():
    """On made-up studies of methods that really gain the margin, or nothing, judged as the laboratory judges."""
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


def of_table(dual, lora, margin=MARGIN, metric="exact_match"):
    """The recommendation on two tables of scores, as `dual-lora advise` makes it, and the comparison."""
    about = {"margin": margin, "reach": usual_reach(metric), "metric": metric}
    (c,) = judge([compare_pair(dual, lora, names=("Dual LoRA", "LoRA"), **about)])
    row = dataclasses.asdict(c)
    return recommend([Rival(c.candidate, c.verdict, c.difference, advice.upper(row), margin, 1.4)]), c


@pytest.mark.parametrize("items", [20, 100, 250])
def test_few_items_that_happen_to_agree_rule_nothing_out(items):
    """A hundredth of all items is one that Dual LoRA alone gets right: with so few none may be among them."""
    right = np.ones((5, items))
    found, c = of_table(right, right)
    assert (found.use, found.why, c.high) == (None, Why.OPEN, 0.0)
    found, _ = of_table(np.ones((5, 4000)), np.ones((5, 4000)))
    assert found.use == "LoRA"


@pytest.mark.parametrize("items", [50, 200, 400, 800])
def test_a_gain_on_rare_items_is_ruled_out_seldom(items):
    random, wrong = np.random.default_rng(0), 0
    for _ in range(300):
        hard = random.random((1, items)) < MARGIN
        wrong += of_table(np.ones((5, items)), np.repeat((~hard).astype(float), 5, 0))[0].use == "LoRA"
    assert wrong <= 0.05 * 300 + 2 * (300 * 0.05 * 0.95) ** 0.5


def test_measured_scores_that_agree_are_of_one_function():
    assert of_table(np.ones((5, 20)), np.ones((5, 20)), metric="loss")[0].use == "LoRA"


def test_needed_records_are_just_enough():
    spread = stats.Spread(0.0, 0.02, 0.004, 5, 100)
    records = needed_records(spread, 0.02, 0.025, 0.8)

    def visible(n):
        seed = with_seeds(spread, 20).seed_error
        item = spread.item_error * math.sqrt(spread.items / n)
        return stats.smallest_visible(stats.Spread(0.0, math.hypot(seed, item), seed, 20, n), 0.025, 0.8)

    assert visible(records) <= 0.02 < visible(int(0.85 * records))
    assert needed_records(stats.Spread(0.0, 0.05, 0.049, 5, 100), 0.02, 0.025, 0.8) is None, "seeds vary too much"


def test_too_few_items_are_said_and_not_waited_for():
    """One item of 400 differs: more seeds or minutes would not change that."""
    dual = np.ones((5, 400))
    dual[:, 0] = 0.0
    found, c = of_table(np.ones((5, 400)), dual)
    row = dataclasses.asdict(c)
    rivals = [Rival(c.candidate, c.verdict, c.difference, advice.upper(row), MARGIN, 1.4)]
    study = SimpleNamespace(level=0.05, power=0.8, seeds=[1, 2, 3, 4, 5], overrides={"train": {"steps": 30}})
    minutes, records = advice._needed_minutes_and_records(
        found, rivals, {c.candidate: row}, study, SimpleNamespace(steps=30)
    )
    assert minutes is None
    assert 776 <= records < 1.1 * 776, "(1.96 + 0.84)² (1 - margin) / margin, by the normal distribution"
    sentence = advice._open_reason(rivals, {c.candidate: row}, {}, 20.0, None, records)
    assert "differ on too few test records" in sentence
    assert f"about {records:,} test records" in sentence


@pytest.mark.parametrize(("metric", "items"), [("matthews", 100), ("f1", 100)])
def test_scores_of_right_and_wrong_answers_that_agree_rule_nothing_out_either(metric, items):
    right = np.ones((5, items))
    assert of_table(right, right, margin=0.03, metric=metric)[0].use is None
    assert of_table(np.ones((5, 4000)), np.ones((5, 4000)), margin=0.03, metric=metric)[0].use == "LoRA"


def test_the_records_that_the_page_asks_for_are_what_a_look_needs():
    """Of two methods that agree with LoRA on all records, at a look's level; and with the usual spread."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "advise.md").read_text(encoding="utf-8")
    least, usual = (int(n.replace(",", "")) for n in re.findall(r"(?:at least|some) ([\d,]+) (?:test )?records", page))

    def ruled_out(items):
        about = {"margin": MARGIN, "reach": usual_reach("accuracy"), "confidence": 1 - LOOK_LEVEL}
        right = np.ones((LOOKS[-1], items))
        pairs = judge([compare_pair(right, right, names=(name, "LoRA"), **about) for name in "ab"], LOOK_LEVEL)
        rows = map(dataclasses.asdict, pairs)
        return all(Rival(r["candidate"], r["verdict"], 0.0, advice.upper(r), MARGIN).ruled_out for r in rows)

    assert ruled_out(least)
    assert not ruled_out(int(0.9 * least))

    def settled(items):
        return settling_length(Work((Pace(1.0, 0.1, 0.01),) * 3, 50, items, 100), "accuracy", MARGIN)

    assert settled(usual).seeds == LOOKS[-1]
    assert settled(int(0.8 * usual)) is None
