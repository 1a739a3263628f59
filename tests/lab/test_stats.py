"""The statistics keep their word: false alarms at their level, power as stated, one seed no winner."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study import verdicts

# Where the noise sits: (seed, item, rest). The last is what accuracies of two good models look like.
NOISES = {
    "seeds": (1.0, 0.0, 0.3),
    "items": (0.0, 1.0, 0.3),
    "rest": (0.0, 0.0, 1.0),
    "mixed": (0.1, 0.5, 1.0),
}


def draw(random, seeds, items, noise, shift=0.0, studies=()):
    """Differences [*studies, seeds, items] of the crossed model with a known true difference."""
    by_seed, by_item, rest = noise
    return (
        shift
        + by_seed * random.standard_normal((*studies, seeds, 1))
        + by_item * random.standard_normal((*studies, 1, items))
        + rest * random.standard_normal((*studies, seeds, items))
    )


def halves(d, level):
    """Means of the tables d [studies, S, N] and the half-widths of their intervals."""
    mean, error, seed_error = stats.error_parts(d)
    return mean, stats.half_width(level, seed_error, np.sqrt(error**2 - seed_error**2), *d.shape[1:])


def significant(d, level=0.05):
    """Which of the tables d [studies, S, N] are significantly more or less than 0."""
    mean, half = halves(d, level)
    return np.abs(mean) > half


def rate(hits):
    """The share of hits, and the half-width of 3 standard errors of it at a true rate of 5 %."""
    return np.mean(hits), 3 * np.sqrt(0.05 * 0.95 / len(hits))


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("noise", NOISES)
def test_false_alarms_stay_at_the_level(noise, seeds):
    random = np.random.default_rng(seeds)
    share, slack = rate(significant(draw(random, seeds, 60, NOISES[noise], studies=(4000,))))
    assert share < 0.05 + slack, f"{share:.3f} false alarms at a level of 0.05"
    assert noise in ("rest", "mixed") or seeds == 2 or share > 0.05 - 2 * slack, f"{share:.3f}: needlessly timid"


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_alarms_with_right_and_wrong_answers(seeds):
    """Items are 0 or 1, items differ in difficulty, and training runs differ in luck."""
    random = np.random.default_rng(seeds)
    ease = random.normal(1.0, 1.5, (1, 3000, 1, 120))
    luck = random.normal(0.0, 0.3, (2, 3000, seeds, 1))
    right = random.random((2, 3000, seeds, 120)) < 1 / (1 + np.exp(-(ease + luck)))
    share, slack = rate(significant(right[0].astype(float) - right[1]))
    assert share < 0.05 + slack


def crossed(random, studies, seeds, items, seed_square, item_square):
    """Tables [studies, seeds, items] whose mean squares are in these ratios to the rest's, without any difference."""
    by_seed, by_item = np.sqrt((seed_square - 1) / items), np.sqrt((item_square - 1) / seeds)
    d = random.standard_normal((studies, seeds, items))
    d += by_seed * random.standard_normal((studies, seeds, 1))
    return d + by_item * random.standard_normal((studies, 1, items))


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize(("seed_square", "item_square"), [(1, 1), (4, 1), (4, 4), (20, 10), (700, 1)])
def test_false_alarms_stay_at_the_level_of_ten_comparisons(seeds, seed_square, item_square):
    """One pooled error takes the items' degrees of freedom where few seeds agree, and has up to 19 times this level."""
    random = np.random.default_rng(21)
    d = crossed(random, 20_000, seeds, 30, seed_square, item_square)
    for level in (0.05, 0.005):
        share = np.mean(significant(d, level))
        assert share < level + 3 * np.sqrt(level / len(d)), f"{share:.4f} false alarms at a level of {level}"


def test_verdict_of_a_crossed_null_with_three_seeds():
    random = np.random.default_rng(22)
    p = [stats.difference_p(stats.spread(d)) for d in crossed(random, 500, 3, 40, 4, 1)]
    assert np.mean(np.array(p) < 0.005) < 0.005 + 3 * np.sqrt(0.005 / 500)


@pytest.mark.parametrize("seeds", [2, 5])
def test_p_interval_and_equivalence_are_one_rule(seeds):
    s = stats.spread(draw(np.random.default_rng(seeds), seeds, 30, NOISES["mixed"], 0.3))
    p = stats.difference_p(s)
    assert stats.interval(s, 1 - p)[0] == pytest.approx(0, abs=1e-9)
    same = stats.same_p(s, 3.0)
    low, high = stats.interval(s, 1 - 2 * same)
    assert max(abs(low), abs(high)) == pytest.approx(3.0)
    many = stats.error_parts(np.stack([draw(np.random.default_rng(seeds), seeds, 30, NOISES["mixed"], 0.3)] * 2))
    assert [float(v[1]) for v in many] == pytest.approx([s.difference, s.error, s.seed_error])


def test_seeds_with_the_same_mean_are_no_proof_of_little_noise():
    """Two runs that get 7 of 20 right each, other ones each time."""
    d = np.zeros((2, 20))
    d[0, :7] = d[1, 10:17] = 1.0
    assert stats.difference_p(stats.spread(d)) > 0.1


def test_two_seeds_that_agree_on_every_item_are_no_proof():
    """Runs that give every item one answer: two such seeds of each method made 9 % of studies err in place of 5 %."""
    right = np.arange(240) % 8 < 5
    d = np.array([right.astype(float) - ~right] * 2)  # all are called true by one method, and false by the other
    assert stats.difference_p(stats.spread(d)) > 0.05
    assert stats.spread(d).seed_error == pytest.approx(0.25 / 2)
    assert stats.difference_p(stats.spread(np.repeat(d[:1], 3, axis=0))) < 0.05


def test_error_parts_are_the_two_way_table_s():
    """Clark 1973, with the mean squares written out."""
    d = draw(np.random.default_rng(1), 3, 5, (2.0, 2.0, 1.0), shift=1.5)
    S, N = d.shape
    rows, columns, mean = d.mean(1), d.mean(0), d.mean()
    left = [d[s, i] - rows[s] - columns[i] + mean for s in range(S) for i in range(N)]
    seeds, items = N * sum((rows - mean) ** 2) / (S - 1), S * sum((columns - mean) ** 2) / (N - 1)
    rest = sum(x * x for x in left) / ((S - 1) * (N - 1))
    assert seeds > 2 * rest < items, "or the larger mean square alone would be taken"
    found = stats.spread(d)
    assert found.difference == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt((seeds + items - rest) / (S * N)))
    assert found.seed_error == pytest.approx(math.sqrt(seeds / (S * N)))


@pytest.mark.parametrize(("seed_error", "df"), [(0.0, 199), (0.1, 4)], ids=["all items'", "all seeds'"])
def test_an_error_of_one_part_has_that_part_s_degrees_of_freedom(seed_error, df):
    s = stats.Spread(0.3, 0.1, seed_error, 5, 200)
    assert stats.difference_p(s) == pytest.approx(2 * scipy_stats.t.sf(3, df), rel=1e-5)
    half = scipy_stats.t.isf(0.025, df) * 0.1
    assert stats.interval(s, 0.95) == pytest.approx((0.3 - half, 0.3 + half))


def test_without_any_error_a_difference_is_certain():
    assert stats.difference_p(stats.Spread(0.1, 0.0, 0.0, 3, 10)) == 0.0
    assert stats.difference_p(stats.Spread(0.0, 0.0, 0.0, 3, 10)) == 1.0


def test_power_by_hand_where_only_items_vary():
    half = scipy_stats.t.isf(0.025, 199) * 0.1
    found = stats.power(0.3, stats.Spread(0.0, 0.1, 0.0, 5, 200), 0.05)
    assert found == pytest.approx(scipy_stats.norm.cdf((0.3 - half) / 0.1))


def test_one_seed_s_sentence_names_its_items_where_there_are_several():
    random = np.random.default_rng(0)
    for items, said in ((7, "two trained models on 7 items only"), (1, "two trained models only")):
        pair = verdicts.compare_pair(random.random((1, items)), random.random((1, items)))
        assert said in verdicts.judge([pair])[0].sentence


def test_a_margin_that_no_answers_can_reach():
    assert stats.same_p(stats.Spread(0.0, 0.0, 0.0, 3, 10, 1.0), 2.0) == 0.0


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("items", [60, 230, 340])
def test_equivalent_is_right_at_any_level_where_each_answer_that_differs_is_better(level, items):
    """By the binomial itself: all runs agree, and a share of the margin is better. At 0.2 a third was wrong."""
    margin, wrong = 0.01, 0.0
    for better in range(items):
        d = np.zeros((3, items))
        d[:, :better] = 1
        if stats.same_p(dataclasses.replace(stats.spread(d), reach=1.0), margin) > level:
            break
        wrong += scipy_stats.binom.pmf(better, items, margin)
    assert wrong <= level


@pytest.mark.parametrize(("items", "share"), [((50, 500), 0.02), ((20, 400), 0.02), ((71, 3270), 0.005)])
def test_no_difference_is_found_where_a_small_set_takes_back_what_a_large_one_gains(items, share):
    """As many are worse in the small set as are better in the large one, all the same in every run, by the binomials.

    Where none of the small set was among the items, the difference was "significant": in up to 70 % of studies.
    """
    small, large = items
    wrong, total = 0.0, small + large
    for worse in range(6):
        for better in range(large // 10):
            chance = scipy_stats.binom.pmf(worse, small, share) * scipy_stats.binom.pmf(better, large, share)
            if chance < 1e-4:
                continue
            d = np.zeros((2, total))
            d[:, :worse] = -total / small / 2
            d[:, small : small + better] = total / large / 2
            s = dataclasses.replace(stats.spread(d), seeds=5, reach=total / small / 2)
            wrong += chance * (stats.difference_p(s) < 0.05)
    assert wrong < 0.05


def test_two_answers_are_no_difference():
    """Right on both, in every run, where the other method is wrong."""
    assert stats.difference_p(dataclasses.replace(stats.spread(np.ones((3, 2))), reach=1.0)) == 0.5


def test_one_seed_has_the_items_error_alone():
    d = np.array([[0.0, 1.0, 0.0, 1.0]])
    assert stats.spread(d) == stats.Spread(0.5, d.std(ddof=1) / 2, 0.0, 1, 4)
    assert stats.spread(np.full((1, 4), 0.5)) == stats.Spread(0.5, 0.0, 0.0, 1, 4)


def test_a_difference_beyond_the_margin_does_not_look_alike():
    s = stats.Spread(0.5, 0.1, 0.1, 5, 100)
    assert stats.same_p(s, 0.4) == pytest.approx(scipy_stats.t.cdf(1, 4))
    assert stats.same_p(s, 0.6) == pytest.approx(scipy_stats.t.sf(1, 4))


def test_two_seeds_can_find_a_difference():
    assert stats.smallest_visible(stats.Spread(0.0, 0.1, 0.1, 2, 100), 0.05, 0.8) > 1, "a t quantile of 12.7"
    assert stats.smallest_visible(stats.Spread(0.0, 0.1, 0.0, 1, 100), 0.05, 0.8) is None


def test_rounding_grows_with_the_scores():
    d = np.array([[1e6, 1e6 + 1e-9], [1e6, 1e6]])
    assert stats.spread(d).error == pytest.approx(1e6 / 4), "one difference that was seen four times, no noise of 1e-9"


def test_errors_do_not_depend_on_the_difference():
    d = draw(np.random.default_rng(0), 4, 6, NOISES["mixed"])
    mean, error, seed_error = stats.error_parts(d)
    moved = stats.error_parts(d + 7)
    np.testing.assert_allclose(moved, (mean + 7, error, seed_error), rtol=1e-9)


@pytest.mark.parametrize("noise", NOISES)
def test_intervals_cover_the_truth(noise):
    random = np.random.default_rng(1)
    mean, half = halves(draw(random, 4, 40, NOISES[noise], 0.7, (3000,)), 0.05)
    assert np.mean(np.abs(mean - 0.7) <= half) > 0.95 - 3 * np.sqrt(0.05 * 0.95 / 3000)


@pytest.mark.parametrize(("seeds", "noise"), [(3, "items"), (5, "seeds"), (5, "mixed"), (8, "seeds")])
def test_power_is_as_stated(seeds, noise):
    """A difference of the visible size, computed from the true noise, is found as often as promised."""
    random = np.random.default_rng(2)
    by_seed, by_item, rest = NOISES[noise]
    items = 80
    seed_error = np.sqrt(by_seed**2 / seeds + rest**2 / (seeds * items))
    error = np.sqrt(seed_error**2 + by_item**2 / items)
    size = stats.smallest_visible(stats.Spread(0.0, error, seed_error, seeds, items), 0.05, 0.8)
    mean, half = halves(draw(random, seeds, items, NOISES[noise], size, (3000,)), 0.05)
    assert 0.77 < np.mean(mean > half) < 0.83


def test_power_matches_simulated_t_test():
    random = np.random.default_rng(3)
    x = random.normal(1.2, 1.0, (20000, 6))
    found = np.mean((scipy_stats.ttest_1samp(x, 0, axis=1).pvalue < 0.05) & (x.mean(1) > 0))
    error = 1 / np.sqrt(6)
    assert stats.power(1.2, stats.Spread(0.0, error, error, 6, 1), 0.05) == pytest.approx(found, abs=0.012)


def test_the_level_that_a_study_really_has():
    """Where seeds are all the noise it is the nominal one; where both parts matter some of it is given away."""
    pairs = [verdicts.compare_pair(np.zeros((5, 2)), np.ones((5, 2))) for _ in range(4)]
    assert verdicts.false_alarm([dataclasses.replace(c, spread=stats.Spread(0, 1, 1, 5, 50)) for c in pairs], 0.05) == (
        pytest.approx(1 - (1 - 0.05 / 4) ** 4, rel=0.02)
    )
    both = [dataclasses.replace(c, spread=stats.Spread(0, 1, np.sqrt(0.5), 5, 50)) for c in pairs]
    assert 0.01 < verdicts.false_alarm(both, 0.05) < 0.03
    assert verdicts.false_alarm([], 0.05) is None


def test_equivalence_is_claimed_wrongly_at_most_at_the_level():
    """The true difference sits exactly at the margin."""
    random = np.random.default_rng(4)
    mean, half = halves(draw(random, 5, 60, NOISES["mixed"], 0.2, (4000,)), 0.1)
    share, slack = rate(np.abs(mean) + half < 0.2)
    assert share < 0.05 + slack


@pytest.mark.parametrize(("seeds", "items", "noise"), [(3, 400, 0.0), (8, 400, 0.0), (8, 300, 0.01), (20, 400, 0.01)])
def test_equivalence_holds_its_level_where_all_answers_that_differ_are_better(seeds, items, noise):
    """To see few of them is luck, by a binomial. Without a least error: 8 to 20 %, also with noise in each run."""
    random, margin, studies = np.random.default_rng(seeds), 0.01, 2000
    better = np.broadcast_to(random.random((studies, 1, items)) < margin, (studies, seeds, items)).astype(float)
    noisy = random.random(better.shape) < noise
    wrong = plain = 0
    for d in np.where(noisy, random.choice([-1.0, 1.0], better.shape), better):
        s = stats.spread(d)
        plain += stats.same_p(s, margin) < 0.05
        wrong += stats.same_p(dataclasses.replace(s, reach=1.0), margin) < 0.05
    assert wrong / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert plain / studies > 0.08, "what the rule is for"


def test_the_least_error_against_a_margin():
    """3 of 400 answers are better, the same in each of 4 runs: by 0.0075, and a difference of 0.02 is 8 of 400."""
    d = np.zeros((4, 400))
    d[:, :3] = 1.0
    s = dataclasses.replace(stats.spread(d), reach=1.0)
    wider = stats.against_margin(s, 0.02)
    assert wider.item_error == pytest.approx(math.sqrt(0.02 * 0.98 / 400))
    assert (wider.seed_error, wider.difference) == (s.seed_error, s.difference)
    assert stats.against_margin(s, 0.005) == s, "a smaller difference takes no more answers than were seen"
    assert stats.against_margin(dataclasses.replace(s, reach=5.0), 0.02).item_error == pytest.approx(
        math.sqrt(0.02 * 4.98 / 400)
    )
    two, one = (stats.Spread(0.0, 0.0, 0.0, 4, items, reach=1.0) for items in (2, 1))
    assert stats.against_margin(two, 0.02).item_error == pytest.approx(math.sqrt(0.02 * 0.98 / 2))
    assert stats.against_margin(one, 0.02) == one, "one item has no spread over items"
    pair = verdicts.compare_pair(d, np.zeros_like(d), margin=0.02, reach=1.0)
    assert (pair.same_low, pair.same_high) == pytest.approx(stats.interval(wider, 0.9))
    assert (pair.low, pair.high) == pytest.approx(stats.interval(s, 0.95)), "no difference is another question"
    assert (pair.p_same < 0.05) == (pair.same_high < 0.02)
    measured = verdicts.compare_pair(d, np.zeros_like(d), margin=0.02)
    assert (measured.same_low, measured.same_high) == pytest.approx(stats.interval(s, 0.9))


def test_an_error_that_is_large_enough_stays_to_the_last_bit():
    """The root of a square's difference, squared and added again, is often another number."""
    random = np.random.default_rng(0)
    for parts in 0.01 + random.random((200, 2)):
        s = stats.Spread(0.0, math.hypot(*parts), parts[0], 5, 400, 1.0)
        assert stats.against_margin(s, 1e-4) is s


def test_scores_of_whole_test_sets_that_agree_prove_nothing():
    whole = stats.Spread(0.001, 0.001, 0.001, 5, 1)
    assert stats.same_p(whole, 0.01) < 0.05, "they may vary, and agree within the margin"
    for margin in (0.5, 1.0, 3.0):
        assert stats.same_p(dataclasses.replace(whole, difference=0.0, error=0.0, seed_error=0.0), margin) == 1.0


def test_p_is_never_below_the_chance_that_no_answer_that_differs_is_seen():
    """By Student's t alone 280 answers that agree would have 0.046."""
    agree = dataclasses.replace(stats.spread(np.zeros((3, 280))), reach=1.0)
    assert stats.same_p(agree, 0.01) == pytest.approx(0.99**280)
    assert stats.same_p(dataclasses.replace(agree, reach=5.5), 0.01) == pytest.approx((1 - 0.01 / 5.5) ** 280)


def test_one_answer_of_two_runs_on_many_items_is_no_doubt():
    d = np.zeros((2, 1821))
    d[0, 0] = 1.0
    assert stats.same_p(dataclasses.replace(stats.spread(d), reach=1.0), 0.01) < 0.02


@pytest.mark.parametrize(("seeds", "unseen"), [(3, 0.67), (5, 0.51), (8, 0.34)])
def test_a_failure_that_no_seed_shows_is_not_counted(seeds, unseen):
    """As the page on calibration says: no promise of 5 %, but the chance that none of the runs fails."""
    random, found = np.random.default_rng(0), 0
    right = random.random((2, seeds, 200)) < 0.02
    for fails in random.random((400, seeds)) < 1 / 8:
        a = np.where(fails[:, None], random.random((seeds, 200)) < 0.5, right[0])
        (c,) = verdicts.judge([verdicts.compare_pair(a, right[1], margin=0.05, reach=1.0)])
        found += c.verdict is verdicts.Verdict.EQUIVALENT
    assert found / 400 == pytest.approx(unseen, abs=0.08)


def test_family_of_comparisons_keeps_the_level():
    """The chance of any winner among eight candidates that are all alike stays at 5 %."""
    random = np.random.default_rng(5)
    any_hit, any_plain = [], []
    for _ in range(150):
        reference = draw(random, 4, 40, NOISES["seeds"])
        p = [stats.difference_p(stats.spread(draw(random, 4, 40, NOISES["seeds"]) - reference)) for _ in range(8)]
        any_hit.append(stats.corrected(p, np.nan)[0].min() < 0.05)
        any_plain.append(min(p) < 0.05)
    assert np.mean(any_hit) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)
    assert np.mean(any_plain) > 2 * 0.05


def test_a_difference_without_any_error_is_certain():
    """Of a spread that is given so: no table of scores makes one, and no published result holds one."""
    assert stats.difference_p(stats.Spread(0.01, 0.0, 0.0, 3, 10)) == 0.0
    assert stats.difference_p(stats.Spread(0.0, 0.0, 0.0, 3, 10)) == 1.0


def test_no_comparison_has_no_correction():
    assert [x.tolist() for x in stats.corrected([], [])] == [[], []]


def test_differences_and_equivalences_are_one_family():
    """Of a comparison's two hypotheses one may be true, so one that is found different gives nothing to the others."""
    apart, alike = stats.corrected([0.001, 0.02, 0.5], [1.0, 1.0, 0.03])
    assert apart == pytest.approx([0.003, 0.06, 1.0])
    assert alike == pytest.approx([1.0, 1.0, 0.09])
    apart, alike = stats.corrected([0.001, 0.03], [0.002, 1.0])  # different, and by less than the margin: it is done
    assert (*apart, *alike) == pytest.approx((0.002, 0.03, 0.004, 1.0))
    apart, alike = stats.corrected([0.001, 0.03], [np.nan, 1.0])  # as where equivalence is not asked
    assert apart == pytest.approx([0.002, 0.03])
    assert np.isnan(alike[0])
    random = np.random.default_rng(0)
    many = random.random((2, 50, 4))
    for p, p_same, *together in zip(*many, *stats.corrected(*many), strict=True):
        assert np.array(together) == pytest.approx(np.array(stats.corrected(p, p_same)))


def test_spread_with_one_item_is_the_paired_t_test():
    random = np.random.default_rng(6)
    a, b = random.normal(size=7), random.normal(size=7)
    ours = stats.difference_p(stats.spread(a - b))
    assert ours == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)


def run_family(shift=0.0, seeds=5, margin=None, items=200):
    random = np.random.default_rng(7)
    base = random.random((seeds, items))
    noise = 0.05 * random.standard_normal((seeds, items))
    pair = verdicts.compare_pair(
        base + shift + noise, base, names=("dual", "lora"), task="cola", metric="accuracy", margin=margin
    )
    return verdicts.judge([pair])[0]


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [
        (0.1, None, verdicts.Verdict.BETTER),
        (-0.1, 0.02, verdicts.Verdict.WORSE),
        (0.0, 0.02, verdicts.Verdict.EQUIVALENT),
        (0.0, None, verdicts.Verdict.NOT_SIGNIFICANT),
        (0.01, 0.05, verdicts.Verdict.EQUIVALENT),
    ],
)
def test_verdicts(shift, margin, verdict):
    judged = run_family(shift, margin=margin)
    assert judged.verdict is verdict
    assert str(verdict) in judged.sentence
    assert "dual against lora on cola" in judged.sentence
    assert judged.low <= judged.difference <= judged.high


def test_a_significant_difference_inside_the_margin_is_said():
    assert "Significantly better, but by less than the margin." in run_family(0.01, margin=0.05).sentence


def test_a_significant_difference_that_may_be_larger_than_the_margin_has_no_size():
    judged = run_family(-0.0095, margin=0.01)
    assert judged.low < -0.01 < judged.high < 0
    assert judged.verdict is verdicts.Verdict.UNCLEAR
    assert judged.note == "The estimate is worse by less than the margin of ±0.01."
    assert run_family(-0.0095, margin=0.009).verdict is verdicts.Verdict.WORSE


def test_equivalence_shows_the_interval_that_it_is_judged_by():
    judged = run_family(0.0, margin=0.02)
    low, high = stats.interval(judged.spread, 0.9)
    assert (judged.same_low, judged.same_high) == pytest.approx((low, high))
    assert judged.low < low < high < judged.high
    assert f", 90% interval {low:+.4g} to {high:+.4g}" in judged.sentence
    assert "95%" not in judged.sentence


def test_one_seed_never_has_a_winner():
    judged = run_family(shift=10.0, seeds=1, margin=0.5)
    assert judged.verdict is verdicts.Verdict.ONE_SEED
    assert judged.p is None
    assert judged.visible is None
    assert "Give at least two seeds" in judged.sentence


def test_more_comparisons_make_smaller_things_invisible():
    random = np.random.default_rng(8)
    pairs = [
        verdicts.compare_pair(random.random((3, 50)), random.random((3, 50)), names=(str(i), "x")) for i in range(4)
    ]
    alone = verdicts.judge(pairs[:1])[0]
    family = verdicts.judge(pairs)[0]
    assert family.visible > alone.visible


def test_identical_runs():
    scores = np.ones((3, 10))
    judged = verdicts.judge([verdicts.compare_pair(scores, scores, margin=0.01)])[0]
    assert judged.verdict is verdicts.Verdict.EQUIVALENT
    assert judged.p == 1.0
    assert judged.low == judged.high == 0.0
    assert judged.visible is None, "nothing varied: there is no noise to judge by"
    assert verdicts.false_alarm([judged], 0.05) is None
    assert "100% interval" not in judged.sentence
    assert ", 90% interval +0 to +0" in judged.sentence


@pytest.mark.parametrize(("seeds", "items"), [(2, 1), (2, 2), (3, 1)])
def test_a_few_answers_that_all_agree_prove_nothing(seeds, items):
    """No spread was seen, but it was looked for in hardly anything."""
    right, wrong = np.ones((seeds, items)), np.zeros((seeds, items))
    apart = verdicts.judge([verdicts.compare_pair(right, wrong, margin=0.02, reach=1.0)])[0]
    assert apart.verdict is verdicts.Verdict.INCONCLUSIVE
    assert apart.low < 0 < 1 < apart.high
    alike = verdicts.judge([verdicts.compare_pair(wrong, wrong, margin=0.02, reach=1.0)])[0]
    assert alike.verdict is verdicts.Verdict.INCONCLUSIVE
    assert alike.p_same == pytest.approx(0.98**items)


def test_many_answers_that_all_agree_are_a_verdict():
    right, wrong = np.ones((3, 200)), np.zeros((3, 200))
    apart, alike = verdicts.judge(
        [
            verdicts.compare_pair(right, b, margin=0.02, reach=1.0, names=(n, "b"))
            for n, b in (("x", wrong), ("y", right))
        ]
    )
    assert apart.verdict is verdicts.Verdict.BETTER
    assert alike.verdict is verdicts.Verdict.EQUIVALENT


def test_rounding_is_no_difference():
    a, b = np.full((3, 10), 0.1 + 0.2), np.full((3, 10), 0.3)
    judged = verdicts.judge([verdicts.compare_pair(a, b, margin=0.01)])[0]
    assert (judged.difference, judged.p) == (0.0, 1.0)
    assert "ignificantly" not in judged.sentence


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [1, 2, 7])
@pytest.mark.parametrize("values", [(0.0, 0.0), (1.0, 0.0), (0.1, 0.0), (0.3, 0.1), (70.123, 12.3)])
def test_constant_scores_always_give_finite_figures(seeds, items, values):
    a, b = (np.full((seeds, items), v) for v in values)
    judged = verdicts.judge([verdicts.compare_pair(a, b, margin=0.02)])[0]
    assert np.isfinite([judged.low, judged.high, judged.difference]).all()
    assert judged.low <= judged.difference <= judged.high
    assert "nan" not in judged.sentence


def test_differences_that_cancel_are_not_taken_for_none():
    swapped = np.array([[1.0, -1.0], [-1.0, 1.0]])
    judged = verdicts.judge([verdicts.compare_pair(swapped, 0 * swapped, margin=0.02)])[0]
    assert judged.verdict is verdicts.Verdict.INCONCLUSIVE
    assert judged.difference == 0
    assert judged.low < -0.5
    assert judged.high > 0.5


def test_one_seed_differs_from_all_others():
    d = np.zeros((5, 30))
    d[3] = 0.1
    judged = verdicts.judge([verdicts.compare_pair(d, 0 * d, margin=0.2)])[0]
    assert judged.p == pytest.approx(scipy_stats.ttest_1samp(d.mean(1), 0).pvalue)


def test_what_came_without_a_p_keeps_its_reason_and_costs_the_others_nothing():
    random = np.random.default_rng(13)
    pair = verdicts.compare_pair(random.random((3, 50)), random.random((3, 50)))
    silent = dataclasses.replace(pair, p=None, p_same=None, verdict=verdicts.Verdict.DIVERGED, note="Why.")
    judged, still = verdicts.judge([pair, silent])
    assert judged.p_holm == pair.p
    assert still.sentence == "candidate against reference on task: no verdict, every run diverged. Why."


def test_bad_input_is_named():
    for shape in ((0, 3), (3, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match="expected \\[seeds, items\\], at least one of each"):
            stats.table(np.zeros(shape))
    with pytest.raises(ValueError, match="same seeds and items"):
        verdicts.compare_pair(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="not finite"):
        stats.spread([[1.0, np.nan], [1.0, 2.0]])
    with pytest.raises(ValueError, match="positive margin"):
        stats.same_p(stats.spread([[1.0, 0.0], [1.0, 2.0]]), 0.0)
    with pytest.raises(ValueError, match="at least two"):
        stats.difference_p(stats.spread([[1.0, 2.0]]))
