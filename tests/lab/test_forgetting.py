"""Forgetting: the rise of the loss on other text, measured as it is defined and judged beside the task."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("pydantic")

from tiny_study import write_study

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, identity
from dual_lora.lab.run.evaluate import evaluate, forgetting_rows
from dual_lora.lab.run.train import run
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.rejudge import rejudge

TEXTS = "the sky is blue\nthe sea is cold\nfire\nice is cold the fire is warm\n"


@pytest.fixture
def other_text(tmp_path):
    (tmp_path / "texts.txt").write_text(TEXTS)
    return tmp_path / "texts.txt"


def mean_loss(model, tokenizer):
    """Row by row: mean over all tokens of all texts that a token goes before."""
    losses = []
    for text in TEXTS.splitlines():
        ids = torch.tensor([tokenizer(text).input_ids])
        if ids.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "lora", "r": 4, "lora_dropout": 0.1},
        {"name": "lora", "r": 4, "init_lora_weights": "pissa"},  # without its adapter, this is not the base
        {"name": "dual_lora", "r": 4},
        {"name": "full"},
    ],
    ids=["lora", "pissa", "dual_lora", "full"],
)
def test_it_is_the_rise_of_the_mean_loss_a_token(method, lm_values, other_text, tmp_path):
    lm_values["method"] = method
    lm_values["evaluate"] = {"tasks": ["choice"], "forgetting": str(other_text), "batch_size": 2}
    recipe = build_recipe(lm_values)
    result = run(recipe, tmp_path / "run", progress=False)
    base = load_model(recipe.model)
    before = mean_loss(base.model.eval(), base.tokenizer)
    after = mean_loss(result.tuned.model.eval(), base.tokenizer)
    assert abs(after - before) > 1e-3, "else the test could not fail"
    found = evaluate(result.tuned, variants=["tuned"], progress=False)
    assert found.metrics["tuned"]["forgetting"] == pytest.approx(after - before, abs=1e-4)
    assert found.metrics["tuned"]["text_loss"] == pytest.approx(after, rel=1e-4)
    assert len([item for item in found.items if item["task"] == "forgetting"]) == 3, "a text of one token says nothing"
    assert found.scores("tuned", "choice"), "the task's own items are as they were"
    if method["name"] != "full":
        again = evaluate(open_tuned(tmp_path / "run"), progress=False).metrics
        assert again["tuned"]["forgetting"] == pytest.approx(after - before, abs=1e-3)
        assert "forgetting" not in again["base"]


def test_what_is_no_text_is_named(lm_values, encoder_values, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"title": "x"}\n')
    lm_values["evaluate"]["forgetting"] = str(tmp_path / "other.jsonl")
    tuned = open_tuned(lm_values["model"]["path"])
    with pytest.raises(
        UserError, match=r"other.jsonl, line 1: a text .* is missing, found title; expected a field text"
    ):
        forgetting_rows(tuned, build_recipe(lm_values).evaluate)
    encoder_values["evaluate"] = {"forgetting": "texts.txt"}
    with pytest.raises(
        UserError, match=r"evaluate.forgetting needs a language model, and model.head is classification"
    ):
        build_recipe(encoder_values)


def test_it_is_left_out_of_the_identity_of_runs_that_do_not_measure_it(lm_values):
    assert "forgetting" not in identity(build_recipe(lm_values))["evaluate"]
    lm_values["evaluate"]["forgetting"] = "texts.txt"
    assert identity(build_recipe(lm_values))["evaluate"]["forgetting"] == "texts.txt"


@pytest.mark.slow
def test_a_study_judges_it_beside_its_task(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("a b c d e f\ng h i j\nk l m n o p a b\n")
    file = write_study(
        tmp_path,
        overrides={"evaluate": {"forgetting": str(texts)}},
        margin={"loss": 0.02, "forgetting": 5.0},
        seeds=2,
        search={"space": {"learning_rate": [1e-2]}},
    )
    results = compare(file, tmp_path / "out", progress=False)
    assert results["complete"]
    task, other = results["comparisons"]
    assert (task["metric"], other["metric"]) == ("loss", "forgetting")
    assert other["spread"] | {"seeds": 2, "items": 3} == other["spread"]
    assert other["margin"] == 5.0
    for m, side in zip(results["methods"][::-1], ("candidate_score", "reference_score"), strict=True):
        assert m["forgetting"] == pytest.approx(sum(s["figures"]["forgetting"] for s in m["seeds"]) / 2)
        assert other[side] == pytest.approx(m["forgetting"])
        assert all("forgetting" not in (t.get("figures") or {}) for t in m["trials"])
    assert other["difference"] == pytest.approx(other["reference_score"] - other["candidate_score"])
    assert rejudge(results)["amendments"][-1]["changed"] == []
    from dual_lora.lab.report.report import report
    from dual_lora.lab.report.tables import show_results

    show_results(results)
    assert "forgetting" in capsys.readouterr().out
    page = report([tmp_path / "out"], tmp_path / "page.html")
    assert page.problems == []
    keys = {s["key"] for m in results["methods"] for s in m["seeds"]}
    texts.write_text("p o n m\n")
    with pytest.raises(UserError, match=r"recipes or data have changed.*: letters records\.forgetting\. A study"):
        compare(file, tmp_path / "out", progress=False)
    runs = tmp_path / "out" / "runs"
    again = compare(file, tmp_path / "new", runs=runs, progress=False)
    assert not keys & {s["key"] for m in again["methods"] for s in m["seeds"]}, "other text is another run"
    trials = [[t["key"] for m in r["methods"] for t in m["trials"]] for r in (results, again)]
    assert trials[0] == trials[1], "the search does not measure it"
    (runs / f"{again['methods'][0]['seeds'][0]['key']}.forgetting.json").unlink()
    notes = " ".join(json.loads((tmp_path / "new" / "results.json").read_text())["notes"])
    assert "is not compared" not in notes
    assert "Forgetting of lora on letters is not compared" in " ".join(
        compare(file, tmp_path / "new", runs=runs, progress=False)["notes"]
    )
