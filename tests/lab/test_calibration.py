"""The calibration in small: levels hold in every cell, tuning adds what the page says, and results and page agree."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

pytest.importorskip("pydantic")

from benchmarks import calibration, families, rules

from dual_lora.lab.advise.pace import LOOK_LEVEL
from dual_lora.lab.study import statistics as stats

FEW = 20_000


def assert_level(share, level, drawn, what):
    assert share < level + 4.5 * np.sqrt(level / drawn), f"{share:.4f} for {level} at {what}"


def test_the_level_holds_on_the_whole_grid():
    cells = list(calibration.crossed(FEW, np.random.default_rng(0)))
    assert {c[0] for c in cells} == {2, 3, 5, 8}
    assert {c[1] for c in cells} >= {0, 1, 700}
    for *what, shares in cells:
        for key, level in (("one", 0.05), ("same", 0.05)):
            assert_level(shares[key], level, FEW, what)
        assert_level(shares["ten"] / calibration.FAMILY, 0.05 / calibration.FAMILY, FEW, what)


@pytest.mark.parametrize("kind", calibration.KINDS)
@pytest.mark.parametrize("luck", [0.0, 2.0])
def test_the_level_holds_for_every_kind_of_score(kind, luck):
    drawn, _ = calibration.KINDS[kind]
    for seeds, items in ((2, 20), (3, 60), (8, 20)):
        d = drawn(np.random.default_rng(seeds), (300, seeds, items), luck, 1.0)
        mean, error, seed_error = calibration.stats.error_parts(d)
        tally = calibration.Tally()
        tally.add(mean, error, seed_error, seeds, items, float(mean.std()))
        assert_level(tally.shares()["one"], 0.05, 300, (seeds, items))


@pytest.mark.parametrize("seeds", families.SEEDS)
def test_one_family_holds_the_level_where_two_did_not(seeds):
    """Methods that are alike beside others at the margin: the chance of any wrong word."""
    former, now = families.RULES
    for many, alike in ((2, 1), (6, 3), (6, 5)):
        truth = np.where(np.arange(many) < alike, 0.0, 16.0)
        shares = families.wrong(4000, np.random.default_rng(many), seeds, truth, 16.0, 0.0)
        assert_level(shares[now][0], 0.05, 4000, (seeds, many, alike))
        assert shares[former][0] > 0.05, "the former rule promised less"
    page = calibration.PAGE.read_text(encoding="utf-8").partition("<!-- families -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in page.strip().splitlines()[2:]]
    assert [int(row[0]) for row in rows] == list(families.METHODS)
    assert all(float(row[2]) <= 0.055 for row in rows)


@pytest.mark.parametrize("shared", families.SHARED)
def test_the_looks_of_an_advice_share_its_level(shared):
    random = np.random.default_rng(1)
    assert families.looks(20_000, random, 0.05, shared) > 0.12
    assert_level(families.looks(20_000, random, LOOK_LEVEL, shared), 0.05, 20_000, shared)


def test_the_level_holds_where_few_answers_differ():
    for *what, shares in calibration.few(200, np.random.default_rng(0), (200, 400)):
        for share in shares[:-1]:
            assert_level(share, 0.06, 200, what)
    page = calibration.PAGE.read_text(encoding="utf-8").partition("<!-- few -->")[2].partition("<!-- end -->")[0]
    rows = [[float(x) for x in line.strip("| ").split(" | ")] for line in page.strip().splitlines()[2:]]
    assert len(rows) == 5 * 3
    assert all(share <= 0.07 for _, _, *wrong, _ in rows for share in wrong)


def test_a_single_search_makes_more_of_two_equal_methods_than_their_settings_do():
    designs = calibration.DESIGNS | calibration.TWO
    rows = list(calibration.tuning(4000, calibration.committed(), np.random.default_rng(0), designs))
    at = {row[:3]: row[3:] for row in rows}
    other, alarm, alike = at["dual_lora", "one search, one seed", 5]
    assert 0.10 < other < 0.22
    assert alarm > 0.09
    assert alike < 0.05 + 0.012
    assert at["dual_lora", "one search, mean of five seeds", 5][1] < 0.05 + 0.012
    assert at["dual_lora", "a search for every final seed", 8][1] < 0.05 + 0.012
    page = calibration.PAGE.read_text(encoding="utf-8").partition("<!-- tuning -->")[2].partition("<!-- end -->")[0]
    written = [line.strip("| ").split(" | ") for line in page.strip().splitlines()[2:]]
    assert list(dict.fromkeys(row[1] for row in written)) == calibration.TUNED
    for curve, design, seeds, *shares in written:
        assert np.abs(np.array(shares, float) - np.array(at[curve, design, int(seeds)])).max() < 0.03


def test_more_tuning_seeds_do_not_help_where_validation_and_test_disagree():
    text = calibration.PAGE.read_text(encoding="utf-8")
    eight, five, each = (
        int(share) / 100
        for share in re.search(r"in (\d+) % of.*\((\d+) % with five\).*wrong in (\d+) %", text).groups()
    )
    random = np.random.default_rng(0)
    for tuning in (2, 5):
        assert abs(families.searched(20_000, random, 8, tuning) - eight) < 0.015
        assert abs(families.searched(20_000, random, 5, tuning) - five) < 0.015
    assert_level(families.searched(20_000, random, 8, 1, each=True), each, 20_000, "a search for every final seed")


def test_runs_drawn_from_the_published_ones_keep_the_level():
    for *what, shares in calibration.real(FEW, calibration.committed(), np.random.default_rng(0)):
        assert_level(shares["one"], 0.05, FEW, what)


def test_few_seeds_of_runs_that_fail_are_a_limit_and_five_hold_the_level():
    at = {(seeds, many): failed for seeds, many, *failed in families.fails(FEW, np.random.default_rng(0))}
    assert min(float(at[2, 1][-1]), float(at[3, 10][-1])) > 0.1, "the page's limit"
    for (seeds, many), failed in at.items():
        for share in map(float, failed) if seeds >= 5 else ():
            assert_level(share, 0.055, FEW, (seeds, many))
    page = calibration.PAGE.read_text(encoding="utf-8").partition("<!-- fails -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in page.strip().splitlines()[2:]]
    assert [(int(seeds), int(many)) for seeds, many, *_ in rows] == list(at)
    for seeds, many, *failed in rows:
        assert np.abs(np.array(failed, float) - np.array(at[int(seeds), int(many)], float)).max() < 0.02


@pytest.mark.parametrize(("seeds", "items"), [(3, 2), (5, 2), (8, 2), (8, 3), (20, 4), (40, 8)])
def test_the_level_holds_for_few_items(seeds, items):
    random = np.random.default_rng(seeds)
    for taste in (0.0, 0.3, 0.8, 3.0):
        d = random.standard_normal((FEW, seeds, items)) + taste * random.standard_normal((FEW, 1, items))
        mean, error, seed_error = calibration.stats.error_parts(d)
        tally = calibration.Tally()
        tally.add(mean, error, seed_error, seeds, items, float(mean.std()))
        assert_level(tally.shares()["one"], 0.05, FEW, (seeds, items, taste))
        assert_level(tally.shares()["same"], 0.05, FEW, (seeds, items, taste))


def test_the_minimum_detectable_effect_is_as_rough_as_the_page_says():
    page = " ".join(calibration.PAGE.read_text(encoding="utf-8").split())
    true = stats.Spread(0.0, 1.0, 1.0, 8, 1)
    for seeds, name in ((2, "two"), (3, "three"), (5, "five"), (8, "eight")):
        drawn = np.sqrt(chi2.ppf([0.1, 0.9, 0.5], seeds - 1) / (seeds - 1))  # estimated deviations; the true one is 1
        scale = [stats.smallest_visible(replace(true, error=e, seed_error=e, seeds=seeds), 0.05, 0.8) for e in (0.5, 1)]
        assert scale[0] == pytest.approx(scale[1] / 2), "it is proportional to the error that was seen"
        found = re.search(rf"\* (\S+) and (\S+) times[^*]*?, with {name} seeds \([^)]*?below ([\d.]+)\)", page)
        assert [float(x) for x in found.groups()] == pytest.approx(drawn, abs=0.01)


def test_the_page_is_filled_and_its_levels_hold():
    text = calibration.PAGE.read_text(encoding="utf-8")
    crossed = text.partition("<!-- crossed -->")[2].partition("<!-- end -->")[0]
    rows = [line.strip("| ").split(" | ") for line in crossed.strip().splitlines()[2:]]
    assert len(rows) == 4 * len(calibration.SEED_SQUARES)
    assert all(float(row[2]) <= 0.055 and float(row[3]) <= 0.055 for row in rows)
    studies = text.partition("<!-- studies -->")[2]
    for results in calibration.committed():
        if results["false_alarm"] is not None:
            assert re.search(rf"\| {results['study']['name']} \|.* {results['false_alarm']:.3f} \|", studies)


def test_rejected_rules_err_where_the_one_that_is_used_does_not():
    rows = list(rules.worst_levels(FEW, np.random.default_rng(0), (2,), (20,), (1.0, 2.0, 100.0), (1.0, 4.0)))
    assert [name for name, *_ in rows] == list(rules.RULES)
    level = {name: float(share) for name, share, _ in rows}
    *rejected, used = level
    assert level[rejected[0]] > 0.03, "the pooled error"
    assert level[rejected[3]] > 0.01, "Cochran and Cox"
    for name in (rejected[4], used):
        assert_level(level[name], rules.LEVEL, FEW, name)
    page = calibration.PAGE.read_text(encoding="utf-8").partition("<!-- rules -->")[2].partition("<!-- end -->")[0]
    assert [line.strip("| ").split(" | ")[0] for line in page.strip().splitlines()[2:]] == list(rules.RULES)


def test_a_page_without_a_place_for_a_table_is_named():
    assert calibration.filled("a\n<!-- x -->\nold\n<!-- end -->\nb", {"x": "| new |"}) == (
        "a\n<!-- x -->\n| new |\n<!-- end -->\nb"
    )
    with pytest.raises(ValueError, match="no place for the table y"):
        calibration.filled("", {"y": ""})
