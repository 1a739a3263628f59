"""A single run on a page: loss, scores, classes, wrong answers, cost. Made of the run's folder alone."""

import json

import pytest

from dual_lora.lab.report.blocks import Chart, Table
from dual_lora.lab.report.gather import find, gather
from dual_lora.lab.report.report import _file_stamps, build_page, report
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory, tiny_encoder, reviews):
    """A classifier that has learned too little, with its evaluation and validation losses."""
    from dual_lora.lab.recipe.read import build_recipe

    folder = tmp_path_factory.mktemp("runs") / "reviewed"
    data = {"columns": ["label", "sentence"], "fields": {"text": "sentence"}, "holdout": 8}
    data |= {name: str(reviews / f"{name}.tsv") for name in ("train", "test")}
    recipe = build_recipe({
        "model": {"path": str(tiny_encoder), "head": "classification"}, "method": {"name": "lora", "r": 4},
        "data": data, "train": {"steps": 6, "batch_size": 8, "log_every": 2, "validate_every": 3},
    })  # fmt: skip
    run(recipe, folder, progress=False)
    evaluate(folder, progress=False)
    return folder


def blocks_of(folder):
    page = build_page(gather([folder]), "x")
    assert not page.problems
    section, scores = [section for section in page.sections if section.group == "Runs"]
    assert scores.source.file.endswith("result.json"), "scores come from the evaluation, not from the training's record"
    found = [block for block in [*section.blocks, *scores.blocks] if isinstance(block, Chart | Table)]
    return section, {block.title: block for block in found}


def test_everything_of_a_run_is_shown(reviewed):
    section, blocks = blocks_of(reviewed)
    assert section.title == "reviewed: run"
    lead = section.blocks[0].text
    assert lead.startswith("lora on ")
    assert "finished, 6 of 6 steps, 56 examples" in lead
    loss, rate = blocks["Loss"].views
    assert {point["series"] for point in loss.points} == {"training", "validation"}
    assert [point["x"] for point in loss.points if point["series"] == "validation"] == [3, 6]
    assert rate.name == "learning rate"
    result = json.loads(next(reviewed.glob("evaluation/*/result.json")).read_text())
    scores = {row["metric"]: row for row in blocks["Scores on 24 test records"].rows}
    assert scores["accuracy"]["tuned"] == result["metrics"]["tuned"]["accuracy"]
    assert set(scores["accuracy"]) == {"metric", "base", "tuned"}
    cost = {row["what"]: row["value"] for row in blocks["Cost"].rows}
    assert {"trained", "time", "memory", "weights", "device"} == set(cost)


def test_the_confusion_matrix_adds_up_to_the_scores(reviewed):
    _, blocks = blocks_of(reviewed)
    result = json.loads(next(reviewed.glob("evaluation/*/result.json")).read_text())
    items = [json.loads(line) for line in next(reviewed.glob("evaluation/*/items.jsonl")).read_text().splitlines()]
    tuned = [item for item in items if item["variant"] == "tuned"]
    title = "Confusion matrix of 24 test records"
    heat = next(b for b in build_page(gather([reviewed]), "x").sections[1].blocks if getattr(b, "form", "") == "heat")
    assert heat.title == title
    points = {(p["label"], p["x"]): p["y"] for p in heat.views[0].points}
    assert sum(points.values()) == 24
    assert points["0", "0"] + points["1", "1"] == round(24 * result["metrics"]["tuned"]["accuracy"])
    for (right, said), count in points.items():
        assert count == sum(item["expected"] == right and item["predicted"] == said for item in tuned)
    wrong = sum(not item["correct"] for item in tuned)
    shown = [block for name, block in blocks.items() if name.startswith("Wrong answers of classification")]
    assert bool(shown) is bool(wrong)
    if shown:
        assert shown[0].title.endswith(f": {wrong} of 24")
        assert [row["nats"] for row in shown[0].rows] == sorted((row["nats"] for row in shown[0].rows), reverse=True)
        assert all(row["expected"] != row["predicted"] and "test.tsv, line" in row["where"] for row in shown[0].rows)


def test_the_command_writes_a_page(reviewed, call, tmp_path):
    out = tmp_path / "r.html"
    code, said, _ = call("report", reviewed, "--out", out, "--tables", tmp_path / "tables", "--json")
    assert code == 0
    assert (json.loads(said)["runs"], json.loads(said)["made_of"], json.loads(said)["problems"]) == (1, "1 run", [])
    assert "reviewed: run" in out.read_text()
    assert any("scores-on" in file.name for file in (tmp_path / "tables").iterdir())
    assert report([reviewed.parent], tmp_path / "all.html").runs == 1


def test_a_study_s_runs_are_not_shown_one_by_one(reviewed, tmp_path):
    import shutil

    shutil.copytree(reviewed, tmp_path / "study/runs/one")
    (tmp_path / "study/study.json").write_text("{}")
    assert not [file for file in find([tmp_path / "study"]) if file.name == "record.json"]
    assert not [file for file in find([tmp_path / "study/runs"]) if file.name == "record.json"]
    assert [file.parent.name for file in find([tmp_path / "study/runs/one"]) if file.name == "record.json"] == ["one"]


def test_a_run_under_way_and_an_older_one_are_shown_as_far_as_they_go(reviewed, tmp_path):
    import shutil

    folder = tmp_path / "young"
    shutil.copytree(reviewed, folder)
    record = json.loads((folder / "record.json").read_text())
    del record["result"]
    (folder / "record.json").write_text(json.dumps(record | {"state": "running"}))
    items = next(folder.glob("evaluation/*/items.jsonl"))
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    items.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "expected"}) + "\n" for row in rows))
    section, blocks = blocks_of(folder)
    assert "running." in section.blocks[0].text
    assert "trained" in {row["what"] for row in blocks["Cost"].rows}
    assert not any(isinstance(block, Chart) and block.form == "heat" for block in section.blocks)
    assert folder / "metrics.jsonl" in [mark[0] for mark in _file_stamps([folder])], (
        "a page that is watched follows the loss"
    )


def test_a_stranger_s_run_costs_the_page_nothing_else(reviewed, tmp_path):
    import shutil

    shutil.copytree(reviewed, tmp_path / "good")
    shutil.copytree(reviewed, tmp_path / "odd")
    (tmp_path / "odd/record.json").write_text('{"state": "<script>", "method": []}')
    shutil.copytree(reviewed, tmp_path / "linked")
    (tmp_path / "linked/metrics.jsonl").unlink()
    (tmp_path / "linked/metrics.jsonl").symlink_to("/etc/passwd")
    result = report([tmp_path], tmp_path / "r.html")
    assert result.runs == 2
    assert len(result.problems) == 2
    assert "<script>" not in (tmp_path / "r.html").read_text().split("odd/record.json")[1][:200]
