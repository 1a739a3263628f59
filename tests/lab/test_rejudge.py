"""A finished study is judged again from its results.json: the verdicts that its runs give, and what changed is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")

from tiny_study import made

from dual_lora.lab.errors import UserError
from dual_lora.lab.study import notes
from dual_lora.lab.study.rejudge import main, rejudge

STUDIES = Path(__file__).parents[2] / "results" / "studies"


def old(results):
    """As a file of format 1 had it: no seeds' part of the error, and more words for less."""
    results = json.loads(json.dumps(results))
    for c in results["comparisons"]:
        del c["spread"]["seed_error"], c["same_low"], c["same_high"]
        c["spread"]["freedom"] = c["spread"]["items"] - 1.0
        c["verdict"] = "worse"
    del results["false_alarm"]
    return results | {"format": 1, "overall": [], "ranking": [], "untrained": []}


@pytest.mark.parametrize("diverged", [(), {("b", 2)}])
def test_stored_scores_give_the_verdicts_that_runs_gave(tmp_path, diverged):
    fresh = made(tmp_path, {"a": 0.5, "b": 0.7, "c": 0.7}, margin=0.02, diverged=diverged)
    again = rejudge(old(fresh))
    assert again["format"] == fresh["format"]
    assert not {"overall", "ranking"} & set(again)
    for now, then in zip(again["comparisons"], fresh["comparisons"], strict=True):
        assert now["verdict"] == then["verdict"]
        figures = ("low", "high", "p", "p_holm", "p_same", "same_low", "same_high", "visible")
        assert [now[k] for k in figures] == pytest.approx([then[k] for k in figures])
    assert again["false_alarm"] == pytest.approx(fresh["false_alarm"])


def test_what_changed_is_written_down_and_said(tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(old(made(tmp_path, {"a": 0.5, "b": 0.5}, tasks=("t",)))))
    assert main([str(file)]) == 0
    assert "b against a: worse -> not significant" in capsys.readouterr().out
    results = json.loads(file.read_text())
    (amendment,) = results["amendments"]
    assert amendment["changed"] == [
        {"candidate": "b", "reference": "a", "model": "", "task": "t", "before": "worse", "after": "not significant"}
    ]
    (said,) = notes.amended(results)
    assert said.endswith("Verdicts changed: b from worse to not significant.")
    assert rejudge(results)["amendments"][1]["changed"] == [], "judged twice, nothing changes"


def test_everything_published_is_judged_by_todays_rule():
    """Each file's verdicts are those that its scores give today: the studies', and those of scores made by scripts."""
    scripts = [
        f for f in sorted((STUDIES.parent / "worth").glob("*.json")) if "comparisons" in json.loads(f.read_text())
    ]
    files = [*sorted(STUDIES.glob("*/results.json")), *scripts]
    assert len(scripts) >= 30
    assert len(files) >= 70
    for file in files:
        results = json.loads(file.read_text())
        judged_before = results["provenance"]["versions"]["dual-lora"] == "0.1.0"  # by the former rule
        assert file in scripts or results["amendments"] or not judged_before, file
        again = rejudge(results)
        assert again["amendments"][-1]["changed"] == [], file
        for now, then in zip(again["comparisons"], results["comparisons"], strict=True):
            assert now["p_holm"] == pytest.approx(then["p_holm"], rel=1e-6), (file, then["sentence"])
        assert again["false_alarm"] == (results["false_alarm"] and pytest.approx(results["false_alarm"]))
        assert results["false_alarm"] is None or results["false_alarm"] <= 0.05 + 1e-3


def test_seeds_part_of_the_error_follows_from_the_stored_scores():
    results = json.loads((STUDIES / "groups" / "results.json").read_text())
    at = {m["method"]: [s["score"] for s in m["seeds"]] for m in results["methods"]}
    for c in results["comparisons"]:
        d = np.subtract(at[c["candidate"]], at[c["reference"]])
        assert c["spread"]["seed_error"] == pytest.approx(d.std(ddof=1) / np.sqrt(len(d)))


@pytest.mark.parametrize("reach", [float("nan"), 0.0, -1.0])
def test_an_impossible_reach_is_named(reach):
    results = json.loads((STUDIES / "quick" / "results.json").read_text())
    results["comparisons"][0]["spread"]["reach"] = reach
    with pytest.raises(UserError, match=r"reach of dual_lora against lora is .*: expected a number above 0"):
        rejudge(results)


def test_a_file_of_something_else_is_named():
    with pytest.raises(UserError, match="no results of a study"):
        rejudge({"study": {"name": "s", "tasks": ["t"], "methods": {"a": {}, "b": {}}, "seeds": 2}})


def test_judged_scores_keep_their_margin_and_direction(tmp_path):
    """They carry both in the comparisons: judged as a study they lost them."""
    from dual_lora.lab.judge.judge import judge

    file = tmp_path / "s.csv"
    rows = [f"{m},{s},{i},loss,{s * i + 5 * (m == 'b')}" for m in "abc" for s in range(3) for i in range(3)]
    file.write_text("\n".join(["method,seed,item,metric,score", *rows]))
    results = judge(file, margin=6, better="more")
    again = rejudge(json.loads(json.dumps(results)))
    assert again["judged_from"] == "s.csv"
    assert again["amendments"][-1]["changed"] == []
    assert again["comparisons"] == results["comparisons"]
