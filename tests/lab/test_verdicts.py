"""From outcomes to results: comparisons, fronts and notes, on made-up runs."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("pydantic")

from tiny_study import SEEDS, cell, judged, made, trials

from dual_lora.lab.report.report import report
from dual_lora.lab.report.tables import show_results
from dual_lora.lab.study import metrics, statistics, verdicts
from dual_lora.lab.study.rejudge import rejudge


def test_a_clear_winner_on_two_tasks(tmp_path):
    results = made(tmp_path, {"weak": 0.5, "strong": 0.8, "twin": 0.5}, margin={"choice": 0.1})
    verdicts = {(c["candidate"], c["task"]): c["verdict"] for c in results["comparisons"]}
    assert verdicts[("strong", "a")] == verdicts[("strong", "b")] == "significantly better"
    assert verdicts[("twin", "a")] == "equivalent within the margin"
    assert any("largest train.learning_rate tried" in note for note in results["notes"])
    sentences = {c["candidate"]: c["sentence"] for c in results["comparisons"]}
    assert sentences["strong"].endswith(" weak did best with the largest train.learning_rate tried (0.01).")
    assert "did best" not in sentences["twin"]  # no winner, no loser
    assert ", 90% interval" in sentences["twin"], "of the test of equivalence"
    assert "95% interval" in sentences["strong"]
    page = io.StringIO()
    show_results(results | {"failed": [], "untrained": []}, Console(file=page, width=160))
    assert "equivalent within the margin" in page.getvalue()


def test_the_chance_of_any_false_alarm_is_the_level_split_among_the_pairs():
    def pair(error):
        """Seeds alone differ: the interval then has its level exactly, but for a rounding of its own."""
        spread = statistics.Spread(0.1, error, error, seeds=8, items=1)
        about = dict(task="t", metric="accuracy", margin=None)
        return verdicts.compare_spread(spread, (0.5, 0.4), ("b", "a"), **about)

    chance = partial(verdicts.false_alarm, level=0.05)
    assert chance([pair(0.02)]) == pytest.approx(0.05, rel=2e-3)
    assert chance([pair(0.02), pair(0.03)]) == pytest.approx(1 - 0.975**2, rel=2e-3)
    assert chance([pair(0.02)], missing=1) == pytest.approx(0.025, rel=2e-3)
    assert chance([]) is None
    assert chance([pair(0.0)]) is None, "no noise was seen"


def test_all_pairs_are_corrected_for(tmp_path):
    skill = {"one": 0.5, "two": 0.5, "three": 0.5, "four": 0.8}
    results = made(tmp_path, skill, tasks=("a",), pairs="all")
    assert len(results["comparisons"]) == 6
    assert all(c["p_holm"] >= c["p"] for c in results["comparisons"])
    better = {
        (c["candidate"], c["reference"]) for c in results["comparisons"] if c["verdict"] == "significantly better"
    }
    assert better == {("four", "one"), ("four", "two"), ("four", "three")}


def test_pareto_front(tmp_path):
    skill, speed = {"slow good": 0.8, "fast poor": 0.4, "slow poor": 0.3}, {"fast poor": 0.5}
    results = made(tmp_path, skill, tasks=("a",), speed=speed)
    (front,) = [f for f in results["pareto"] if f["cost"] == "train_seconds"]
    assert {p["method"] for p in front["points"] if p["front"]} == {"slow good", "fast poor"}


def test_diverged_seed_counts_with_the_worst_score(tmp_path):
    sound = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",))
    results = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",), diverged={("b", 2)})
    worst = min(s["score"] for m in results["methods"] for s in m["seeds"] if s["score"] is not None)
    good = [s["score"] for s in results["methods"][1]["seeds"] if s["score"] is not None]
    assert results["methods"][1]["score"] == pytest.approx((sum(good) + worst) / SEEDS)
    assert results["methods"][1]["score"] < sound["methods"][1]["score"]
    assert sound["comparisons"][0]["verdict"] == "significantly better"
    assert results["comparisons"][0]["verdict"] == "not significant", "one run in four is no sure thing"
    assert any("1 of 4 runs of b on t diverged" in note for note in results["notes"])


def test_a_diverged_run_takes_no_third_method_s_score(tmp_path):
    """One method that fails badly made every comparison with a diverged run say nothing."""
    two, skill = {"a": 0.5, "b": 0.9}, {"a": 0.5, "b": 0.9, "bad": 0.02}
    alone, beside = (
        made(tmp_path, methods, tasks=("t",), diverged={("a", 2)})["comparisons"][0] for methods in (two, skill)
    )
    figures = ("difference", "low", "high", "candidate_score", "reference_score")
    assert [beside[k] for k in figures] == pytest.approx([alone[k] for k in figures])
    assert beside["verdict"] == "significantly better"


def test_a_published_diverged_run_is_judged_by_the_same_rule(tmp_path):
    results = made(tmp_path, {"a": 0.5, "b": 0.9, "bad": 0.02}, tasks=("t",), diverged={("a", 2)})
    (now, _), worst = results["comparisons"], min(s["score"] for s in results["methods"][2]["seeds"])
    before = json.loads(json.dumps(results))
    a, b = ([worst if s["score"] is None else s["score"] for s in m["seeds"]] for m in results["methods"][:2])
    old, items = before["comparisons"][0], now["spread"]["error"] ** 2 - now["spread"]["seed_error"] ** 2
    d = np.subtract(b, a)
    old["spread"] |= {"difference": d.mean(), "seed_error": d.std(ddof=1) / 2}
    old["spread"]["error"] = np.sqrt(items + old["spread"]["seed_error"] ** 2)
    assert old["spread"]["seed_error"] > 1.5 * now["spread"]["seed_error"]
    (again, _) = rejudge(before)["comparisons"]
    figures = ("difference", "low", "high", "p", "candidate_score", "reference_score")
    assert [again[k] for k in figures] == pytest.approx([now[k] for k in figures])


def answers(labels, guesses):
    return metrics.confusion_cells(labels, np.asarray([guesses]), 2)[0].tolist()


MAJORITY = answers([0, 1] * 20, [0] * 40)
MINORITY = answers([0, 1] * 20, [1] * 40)
LEARNED = answers([0, 1] * 20, [0, 1] * 19 + [1, 1])


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_nobody_learned_anything(tmp_path, seeds):
    """The same class for every item: all methods are alike, and that is not what the study asked."""
    constant = {"figures": {"accuracy": 0.5, "matthews": 0.0}}
    cells = [
        cell(tmp_path, name, [MAJORITY, MINORITY, MAJORITY, MINORITY, MAJORITY][:seeds], task, **constant)
        for task in ("t", "u", "v")
        for name in ("a", "b", "c")
    ]
    results = judged(tmp_path, cells, margin=0.3)
    verdict = "neither learned the task" if seeds > 1 else "no verdict from one seed"
    assert {c["verdict"] for c in results["comparisons"]} == {verdict}
    assert all("Matthews 0" in c["sentence"] for c in results["comparisons"])
    assert sum("has not learned" in note for note in results["notes"]) == 9


def test_one_that_learned_is_no_such_case(tmp_path):
    cells = [
        cell(tmp_path, "a", [MAJORITY] * 3, figures={"matthews": 0.0}),
        cell(tmp_path, "b", [LEARNED] * 3, figures={"matthews": 0.95}),
    ]
    results = judged(tmp_path, cells)
    assert results["comparisons"][0]["verdict"] == "significantly better"
    assert [note for note in results["notes"] if "has not learned" in note] == [
        "a has not learned t: every run is right as often as one that gives every item the same answer (Matthews 0)."
    ]


def test_a_method_that_learned_nothing_is_not_equivalent_to_one_that_did(tmp_path):
    """One run of five that learned a little makes the means equal, not the methods."""
    cells = [
        cell(tmp_path, "a", [MAJORITY] * 5, figures={"matthews": 0.0}),
        cell(tmp_path, "b", [MAJORITY] * 4 + [LEARNED], figures={"matthews": 0.2}),
    ]
    (c,) = judged(tmp_path, cells, margin=5.0)["comparisons"]
    assert c["verdict"] == "inconclusive"
    assert "a has not learned the task: every run is right as often as" in c["sentence"]
    assert "Equivalence is not claimed." in c["sentence"]


def test_a_method_below_chance_has_not_learned_either(tmp_path):
    below, learned = {"figures": {"matthews": -0.03}}, {"figures": {"matthews": 0.95}}
    cells = [cell(tmp_path, "a", [MAJORITY, MINORITY], **below), cell(tmp_path, "b", [LEARNED] * 2, **learned)]
    (note,) = (note for note in judged(tmp_path, cells)["notes"] if "has not learned" in note)
    assert (
        note
        == "a has not learned t: what it predicts does not rise with what is right in any run (Matthews 0 or less)."
    )


def test_a_verdict_names_the_settings_that_were_chosen(tmp_path):
    cells = [cell(tmp_path, name, [LEARNED, MAJORITY, LEARNED]) for name in ("a", "b", "c")]
    for f, rate in zip(cells, (1e-3, 1e-3, 3e-3), strict=True):
        f.chosen = {"train.learning_rate": rate}
    b, c = (row["sentence"] for row in judged(tmp_path, cells)["comparisons"])
    assert "Both at learning_rate 0.001." in b
    assert "At learning_rate 0.003 against learning_rate 0.001." in c


@pytest.mark.parametrize(
    ("tried", "failed"),
    [
        ({1e-3: 0.5, 3e-3: 0.6}, None),
        ({1e-3: 0.5, 3e-3: 0.6, 1e-2: None}, None),  # a higher rate than the one that was chosen
        ({1e-3: None, 3e-3: 0.6}, "1 of 2"),
        ({1e-3: 0.0, 3e-3: 0.6, 1e-2: None}, "1 of 2"),  # one answer to everything
    ],
)
def test_failures_in_tuning_are_said_with_the_verdict(tmp_path, tried, failed):
    """A run that fails once in eight is in none of five final runs half of the time."""
    grids = {"a": {1e-3: 0.5, 3e-3: 0.6}, "b": tried}
    cells = [
        cell(
            tmp_path,
            name,
            [LEARNED] * 3,
            trials=[t for rate, s in grid.items() for t in trials({rate: s}, figures={"matthews": s})],
        )
        for name, grid in grids.items()
    ]
    for f in cells:
        f.chosen = {"train.learning_rate": 3e-3}
    results = judged(tmp_path, cells, search={"space": {"learning_rate": [1e-3, 3e-3]}})
    for sentence in (c["sentence"] for r in (results, rejudge(results)) for c in r["comparisons"]):
        if failed is None:
            assert "tuning runs" not in sentence
        else:
            assert f"{failed} tuning runs of b at this learning rate or a lower one failed: 3 final runs" in sentence
            assert "tuning runs of a" not in sentence


def test_a_choice_by_less_than_the_noise_of_a_run_is_said(tmp_path):
    """Trials 0.01 apart, final runs that vary by as much."""
    cells = []
    for name, gap in (("near", 0.01), ("far", 0.5)):
        f = cell(tmp_path, name, [LEARNED] * 3, trials=trials({1e-3: 0.4, 3e-3: 0.4 + gap}))
        f.chosen = {"train.learning_rate": 1e-3}
        f.finals = [
            (job, outcome.model_copy(update={"figures": {"loss": loss, "matthews": 0.9}}))
            for (job, outcome), loss in zip(f.finals, (0.39, 0.40, 0.41), strict=True)
        ]
        cells.append(f)
    search = {"metric": "loss", "space": {"learning_rate": [1e-3, 3e-3]}}
    (note,) = [n for n in judged(tmp_path, cells, search=search)["notes"] if "another seed" in n]
    assert re.search(r"near on t \((2[0-9]|3[0-9])%\)\.$", note), note


def test_of_a_search_with_several_seeds_the_mean_says_whether_its_end_was_best(tmp_path):
    """That one run inside scored like one of the best setting's is no tie: their means differ."""
    rates = {1e-3: (0.5, 0.6), 3e-3: (0.6, 0.9), 1e-2: (0.9, 0.9)}
    grid = [trial for rate, scores in rates.items() for score in scores for trial in trials({rate: score})]
    cells = [cell(tmp_path, name, [LEARNED] * 3, trials=grid) for name in ("a", "b")]
    for f in cells:
        f.chosen = {"train.learning_rate": 1e-2}
    assert any("largest train.learning_rate tried (0.01)" in note for note in judged(tmp_path, cells)["notes"])


def test_an_end_of_the_search_may_be_a_rule_of_the_rank(tmp_path):
    """α of 4r is the largest of r, 2r and 4r; a setting that is no number has no end."""
    grid = [
        (replace(job, settings=job.settings | {"method.alpha": alpha, "method.target_modules": [alpha]}), outcome)
        for alpha, score in (("r", 0.5), ("2r", 0.6), ("4r", 0.9))
        for job, outcome in trials({3e-3: score})
    ]
    cells = [cell(tmp_path, name, [LEARNED] * 3, trials=grid) for name in ("a", "b")]
    for f, settings in zip(cells, (grid[2][0].settings, grid[1][0].settings), strict=True):
        f.chosen = settings
    (note,) = [n for n in judged(tmp_path, cells)["notes"] if "tried" in n]
    assert "a on t did best with the largest method.alpha tried (4r)" in note


def test_a_study_says_which_level_it_really_has(tmp_path):
    results = made(tmp_path, {"a": 0.5, "b": 0.5, "c": 0.5}, tasks=("t",))
    assert 0 < results["false_alarm"] <= 0.05
    (note,) = [n for n in results["notes"] if n.startswith("Chance of any false alarm")]
    assert f"{results['false_alarm']:.1%} with the noise of these runs, 5% at most" in note


def test_no_better_than_the_untrained_model(tmp_path):
    right = [[[1.0]] * 150 + [[0.0]] * 50] * 3
    untrained = [{"model": "", "task": "t", "metric": "choice", "score": 0.75}]
    cells = [cell(tmp_path, name, right, metric="choice") for name in ("a", "b")]
    results = judged(tmp_path, cells, untrained)
    assert results["comparisons"][0]["verdict"] == "neither learned the task"
    assert "not better than the untrained model's (0.75)" in results["comparisons"][0]["sentence"]
    lower = judged(tmp_path, cells, [untrained[0] | {"score": 0.5}])
    assert lower["comparisons"][0]["verdict"] == "equivalent within the margin"
    assert "learned" not in lower["comparisons"][0]["sentence"]


def test_no_better_than_one_answer_to_everything(tmp_path):
    right = {"form only": [[[1.0]] * 152 + [[0.0]] * 88] * 3, "content": [[[1.0]] * 200 + [[0.0]] * 40] * 3}
    untrained = {"model": "", "task": "t", "metric": "choice", "score": 0.4, "constant": 152 / 240}
    cells = [cell(tmp_path, name, rows, metric="choice") for name, rows in right.items()]
    (note,) = [note for note in judged(tmp_path, cells, [untrained])["notes"] if "has not learned" in note]
    assert note == "form only has not learned t: it is right no more often than one answer to everything (0.6333)."


def test_a_loss_is_better_than_the_untrained_when_it_is_less(tmp_path):
    losses = [[[2.0, 1.0], [3.0, 2.0]], [[2.1, 1.0], [3.0, 2.0]]]
    cells = [cell(tmp_path, name, losses, metric="loss") for name in ("a", "b")]
    untrained = {"model": "", "task": "t", "metric": "loss", "score": 4.0}
    assert not any("has not learned" in note for note in judged(tmp_path, cells, [untrained])["notes"])
    better = judged(tmp_path, cells, [untrained | {"score": 1.0}])
    assert sum("has not learned" in note for note in better["notes"]) == 2


def test_a_lower_loss_reads_as_a_reduction(tmp_path):
    random = np.random.default_rng(0)
    high = random.normal(2.0, 0.1, (3, 50))
    runs = {"a": high, "b": high - random.uniform(0.4, 0.6, high.shape)}
    cells = [cell(tmp_path, name, [[[v, 1.0] for v in row] for row in x], metric="loss") for name, x in runs.items()]
    (c,) = judged(tmp_path, cells)["comparisons"]
    assert c["candidate_score"] < c["reference_score"]
    assert c["better"] == "less"
    assert c["difference"] > 0
    assert "significantly better (reduction of loss +0." in c["sentence"]


@pytest.mark.parametrize("other", [LEARNED, MAJORITY])
@pytest.mark.parametrize("gone", ["a", "b"])
def test_a_method_whose_every_run_diverged_is_like_no_other(tmp_path, gone, other):
    """Its runs would count with the other's worst score, and so be equivalent to it."""
    cells = [
        cell(tmp_path, name, [None] * 3 if name == gone else [other] * 3, task) for task in "tu" for name in ("a", "b")
    ]
    results = judged(tmp_path, cells, margin=0.5)
    for c in results["comparisons"]:
        assert c["verdict"] == "no verdict, every run diverged"
        assert c["sentence"].endswith(f"No run of {gone} came to an end with a score.")
        assert c["difference"] is c["low"] is c["p_holm"] is c["visible"] is None
    assert [m["score"] is None for m in results["methods"]] == [m["method"] == gone for m in results["methods"]]
    assert not any(p["method"] == gone for front in results["pareto"] for p in front["points"])


def test_a_diverged_run_is_no_ground_for_equivalence(tmp_path):
    cells = [cell(tmp_path, "a", [LEARNED] * 4), cell(tmp_path, "b", [LEARNED, None, LEARNED, LEARNED])]
    (c,) = judged(tmp_path, cells, margin=0.5)["comparisons"]
    assert c["verdict"] == "inconclusive"
    assert c["sentence"].endswith("Of 4 runs each, 1 of b diverged: equivalence is not claimed.")
    sound = [cell(tmp_path, name, [LEARNED] * 4) for name in ("a", "b")]
    assert judged(tmp_path, sound, margin=0.5)["comparisons"][0]["verdict"] == "equivalent within the margin"


def test_one_test_item_is_no_verdict(tmp_path):
    cells = [cell(tmp_path, "a", [[[0.0]]] * 5, metric="choice"), cell(tmp_path, "b", [[[1.0]]] * 5, metric="choice")]
    results = judged(tmp_path, cells)
    assert results["comparisons"][0]["verdict"] == "no verdict from one test item"
    assert "t has one test item: it says nothing about others." in results["notes"]


def test_methods_that_are_not_finished_are_named(tmp_path):
    unfinished = cell(tmp_path, "b", [LEARNED] * 5, finals=(0, 2, 3))
    cells = [cell(tmp_path, "a", [LEARNED] * 5), unfinished, cell(tmp_path, "c", [MAJORITY] * 5)]
    results = judged(tmp_path, cells)
    assert [c["candidate"] for c in results["comparisons"]] == ["c"]
    assert results["notes"][0] == "b on t is not compared with anything: 3 of 5 runs have ended."
    reference = judged(tmp_path, cells, reference="b")
    assert reference["comparisons"] == []
    assert reference["notes"][0].startswith("b on t is not compared with anything, and nothing with it: 3 of 5")


def test_a_search_whose_trials_all_score_alike_chose_nothing(tmp_path):
    alike = trials({1e-3: 0.0, 3e-3: 0.0, 1e-2: 0.0})
    cells = [cell(tmp_path, name, [LEARNED] * 2, trials=alike) for name in ("a", "b")]
    for f in cells:
        f.chosen = {"train.learning_rate": 1e-3}
    notes = judged(tmp_path, cells)["notes"]
    assert sum("the search could not choose" in note for note in notes) == 2
    assert not any("did best with" in note for note in notes)


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ((1, 1), None),
        ((2, 2), "2 runs went side by side"),
        ((None, None), "was not recorded"),
        ((1, 2), "Runs at a time: 1: a on t; 2: b on t."),
        ((None, 2), "Runs at a time: unknown: a on t; 2: b on t."),
    ],
)
def test_costs_measured_under_different_loads_say_so(tmp_path, loads, said):
    """A run may come from another study that had the machine for itself."""
    cells = [cell(tmp_path, name, [LEARNED] * 2, runs_at_a_time=load) for name, load in zip("ab", loads, strict=True)]
    results = judged(tmp_path, cells)
    notes = [note for note in results["notes"] if "comparable" in note]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]
    page = io.StringIO()
    show_results(results, Console(file=page, width=200))
    assert ("runs at a time" in page.getvalue().split("Verdicts")[1].split("•")[0]) == (loads[0] != loads[1])
    report([tmp_path / "results.json"], tmp_path / "r.html")
    assert ("not all runs shared the machine alike" in (tmp_path / "r.html").read_text()) == (loads[0] != loads[1])


def test_everything_diverged(tmp_path):
    all_lost = {(m, s) for m in ("a", "b") for s in range(SEEDS)}
    results = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",), diverged=all_lost)
    assert results["comparisons"] == []
    assert "nothing to compare" in results["notes"][0]


def test_a_look_at_a_part_of_a_study_is_corrected_for_all_of_it(tmp_path):
    """One pair of three was judged as if the study had no other: a study that is stopped when it pleases errs more."""
    random = np.random.default_rng(0)
    right = (random.random((5, 4, 60)) < np.array([0.5, 0.72, 0.6, 0.6, 0.6])[:, None, None])[..., None].astype(float)
    methods = [f"m{i}" for i in range(5)]

    def results(finals):
        cells = [cell(tmp_path, m, right[i].tolist(), metric="choice", finals=finals[i]) for i, m in enumerate(methods)]
        return judged(tmp_path, cells)

    every, none = range(4), [9]
    whole = results([every] * 5)["comparisons"]
    part = results([every, every, none, none, none])
    (c,) = part["comparisons"]
    assert c["p_holm"] == pytest.approx(min(1, 4 * c["p"]))
    assert c["visible"] == whole[0]["visible"]
    assert "p values are corrected for the 3 comparisons still to come as well." in part["notes"]
    assert part["false_alarm"] < 0.05 / 2
    assert rejudge(part)["comparisons"][0]["p_holm"] == c["p_holm"]


def test_an_interval_without_a_width_says_why_it_decides_nothing():
    same = np.tile([1.0, 0.0], (2, 40))
    (few,) = verdicts.judge([verdicts.compare_pair(same, same, margin=0.02, reach=1.0, task="t", metric="accuracy")])
    assert few.verdict is verdicts.Verdict.INCONCLUSIVE
    assert "Both scored the same with every seed and on every item, so the interval has no width" in few.sentence
    assert "with 80 items" in few.sentence
    many = np.tile([1.0, 0.0], (2, 400))
    (enough,) = verdicts.judge([verdicts.compare_pair(many, many, margin=0.02, reach=1.0, task="t", metric="accuracy")])
    assert enough.verdict is verdicts.Verdict.EQUIVALENT
    assert enough.note == ""
