"""Files that are not what a study's runs wrote, or were made for: noticed, and never judged."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("peft")

from tiny_study import SHORT, figures, laid_out, outcomes, write_records, write_study

from dual_lora.lab.errors import UserError
from dual_lora.lab.study import compare as comparing
from dual_lora.lab.study import perform
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.job import damage, run_file
from dual_lora.lab.study.notes import seen_before


def swapped(a, b):
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)


def less_of_one(a, b):
    rows = json.loads(a.read_text())
    a.write_text(json.dumps([[rows[0][0] / 2, rows[0][1]], *rows[1:]]))


def shortened(a, b):
    a.write_text(json.dumps(json.loads(a.read_text())[:-1]))


@pytest.mark.parametrize(
    ("change", "words", "again"),
    [
        (swapped, "does not give the loss that", 2),
        (less_of_one, "does not give the loss that", 1),
        (shortened, "is damaged or missing", 1),
    ],
)
def test_scores_of_another_run_are_not_judged(change, words, again, tiny, whole, copy_of_whole):
    """A run's score and its items' scores lie in two files: the verdict came from the one, the table from the other."""
    runs, before = copy_of_whole / "runs", outcomes(copy_of_whole)
    first, second = (m["seeds"][0]["key"] for m in whole["methods"])
    change(run_file(runs, first, "scores"), run_file(runs, second, "scores"))
    assert words in damage(runs, first)
    assert figures(compare(write_study(tiny), copy_of_whole, progress=False)) == figures(whole)
    assert sum(before[name] != time for name, time in outcomes(copy_of_whole).items()) == again


def test_a_score_that_the_items_do_not_give_is_not_believed(tiny, whole, copy_of_whole):
    file = run_file(copy_of_whole / "runs", whole["methods"][0]["seeds"][0]["key"])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"score": 0.1}))
    assert figures(compare(write_study(tiny), copy_of_whole, progress=False)) == figures(whole)


def test_runs_on_different_numbers_of_items_do_not_pair(tiny, whole, copy_of_whole):
    """A data set on the hub may change between two runs: no traceback, and no pairs."""
    runs, key = copy_of_whole / "runs", whole["methods"][0]["seeds"][0]["key"]
    rows = json.loads(run_file(runs, key, "scores").read_text())[:-1]
    run_file(runs, key, "scores").write_text(json.dumps(rows))
    nats, tokens = map(sum, zip(*rows, strict=True))
    file = run_file(runs, key)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"items": len(rows), "score": nats / tokens}))
    with pytest.raises(UserError, match=r"different numbers of items \(39, 40\), so they cannot be paired"):
        compare(write_study(tiny), copy_of_whole, progress=False)


def test_records_that_change_while_a_study_goes_on(tiny, tmp_path, monkeypatch):
    """The runs after the change would carry the old records' name, and be paired with those before."""
    folder = shutil.copytree(tiny, tmp_path / "own", ignore=shutil.ignore_patterns("whole", "short"))
    study, original, ended = write_study(folder, **SHORT), perform._trained, []

    def trained(job, runs, *more):
        came = original(job, runs, *more)
        ended.append(job.method)
        if len(ended) == 1:
            write_records(folder / "test.jsonl", 3, 40)
        return came

    with monkeypatch.context() as patch:
        patch.setattr(perform, "_trained", trained)
        results = compare(study, tmp_path / "out", progress=False)
    assert ended == ["lora"], "no run on other records is begun"
    assert not results["complete"]
    assert len(results["failed"]) == 2
    assert all("data have changed while the study went on (test)" in said for said in results["failed"])
    assert results["comparisons"] == []
    with pytest.raises(UserError, match=r"recipes or data have changed since it was started"):
        compare(study, tmp_path / "out", progress=False)
    write_records(folder / "test.jsonl", 2, 40)
    assert compare(study, tmp_path / "out", progress=False)["complete"]


def test_runs_seen_before_an_amended_plan_are_named(tiny, whole, tmp_path, monkeypatch):
    """Another study has done the runs; this one is changed before it has planned any. Nothing said that they could be
    seen by then."""
    with monkeypatch.context() as patch:
        patch.setattr(comparing.Runner, "run", lambda self: None)
        compare(write_study(tiny), tmp_path / "out", runs=tiny / "whole" / "runs", progress=False)
    changed = write_study(tiny, seeds=3)
    results = compare(changed, tmp_path / "out", runs=tiny / "whole" / "runs", longer=True, progress=False)
    write_study(tiny)
    assert [(a["ended"], a["of"]) for a in results["amendments"]] == [(0, 0)]
    assert (
        "4 of the final runs had ended before this study's plan was written, and were taken over." in results["notes"]
    )
    assert seen_before({"before": 4}, [{"ended": 4}]) == []


def test_a_margin_that_everything_is_within_is_refused(tiny):
    """1 for one point of a hundred made every method equivalent."""
    with pytest.raises(UserError, match=r"tasks\.letters: the margin for choice is 1, and it is never above 1"):
        laid_out(tiny, tasks={"letters": {"recipe": str(tiny / "letters.yaml"), "metric": "choice"}}, margin=1)
    laid_out(tiny, margin=1)  # of a loss
    write_study(tiny)
