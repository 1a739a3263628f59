"""Scores that others made get the verdicts that a study gives, and what is wrong with them is said in a sentence."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")

from tiny_study import made

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.judge import judge
from dual_lora.lab.judge.scores import read_table, tables
from dual_lora.lab.report.report import report
from dual_lora.lab.study import verdicts


def write_table(file, rows, columns=("method", "seed", "item", "score")):
    with file.open("w", newline="") as text:
        writer = csv.writer(text, delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writerows([columns, *rows])
    return file


def rows_of(methods, seeds=3, items=40, task=None, luck=0.05):
    """Random right and wrong answers: method -> chance; the seeds have luck of their own."""
    random = np.random.default_rng(0)
    return [
        [name, *([task] if task else []), seed, f"q{item}", int(random.random() < chance + luck * (seed % 2))]
        for name, chance in methods.items()
        for seed in range(1, seeds + 1)
        for item in range(items)
    ]


def test_a_table_gets_the_verdicts_of_a_study(tmp_path):
    """The same figures as `compare_pair` gives for the same tables, through every step."""
    rows = rows_of({"lora": 0.4, "mine": 0.9, "other": 0.45})
    results = judge(write_table(tmp_path / "s.csv", rows), margin=0.02)
    own = tables(read_table(tmp_path / "s.csv").rows)["", "task"]
    pairs = [
        verdicts.compare_pair(own[name].table, own["lora"].table, names=(name, "lora"), margin=0.02, reach=1.0)
        for name in ("mine", "other")
    ]
    for found, expected in zip(results["comparisons"], verdicts.judge(pairs), strict=True):
        assert found["verdict"] == expected.verdict
        for key in ("difference", "low", "high", "p_holm", "p_same_holm", "visible"):
            assert found[key] == pytest.approx(getattr(expected, key))
    assert [c["verdict"] for c in results["comparisons"]] == ["significantly better", "inconclusive"]
    assert 0 < results["false_alarm"] <= 0.05
    assert any("How the methods were tuned is not known" in note for note in results["notes"])
    assert not any("settings named here" in note for note in results["notes"])


def test_a_studys_own_scores_are_judged_as_the_study_was(tmp_path):
    """Items' shares written out as a table and read again: the verdict and every figure of it."""
    fresh = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",), margin=0.02)
    (pair,) = fresh["comparisons"]
    rows = []
    for m in fresh["methods"]:
        for run in m["seeds"]:
            features = json.loads((tmp_path / f"{run['key']}.scores.json").read_text())
            rows += [[m["method"], run["seed"], i, value] for i, (value,) in enumerate(features)]
    again = judge(write_table(tmp_path / "s.csv", rows), reference="a", margin=0.02)["comparisons"][0]
    for key in ("verdict", "difference", "low", "high", "p", "p_holm", "p_same", "visible", "same_low", "same_high"):
        assert again[key] == (pytest.approx(pair[key]) if isinstance(pair[key], float) else pair[key]), key


def test_less_may_be_better(tmp_path):
    rows = [[m, s, i, 1 + s / 100 + i / 10 - 0.3 * (m == "b")] for m in "ab" for s in range(4) for i in range(5)]
    file = write_table(
        tmp_path / "s.csv", [[*r[:3], "loss", r[3]] for r in rows], ("method", "seed", "item", "metric", "score")
    )
    (c,) = judge(file)["comparisons"]
    assert (c["better"], c["verdict"]) == ("less", "significantly better")
    assert c["candidate_score"] < c["reference_score"]
    assert "reduction of loss +0.3" in c["sentence"]
    (c,) = judge(file, better="more")["comparisons"]
    assert c["verdict"] == "significantly worse"


@pytest.mark.parametrize(
    ("columns", "rows", "words"),
    [
        ("method,seed,item,score,run", ["a,1,1,0.5,x"], r"unknown column 'run'"),
        ("method,seed,itm,score", ["a,1,1,0.5"], r"column 'itm'.* Did you mean 'item'"),
        ("method,item,score", ["a,1,0.5"], r"lacks the column seed"),
        ("method,seed,item,score,score", ["a,1,1,0,1"], r"two columns 'score'"),
        ("method,seed,item,score", ["a,1,1,0.5", "b,1,1,nan"], r"line 3: the score is nan. Give a diverged run"),
        ("method,seed,item,score", ["a,1,1,0.5", "b,1,1,inf"], r"line 3: the score is inf"),
        ("method,seed,item,score", ["a,1,1,high"], r"line 2: the score 'high' is no number"),
        ("method,seed,item,score", ["a,one,1,1"], r"line 2: the seed 'one' is no whole number"),
        ("method,seed,item,score", ["a,-1,1,1"], r"line 2: the seed '-1' is no whole number"),
        ("method,seed,item,score", ["a,1,1,1", "a,1,1,0"], r"line 3: a, seed 1, item 1, task has .*line 2"),
        ("method,seed,score", ["a,1,1", "a,1,0"], r"line 3: a, seed 1, task has .* Without a column item"),
        ("method,seed,item,score", ["a,1,1,1", "a,1,2,1", "b,1,1,1"], r"b .* seed 1, item 2 .*1 missing in all"),
        ("method,seed,item,score", ["a,1,1,1", "a,2,1,1", "b,1,1,1"], r"b has no score for seed 2, item 1"),
        ("method,seed,item,score", ["a,1,1,1"], r"one method only, a"),
        ("method;seed;item;score", ["a;1;1;1"], r"one method only, a"),
        ("method,seed,item,score", ["a,1,1"], r"line 2: 3 columns, expected 4"),
        ("method,seed,item,score", [",1,1,1"], r"line 2: the method is empty"),
        ("method,seed,item,metric,score", ["a,1,1,acc,1", "a,1,1,f1,1"], r"2 metrics, acc, f1: choose"),
        ("method,task,seed,item,score", ["a,x,1,1,1", "b,x,1,1,1", "b,y,1,1,1"], r"a, which .* has no score on y"),
        ("method,seed,item,score", [], r"holds no scores"),
        ("", [], r"lacks the column method"),
        ("method,seed,item,score", ["a,1,1,1_0"], r"line 2: the score '1_0' is no number"),
        ("method,seed,item,score", ["a,1_0,1,1"], r"line 2: the seed '1_0' is no whole number"),
        ("method,seed,item,score", ["a,1,1,1e308", "b,1,1,-1e308"], r"of the order of 1e\+308.* in another unit"),
        ("method,seed,item,score", ["a,1,1,1e-200", "b,1,1,2e-200"], r"of the order of 2e-200.* in another unit"),
        ("method,seed,item,score", ['a,1,"x" y,1', "b,1,x y,1"], r"is no table: ',' expected after '\"'"),
        ("method,seed,item,score", ["a,1,é,1", "a,1,e\u0301,0"], r"line 3: a, seed 1, item é, task has .*line 2"),
        ("method,seed,item,metric,score", ["a,1,1,,1", "a,2,1,acc,1"], r"line 2: the metric is empty.* at .*line 3"),
        ("method,seed,item,task,score", ["a,1,1,t,1", "a,2,1,,1"], r"line 3: the task is empty.* at .*line 2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_sentence(columns, rows, words, tmp_path, call):
    file = tmp_path / "s.csv"
    file.write_text("\n".join([columns, *rows]) + "\n")
    with pytest.raises(UserError, match=words):
        judge(file)
    code, out, _ = call("judge", file)  # which looks for a traceback in what goes to standard error
    assert code == 1
    assert "Traceback" not in out


@pytest.mark.parametrize(
    ("metric", "better"),
    [("eval_loss", "less"), ("val/Loss", "less"), ("ppl", "less"), ("error_rate", "less"), ("reward", "more")],
)
def test_a_direction_that_nobody_said_is_said(metric, better, tmp_path):
    """Trainers write eval_loss: taken as a metric of which more is better, every verdict was the wrong way round."""
    rows = [
        [m, s, i, metric, 1 + s / 100 + i / 10 - 0.3 * (m == "b")] for m in "ab" for s in range(4) for i in range(5)
    ]
    file = write_table(tmp_path / "s.csv", rows, ("method", "seed", "item", "metric", "score"))
    results = judge(file)
    (c,) = results["comparisons"]
    assert (c["better"], c["verdict"].split()[1]) == (better, "better" if better == "less" else "worse")
    words = f"Which way {metric} is better was not said: {better} of it is taken as better."
    assert any(words in note for note in results["notes"])
    assert not any("was not said" in note for note in judge(file, better=better)["notes"])
    file.write_text(file.read_text().replace(metric, "acc_norm"))
    assert not any("was not said" in note for note in judge(file)["notes"])


def test_the_unit_of_the_scores_changes_no_verdict(tmp_path):
    """Differences below 1e-12 were taken for rounding, in whatever unit the scores are."""
    found = []
    for unit in (1.0, 1e-14, 1e-90, 1e90):
        rows = [
            [m, s, i, unit * (3 + s / 100 + i / 10 - 0.3 * (m == "b"))] for m in "ab" for s in range(4) for i in (1, 2)
        ]
        (c,) = judge(write_table(tmp_path / "s.csv", rows), margin=0.1 * unit)["comparisons"]
        found.append((c["verdict"], c["difference"] / unit, c["p_holm"]))
    assert found[0][0] == "significantly worse"
    for other in found[1:]:
        assert other[0] == found[0][0]
        assert other[1:] == pytest.approx(found[0][1:])


def test_right_answers_in_percent_are_right_answers(tmp_path):
    """20 answers that all agree: too few for a hundredth, in either unit. Scores that only look alike are measured."""
    found = []
    for unit in (1.0, 100.0):
        rows = [[m, s, i, unit * (i % 3 > 0)] for m in "ab" for s in range(3) for i in range(20)]
        (c,) = judge(write_table(tmp_path / "s.csv", rows), margin=0.01 * unit, better="more")["comparisons"]
        found.append((c["verdict"], c["p_same"], c["spread"]["reach"] / unit))
    assert found[0] == pytest.approx(found[1])
    assert found[0][::2] == ("inconclusive", 1.0)
    rows = [[m, s, i, 0.5 + 0.1 * i] for m in "ab" for s in range(3) for i in range(2)]
    (c,) = judge(write_table(tmp_path / "s.csv", rows), margin=0.01, better="more")["comparisons"]
    assert (c["verdict"], c["spread"]["reach"]) == ("equivalent within the margin", None)


@pytest.mark.parametrize(
    ("values", "reach"),
    [
        ([0, 1, 0.5], 1),
        ([0, 0.25, 0.5, 0.75, 1], 1),
        ([0.875, 1], 1),
        ([1, 2, 3, 5], 5),
        ([4], 4),
        ([-1, 1], 2),
        ([50, 100], 100),
        ([i / 9 for i in range(12)], None),
    ],
)
def test_scores_of_few_values_are_no_measurements(tmp_path, values, reach):
    """24 items that all agree say nothing of a hundredth, whatever else than right and wrong they may be."""
    rows = [[m, s, i, values[i % len(values)]] for m in "ab" for s in range(3) for i in range(24)]
    (c,) = judge(write_table(tmp_path / "s.csv", rows), margin=0.01, better="more")["comparisons"]
    assert c["spread"]["reach"] == reach
    assert c["verdict"] == ("inconclusive" if reach else "equivalent within the margin")


def test_runs_without_the_metric_are_named(tmp_path):
    """A seed that has another metric only was dropped without a word."""
    rows = [[m, s, i, "f1" if s == 1 else "acc", i % 2] for m in "ab" for s in (1, 2, 3) for i in range(4)]
    file = write_table(tmp_path / "s.csv", rows, ("method", "seed", "item", "metric", "score"))
    results = judge(file, metric="acc")
    assert results["comparisons"][0]["spread"]["seeds"] == 2
    assert any("no score of the metric: a, seed 1, on task; b, seed 1, on task." in note for note in results["notes"])


LOG = "lora/seed-1/samples_t_2026-01-01T00-00-00.0.jsonl"
SAMPLE = {"doc_id": 0, "doc_hash": "a", "metrics": ["acc"], "acc": 1}
RESULT = {
    "run_info": {"experiment_name": "lora/a", "train_config": {"model_id": "m", "seed": 1}},
    "train_info": {"status": "success", "metrics": [{"test accuracy": 0.5}]},
}


def changed_result(**train):
    return json.dumps(RESULT | {"train_info": RESULT["train_info"] | train})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (LOG, None, "is no regular file"),
        (LOG, b"\xff\xfe", "is not text in UTF-8"),
        (LOG, "[" * 100_000, "nested too deeply"),
        (LOG, json.dumps(SAMPLE | {"metrics": 3}), "its metrics are no list of names"),
        (LOG, json.dumps(SAMPLE | {"metrics": [["acc"]]}), "its metrics are no list of names"),
        (LOG, json.dumps(SAMPLE | {"acc": 10**400}), "is no number"),
        (LOG, json.dumps(SAMPLE | {"acc": None}), "is no number"),
        ("results/a.json", None, "holds no scores"),
        ("results/a.json", changed_result(metrics=["x"]), "is no result of PEFT"),
        ("results/a.json", changed_result(metrics=[["test accuracy"]]), "is no result of PEFT"),
        ("results/a.json", changed_result(metrics=[{"test accuracy": 10**400}]), "is no number"),
    ],
)
def test_hostile_scores_are_one_sentence(name, content, words, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    if content is None:
        os.mkfifo(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        judge(tmp_path)


@pytest.mark.timeout(60)  # what hangs is the failure
def test_scores_that_have_nothing_in_common_are_not_listed(tmp_path):
    """A thousand lines, each of another method, seed and item, leave a thousand million pairs open."""
    rows = [[f"m{i}", i, f"i{i}", 1] for i in range(1000)]
    file = write_table(tmp_path / "s.csv", rows, ("method", "seed", "item", "score"))
    with pytest.raises(UserError, match=r"m0 has no score for seed 0, item i1 .*\(999,999,000 missing in all\)"):
        judge(file)


def test_comparisons_without_an_end_are_not_made(tmp_path):
    rows = [[m, 1, f"t{i}", 1] for m in "ab" for i in range(5001)]
    file = write_table(tmp_path / "s.csv", rows, ("method", "seed", "task", "score"))
    with pytest.raises(UserError, match="asks for 5,001 comparisons, at most 5,000 are made at once"):
        judge(file)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", [LOG, "results/a.json"])
def test_a_link_in_a_folder_shows_no_file_of_the_user(name, hard, tmp_path):
    file = tmp_path / "scores" / name
    file.parent.mkdir(parents=True)
    (tmp_path / "mine").write_text(json.dumps(SAMPLE if name == LOG else RESULT))
    (file.hardlink_to if hard else file.symlink_to)(tmp_path / "mine")
    with pytest.raises(UserError, match=f"it is a {'hard ' * hard}link, which is not followed"):
        judge(tmp_path / "scores")


def test_costs_that_are_no_figures_are_not_known(tmp_path):
    (tmp_path / "results").mkdir()
    for seed, time in enumerate(["long", -1, 10**400, [1]]):
        result = json.loads(changed_result(train_time=time, num_total_params="many", num_trainable_params=5))
        result["run_info"]["train_config"]["seed"] = seed
        for method in ("lora", "hira"):
            result["run_info"]["experiment_name"] = f"{method}/a-seed{seed}"
            (tmp_path / f"results/{method}{seed}.json").write_text(json.dumps(result))
    found = judge(tmp_path)["methods"][0]
    assert found["cost"]["train_seconds"] is None
    assert (found["trainable_parameters"], found["base_parameters"]) == (5, None)


def test_wrong_options_are_one_sentence(tmp_path):
    file = write_table(tmp_path / "s.csv", rows_of({"lora": 0.4, "mine": 0.9}))
    for options, words in (
        ({"reference": "lra"}, "Did you mean 'lora'"),
        ({"metric": "acc"}, "has no metric 'acc'"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"margin": float("inf")}, "margin is inf"),
        ({"margin": 1.0}, "all scores of task lie between 0 and 1: every method would be equivalent"),
        ({"level": 0.7}, "level is 0.7"),
    ):
        with pytest.raises(UserError, match=words):
            judge(file, **options)
    with pytest.raises(UserError, match="There is no "):
        judge(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="holds no scores: expected samples"):
        judge(tmp_path)
    (tmp_path / "s.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \.csv or \.tsv table"):
        judge(tmp_path / "s.json")


def test_one_seed_and_whole_scores_claim_no_more_than_they_bear(tmp_path):
    one = judge(write_table(tmp_path / "one.csv", rows_of({"a": 0.4, "b": 0.9}, seeds=1)))
    assert one["comparisons"][0]["verdict"] == "no verdict from one seed"
    assert "only one of task" in " ".join(one["notes"])
    columns = ("method", "seed", "score")
    (alone,) = judge(write_table(tmp_path / "a.csv", [["a", 1, 0.4], ["b", 1, 0.5]], columns))["comparisons"]
    assert alone["verdict"] == "no verdict from one seed"
    assert alone["low"] is alone["high"] is None, "one figure each has no interval"
    whole = [[m, s, 0.4 + 0.01 * s + 0.2 * (m == "b") + 0.001 * s * (m == "b")] for m in "ab" for s in range(5)]
    results = judge(write_table(tmp_path / "w.csv", whole, columns), margin=0.01)
    assert results["comparisons"][0]["verdict"] == "significantly better"
    assert "not for other items" in " ".join(results["notes"])
    same = [[m, s, 0.5] for m in "ab" for s in range(5)]
    (c,) = judge(write_table(tmp_path / "same.csv", same, columns), margin=0.01)["comparisons"]
    assert c["verdict"] == "inconclusive", "two accuracies that agree to the last digit are no proof of equivalence"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_page_says_what_bars_of_one_seed_are_for(tmp_path, seeds):
    rows = rows_of({"a": 0.4, "b": 0.9}, seeds=seeds)
    judge(write_table(tmp_path / "s.csv", rows), margin=0.02, out=tmp_path / "judged")
    report([tmp_path / "judged"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ("With one seed they are for other test items only" in page) == (seeds == 1)
    assert "margin of equivalence, which goes by 90% intervals" in page


def test_the_command_writes_results_and_a_page(tmp_path, call):
    from dual_lora.lab.results import load_study

    rows = rows_of({"lora": 0.4, "mine": 0.9}, task="x") + rows_of({"lora": 0.4, "mine": 0.4}, task="y")
    file = write_table(tmp_path / "s.tsv", rows, ("method", "task", "seed", "item", "score"))
    code, out, _ = call("judge", file, "--margin", "0.02", "--out", tmp_path / "judged", "--json")
    assert code == 0
    printed = json.loads(out)
    assert [c["task"] for c in printed["comparisons"]] == ["x", "y"]
    assert load_study(tmp_path / "judged").sentences == [c["sentence"] for c in printed["comparisons"]]
    page = (tmp_path / "judged" / "report.html").read_text()
    assert "significantly better" in page
    assert "could not be shown" not in page
    code, out, _ = call("judge", file, "--out", tmp_path / "judged")  # its own results are written anew
    assert code == 0
    assert f"As a page: {tmp_path / 'judged' / 'report.html'}" in " ".join(out.split())
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "results.json").write_text('{"study": {}}')
    with pytest.raises(UserError, match=r"results.json exists and was not written by"):
        judge(file, out=tmp_path / "study")
    code, out, _ = call("judge", file)
    assert code == 0
    assert "Verdicts" in out


@pytest.fixture(scope="module")
def harness_logs(tmp_path_factory):
    """Two methods with three seeds each, as the harness itself writes them."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with pip install '.[integrations]'")
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    tmp_path = tmp_path_factory.mktemp("harness")
    docs = [{"q": f"question {i}", "choices": ["yes", "no", "both"], "right": i % 3} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "quiz.yaml").write_text(
        "task: quiz\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: right\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for method, start in (("lora", 1), ("mine", 50)):
        for seed in range(3):
            tracker = EvaluationTracker(output_path=str(tmp_path / "out" / method / f"seed-{seed}"))
            found = simple_evaluate(
                model="dummy",
                tasks=["quiz"],
                task_manager=manager,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=start + seed,
                evaluation_tracker=tracker,
            )
            samples = found.pop("samples")
            tracker.save_results_aggregated(results=found, samples=samples)
            tracker.save_results_samples(task_name="quiz", samples=samples["quiz"])
    return tmp_path / "out"


@pytest.fixture
def evaluations(harness_logs, tmp_path):
    return Path(shutil.copytree(harness_logs, tmp_path / "out"))


def test_logs_of_the_harness_are_judged(evaluations, call):
    with pytest.raises(UserError, match=r"quiz has scores of 2 metrics, acc, acc_norm: choose one with --metric"):
        judge(evaluations)
    results = judge(evaluations, metric="acc", margin=0.1)
    (c,) = results["comparisons"]
    assert (c["candidate"], c["reference"], c["task"], c["metric"]) == ("mine", "lora", "quiz", "acc")
    assert c["spread"]["seeds"] == 3
    assert c["spread"]["items"] == 24
    for m in results["methods"]:  # the harness's own figure of each run
        for run in m["seeds"]:
            (file,) = (evaluations / m["method"] / f"seed-{run['seed']}").rglob("results_*.json")
            assert run["score"] == pytest.approx(json.loads(file.read_text())["results"]["quiz"]["acc,none"])
    code, out, _ = call("judge", evaluations, "--metric", "acc")
    assert code == 0
    assert "mine" in out


def test_the_harness_says_which_way_a_metric_is_better(evaluations):
    for file in evaluations.rglob("results_*.json"):
        value = json.loads(file.read_text())
        assert value["higher_is_better"]["quiz"] == {"acc": True, "acc_norm": True}
        value["higher_is_better"]["quiz"]["acc"] = False
        file.write_text(json.dumps(value))
    assert judge(evaluations, metric="acc")["comparisons"][0]["better"] == "less"
    (folder := evaluations / "lora" / "seed-0").rename(evaluations / "lora" / "gpt2")
    assert not folder.exists()
    assert judge(evaluations, metric="acc")["methods"][0]["seeds"][0]["seed"] == 0, "a model's name is no seed"


def test_a_log_likelihood_is_no_perplexity(tmp_path):
    """As the harness logs lambada: an item's "perplexity" is its log-likelihood, of which more is better. Read as a
    perplexity every verdict was the wrong way round."""
    for method, worth in (("lora", -2.0), ("mine", -1.0)):
        for seed in (1, 2, 3):
            folder = tmp_path / method / f"seed-{seed}"
            folder.mkdir(parents=True)
            likely = [worth - 0.1 * item - 0.01 * seed for item in range(8)]
            samples = [
                {"doc_id": i, "doc_hash": f"{i}", "filter": "none", "metrics": ["perplexity", "acc"]}
                | {"perplexity": value, "acc": i % 2}
                for i, value in enumerate(likely)
            ]
            log = folder / "samples_lambada_2026-01-01T00-00-00.000000.jsonl"
            log.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            results = {
                "results": {"lambada": {"perplexity,none": math.exp(-sum(likely) / 8), "acc,none": 0.5}},
                "higher_is_better": {"lambada": {"perplexity": False, "acc": True}},
                "n-samples": {"lambada": {"original": 8, "effective": 8}},
            }
            (folder / "results_2026-01-01T00-00-00.000000.json").write_text(json.dumps(results))
    notes = judge(tmp_path, metric="acc")["notes"]
    assert "Left out, as they are no means over items: perplexity on lambada." in notes
    with pytest.raises(UserError, match=r"no metric 'perplexity'.* no means over items: perplexity on lambada"):
        judge(tmp_path, metric="perplexity")
    lines = log.read_text().splitlines(True)
    log.write_text("".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r"line 9: mine, seed 3, item 0 0, lambada has a score already"):
        judge(tmp_path, metric="acc")
    log.write_text("".join([lines[0].replace('"acc": 0', '"acc": 1'), *lines[1:]]))
    with pytest.raises(UserError, match=r"mean of acc on lambada in .*seed-3.* differs from the one in its results"):
        judge(tmp_path, metric="acc")
    log.write_text("".join(lines[:7]))
    with pytest.raises(UserError, match=r"holds 7 documents, and the harness scored 8"):
        judge(tmp_path, metric="acc")


def test_logs_that_do_not_pair_are_named(evaluations):
    (file,) = (evaluations / "mine" / "seed-1").rglob("samples_*.jsonl")
    lines = file.read_text().splitlines(True)
    changed = json.loads(lines[3])
    changed["doc_hash"] = "0" * 64
    file.write_text("".join([*lines[:3], json.dumps(changed) + "\n", *lines[4:]]))
    with pytest.raises(UserError, match=r"no score for seed \d, item \d+ \w+ of quiz"):
        judge(evaluations, metric="acc")
    changed = json.loads(lines[3]) | {"prompt_hash": "1"}
    file.write_text("".join([*lines[:3], json.dumps(changed) + "\n", *lines[4:]]))
    notes = judge(evaluations, metric="acc")["notes"]
    assert any("On quiz the methods were asked 1 of the items in different words" in note for note in notes)
    file.write_text("".join(lines[:3]) + '{"doc_id": 1\n')
    with pytest.raises(UserError, match=r"line 4: not valid JSON"):
        judge(evaluations, metric="acc")
    file.write_text("".join(lines))
    twice = file.with_name("samples_quiz_2030-01-01T00-00-00.000000.jsonl")
    twice.write_text("".join(lines))
    with pytest.raises(UserError, match=r"two evaluations of one run on quiz"):
        judge(evaluations, metric="acc")
    twice.rename(evaluations / twice.name)
    with pytest.raises(UserError, match=r"lies in .* itself: expected"):
        judge(evaluations, metric="acc")


@pytest.mark.parametrize("metric", ["accuracy gap", "f1_drop", "exact-match change", "1-acc", "inverse_accuracy"])
def test_a_distance_or_a_change_is_no_metric_whose_direction_is_known(metric, tmp_path):
    rows = [[m, s, i, metric, (s + i + (m == "b")) % 3 / 3] for m in "ab" for s in range(4) for i in range(9)]
    results = judge(write_table(tmp_path / "s.csv", rows, ("method", "seed", "item", "metric", "score")))
    assert any(f"Which way {metric} is better was not said" in note for note in results["notes"])


def test_one_model_evaluated_again_and_again_is_named(tmp_path):
    """A greedy evaluation gives the same answers each time: five of them are no five seeds, whatever p says."""
    answers = {"lora": [i % 4 > 0 for i in range(60)], "mine": [i % 16 > 0 for i in range(60)]}
    answers["same"] = answers["lora"]
    rows = [[m, seed, i, int(right)] for m, own in answers.items() for seed in range(5) for i, right in enumerate(own)]
    results = judge(write_table(tmp_path / "s.csv", rows))
    assert results["comparisons"][0]["verdict"] == "significantly better"
    (said,) = [note for note in results["notes"] if "there is one seed and no verdict" in note]
    assert said.startswith("On task every seed of lora, mine has the same scores")
    whole = [[m, seed, 0.8 + 0.01 * (m == "mine")] for m in ("lora", "mine") for seed in range(5)]
    results = judge(write_table(tmp_path / "w.csv", whole, ("method", "seed", "score")))
    assert any("there is one seed" in note for note in results["notes"])
    rows[0][3] = 1 - rows[0][3]
    assert not any("there is one seed" in n for n in judge(write_table(tmp_path / "r.csv", rows))["notes"])


@pytest.mark.parametrize("items", [0, 30])
def test_copied_seeds_are_refused(tmp_path, items):
    """Three seeds copied four times made 13 % of studies err in place of 5 %."""
    random = np.random.default_rng(0)
    once = {m: random.integers(0, 2, (3, items)) if items else random.normal(0.8, 0.02, (3, 1)) for m in "ab"}
    columns = ("method", "seed", "item", "score") if items else ("method", "seed", "score")

    def source(tables):
        rows = [
            [m, s, *([i] if items else []), float(x)] for m, own in tables.items() for s, row in enumerate(own)
            for i, x in enumerate(row)
        ]  # fmt: skip
        return write_table(tmp_path / "s.csv", rows, columns)

    with pytest.raises(
        UserError, match=r"same scores in every method, to the last digit: 3 of 0, 4 of 1, 5 of 2, 6 of"
    ):
        judge(source({m: np.tile(own, (4, 1)) for m, own in once.items()}))
    notes = judge(
        source({"a": np.concatenate([once["a"], once["a"][:1]]), "b": np.tile(once["b"], (2, 1))[[0, 1, 2, 4]]})
    )
    (said,) = [n for n in notes["notes"] if "the same scores" in n and "of a " in n]
    assert "seeds of a have the same scores, to the last digit: 3 as 0" in said
    assert not any("same scores" in note for note in judge(source(once))["notes"])


def test_one_method_under_two_names_is_named(tmp_path):
    """A copied file, or an adapter that was on in neither evaluation: equivalent, and about one model."""
    rows = rows_of({"lora": 0.6, "other": 0.6})
    twin = [["mine", *row[1:]] for row in rows if row[0] == "lora"]
    notes = judge(write_table(tmp_path / "s.csv", [*rows, *twin]))["notes"]
    (said,) = [note for note in notes if "compares a model with itself" in note]
    assert said.startswith("On task lora and mine have the same scores in every run")
    twin[0][3] = 1 - twin[0][3]
    assert not any("itself" in note for note in judge(write_table(tmp_path / "t.csv", [*rows, *twin]))["notes"])
    whole = [[m, seed, 0.8] for m in ("lora", "mine") for seed in range(3)]
    columns = ("method", "seed", "score")
    assert any("itself" in n for n in judge(write_table(tmp_path / "w.csv", whole, columns))["notes"])
    right = [[m, seed, 1.0] for m in ("lora", "mine") for seed in range(3)]
    assert not any("itself" in n for n in judge(write_table(tmp_path / "r.csv", right, columns))["notes"])


def test_items_that_are_there_several_times_are_named(tmp_path):
    """Each item five times under other names made a third of studies err in place of 5 %."""
    loss = np.random.default_rng(0).normal(1, 0.1, (2, 3, 40))
    again = np.concatenate([loss, loss[..., :4]], -1)

    def notes(tables):
        rows = [[m, s, i, float(x)] for m, own in zip("ab", tables, strict=True) for s, row in enumerate(own)
                for i, x in enumerate(row)]  # fmt: skip
        return judge(write_table(tmp_path / "s.csv", rows), better="less")["notes"]

    assert any("On task 4 of 44 items are copies of others. Leave them out" in note for note in notes(again))
    assert not any("copies of others" in note for note in notes(loss))
    assert not any("copies of others" in note for note in notes(np.round(again)))  # few values agree by chance


def test_right_answers_that_are_all_there_twice_are_named(tmp_path):
    """As right and wrong answers agree by chance, copies of a few items can not be told from others."""
    random = np.random.default_rng(0)
    right = (random.random((2, 4, 60)) < random.random(60)).astype(float)

    def notes(tables):
        rows = [[m, s, i, x] for m, own in zip("ab", tables.tolist(), strict=True) for s, row in enumerate(own)
                for i, x in enumerate(row)]  # fmt: skip
        return judge(write_table(tmp_path / "s.csv", rows))["notes"]

    twice = np.concatenate([right, right], -1)
    assert any("On task each item seems to be there 2 times" in note for note in notes(twice[..., ::-1]))
    assert not any("seems to be there" in note for note in notes(right))
    assert not any("seems to be there" in note for note in notes(twice[..., :-1]))
    few = np.repeat(right[:, :2, :2], 20, -1)  # four rows of answers: all twenty times by chance
    assert not any("seems to be there" in note for note in notes(few))


def test_documents_that_are_there_several_times_are_named(tmp_path):
    """Right and wrong answers agree by chance; the harness's hash of a document does not."""
    for method in ("lora", "mine"):
        file = tmp_path / method / "1" / "samples_quiz_2026-01-01T00-00-00.0.jsonl"
        file.parent.mkdir(parents=True)
        samples = [{"doc_id": i, "doc_hash": f"{i % 30:08d}", "metrics": ["acc"], "acc": i % 2} for i in range(40)]
        file.write_text("\n".join(map(json.dumps, samples)))
    notes = judge(tmp_path)["notes"]
    assert sum("On quiz 10 of 40 items are copies of others" in note for note in notes) == 1


def test_a_method_that_is_absent_from_a_task_is_named(tmp_path):
    rows = [*rows_of({"lora": 0.5, "mine": 0.6}, task="easy"), *rows_of({"lora": 0.5, "other": 0.5}, task="hard")]
    columns = ("method", "task", "seed", "item", "score")
    notes = judge(write_table(tmp_path / "s.csv", rows, columns))["notes"]
    assert any("not compared: other on easy, mine on hard. Give a diverged run" in note for note in notes)
    both = rows_of({"lora": 0.5, "mine": 0.6}, task="easy")
    assert not any("not compared" in note for note in judge(write_table(tmp_path / "b.csv", both, columns))["notes"])


def test_percent_beside_shares_is_asked_about(tmp_path):
    rows = rows_of({"a": 0.5, "b": 0.6})
    plain = judge(write_table(tmp_path / "s.csv", rows))
    assert not any("in percent" in note for note in plain["notes"])
    scaled = [[m, s, i, 100 * score if m == "b" else score] for m, s, i, score in rows]
    said = judge(write_table(tmp_path / "p.csv", scaled))["notes"]
    assert any(
        "scores of a lie between 0 and 1, those of b go up to 100: are some of them in percent?" in n for n in said
    )
    one = [[m, s, i, 100 * score if (m, s) == ("b", 2) else score] for m, s, i, score in rows]
    said = judge(write_table(tmp_path / "o.csv", one))["notes"]
    assert any("of a, b (seed 1, 3) lie between 0 and 1, those of b (seed 2) go up to 100" in note for note in said)
    hard = [[m, s, i, 100 * score if m == "b" else score] for m, s, i, score in rows_of({"a": 0.5, "b": 0.1})]
    assert any("in percent" in note for note in judge(write_table(tmp_path / "h.csv", hard))["notes"])


def test_a_small_level_is_written_in_full(tmp_path, call):
    file = write_table(tmp_path / "s.csv", rows_of({"a": 0.2, "b": 0.9}))
    results = judge(file, level=0.004)
    assert "99.6% interval" in results["comparisons"][0]["sentence"]
    assert any(note.endswith("0.4% at most.") for note in results["notes"])
    assert call("judge", file, "--level", "0.004", "--out", tmp_path / "out")[0] == 0
    report([tmp_path / "out"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "99.6% from" in page
    assert "100% from" not in page
    assert "their 99.6% intervals" in page


def test_small_scores_are_shown_with_their_digits(tmp_path, call):
    noise = np.random.default_rng(0).normal(size=(2, 4, 30))
    rows = [
        [m, s, i, (1 + 2 * k) * 1e-5 + 1e-7 * noise[k, s, i]]
        for k, m in enumerate("ab")
        for s in range(4)
        for i in range(30)
    ]
    file = write_table(tmp_path / "s.csv", rows)
    assert call("judge", file, "--better", "less", "--out", tmp_path / "out")[0] == 0
    report([tmp_path / "out"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    table = page[page.index("verdicts</caption>") :] if "verdicts</caption>" in page else page
    assert "−2.0" in table or "−2e-05" in table
    assert "−0.0000" not in page
