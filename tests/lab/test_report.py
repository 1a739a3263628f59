"""The report without a browser: what is gathered, said and escaped."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import report_material as material

from dual_lora.lab.errors import UserError
from dual_lora.lab.report import page
from dual_lora.lab.report.gather import find, gather
from dual_lora.lab.report.overall import overall_sections
from dual_lora.lab.report.overview import _answer
from dual_lora.lab.report.report import report, watch


@pytest.fixture
def folder(tmp_path):
    return material.write(tmp_path / "work")


def page_of(folder, **options):
    out = folder.parent / "report.html"
    report([folder], out, **options)
    return out.read_text(encoding="utf-8")


def test_page_loads_nothing(folder):
    page = page_of(folder)
    assert not re.search(r"""(src|href|url|action)\s*[=(]\s*["']?(https?:)?//""", page)
    assert "default-src &#39;none&#39;" in page


def test_hostile_names_do_not_leave_their_text(tmp_path):
    page = page_of(material.write(tmp_path / "work", material.HOSTILE))
    assert page.count("<script") == page.count("</script>") == 3
    assert "<img" not in page
    assert "window.pwned=2&lt;/script&gt;" in page
    assert json.dumps(material.HOSTILE)[1:-1] in json.dumps(material.data_of(page)), "there it is a text"


def test_a_mean_over_layers_counts_entries():
    from dual_lora.lab.results import mean_over_layers, spread_over_layers

    rows = [{"O": 1, "I": 1, "zero": 0.0}, {"O": 1, "I": 3, "zero": 1.0}, {"O": 9, "I": 9}]
    assert mean_over_layers(rows, "zero") == 0.75
    assert mean_over_layers(rows, "nothing") is None
    with pytest.raises(ValueError, match="could not convert string to float"):  # of 10¹³ letters, if it were repeated
        mean_over_layers([{"O": 10**9, "I": 10**4, "zero": "x"}], "zero")
    assert spread_over_layers([{"x": i} for i in range(11)], "x") == (1, 9)


def test_an_empty_or_missing_place_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(UserError, match="There is no"):
        report([tmp_path / "nothing"], tmp_path / "r.html")
    with pytest.raises(UserError, match="Nothing to report"):
        report([tmp_path], tmp_path / "r.html")
    material.write(tmp_path / "work")
    with pytest.raises(UserError, match="is a folder: give a file"):
        report([tmp_path / "work"], tmp_path)


def test_a_broken_file_is_named_and_the_rest_is_shown(folder):
    (folder / "study" / "results.json").write_text("{")
    (folder / "ledger.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    page = page_of(folder)
    assert "results.json could not be read" in page
    assert "line 2 is no JSON" in page
    assert "Analysis: dual" in page


def from_the_other_side(study):
    """The same study with the roles of candidate and reference changed."""
    turn = {"significantly better": "significantly worse", "significantly worse": "significantly better"}
    for c in study["comparisons"]:
        c["candidate"], c["reference"] = c["reference"], c["candidate"]
        c["difference"], c["low"], c["high"] = -c["difference"], -c["high"], -c["low"]
        c["verdict"] = turn.get(c["verdict"], c["verdict"])
    return study


def test_several_studies_open_with_the_pair_that_most_of_them_compare(tmp_path):
    studies = [material.study("one"), from_the_other_side(material.study("two")), material.study("three")]
    only = [c for c in studies[2]["comparisons"] if c["candidate"] == "dora"]
    studies[2]["comparisons"] = only
    studies[0]["comparisons"] = [c for c in studies[0]["comparisons"] if c["candidate"] == "dual_lora"]
    studies[0]["comparisons"][0] |= {"verdict": "equivalent within the margin", "p_holm": 0.001}
    studies[1]["comparisons"] = [c for c in studies[1]["comparisons"] if c["reference"] == "dual_lora"]
    page = page_of(material.write_studies(tmp_path / "work", *studies))
    assert "dual_lora against lora, compared in 2 studies: " in page
    assert "1 × equivalent within the margin" in page
    assert "(of those equivalent, 1 significantly better, by little)" in page
    (chart,) = [
        chart
        for name, chart in material.data_of(page)["charts"].items()
        if name.startswith("plot-every-study-of-dual-lora")
    ]
    first, second, *turned = material.points_of(chart[0])
    figures = [[p[k] for k in ("x", "low", "high")] for p in (first, second)]
    assert [[p[k] for k in ("x", "low", "high")] for p in turned] == figures, "seen from the same side"
    c = studies[0]["comparisons"][0]
    assert figures[0] == pytest.approx([c[k] / c["margin"] for k in ("difference", "low", "high")], rel=1e-4)
    assert re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", page)[0] == "Questions and answers"


def test_answers_lead_to_their_studies_though_two_have_one_name(tmp_path):
    page = page_of(material.write_studies(tmp_path / "work", material.study(), material.study()))
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    anchors = re.findall(r'<p class="asked"><a href="#([^"]*)">', page)
    assert len(set(anchors)) == 2
    assert set(anchors) <= set(ids)


def test_an_answer_names_what_a_method_was_compared_with_if_that_differs():
    results = material.study("x")
    for c in results["comparisons"]:
        c["verdict"] = "inconclusive"
    first, *_, last = results["comparisons"]
    last["reference"] = "dora"
    ((_, _, shown),) = _answer("a study", results)["verdicts"]
    assert f"{first['candidate']} against lora on boolq" in shown
    assert f"{last['candidate']} against dora on arc" in shown


def test_one_study_of_another_shape_costs_no_answer_but_its_own(tmp_path):
    broken = material.study("broken")
    del broken["comparisons"][0]["sentence"]
    page = page_of(material.write_studies(tmp_path / "work", broken, material.study("one"), material.study("two")))
    assert page.count('<p class="asked">') == 2
    assert "results.json could not be shown" in page


@pytest.mark.parametrize(
    ("metric", "label"), [(None, "choice on validation records (more"), ("loss", "loss on validation records (less")]
)
def test_trials_are_labelled_with_what_they_were_judged_by(tmp_path, metric, label):
    study = material.study()
    study["study"]["search"] = {"space": {}, "metric": metric}
    charts = material.data_of(page_of(material.write_studies(tmp_path / "work", study)))["charts"]
    (tuning,) = [chart for name, chart in charts.items() if name.endswith("-tuning")]
    assert tuning[0]["head"][2] == f"{label} is better)"


def test_every_run_behind_a_figure_is_named(folder):
    page = page_of(folder)
    for method in material.study()["methods"]:
        for run in method["trials"] + method["seeds"]:
            assert f">{run['key']}<" in page
    assert ">runs/dual<" in page, "the folder of an analysed run"


def test_an_empty_ledger_is_said(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("\n")
    with pytest.raises(UserError, match=r"ledger.jsonl holds no rows yet\.$"):
        report([ledger], tmp_path / "r.html")
    folder = material.write(tmp_path / "work")
    (folder / "ledger.jsonl").write_text("")
    page = page_of(folder)
    assert "ledger.jsonl holds no rows yet." in page
    assert "Benchmarks</h2>" not in page


def test_a_study_that_is_named_twice_is_one_study(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert len(gather(["study", folder / "study", folder / "study" / "results.json"]).studies) == 1


def test_a_newer_analysis_is_refused_by_name(folder):
    file = folder / "runs" / "dual" / "analysis" / "analysis.json"
    file.write_text(json.dumps(material.analysis() | {"version": 2}))
    assert "made by a newer program" in " ".join(gather([folder]).problems)


def test_a_line_that_is_being_written_is_left_out(folder):
    with (folder / "ledger.jsonl").open("a") as file:
        file.write('{"bench": "li')
    assert len(gather([folder]).ledgers[0][1]) == 5
    assert not gather([folder]).problems


def test_checkpoints_are_not_searched(folder):
    hidden = folder / "runs" / "dual" / "checkpoints" / "x"
    hidden.mkdir(parents=True)
    (hidden / "results.json").write_text("{}")
    (folder / "runs" / "dual" / "recipe.yaml").touch()
    assert hidden / "results.json" not in find([folder])


def test_a_study_under_way_is_shown_by_its_files(folder):
    from tiny_study import ended, job

    from dual_lora.lab.files.write import write_json
    from dual_lora.lab.study.folder import StudyFolder
    from dual_lora.lab.study.job import run_file, write_outcome

    (folder / "study" / "results.json").unlink()
    runs = folder / "study" / "runs"
    jobs = [job("boolq", "lora", seed, settings={"train.lr": 0.1}) for seed in range(4)]
    with StudyFolder(folder / "study") as study:  # held by its runner, as while the study goes on
        study.begin({"name": "going", "question": "How far?"}, {}, {}, runs, False)
        study.plan(jobs)
        runs.mkdir()
        write_outcome(runs, ended(jobs[0], metric="choice", score=0.71)[1])
        (runs / jobs[1].key).mkdir()
        write_json(run_file(runs, jobs[2].key, "error"), material.HOSTILE)
        page = page_of(folder)
    assert "Under way: going" in page
    assert "1 of 4 runs known so far have ended (1 done, 1 running, 1 failed, 1 planned)" in page
    assert "0.7100" in page
    assert "window.pwned=2&lt;/script&gt;" in page


def test_watch_writes_again_when_a_source_changes(folder, monkeypatch):
    from dual_lora.lab.report import report as module

    written, turns = [], iter(range(9))

    def sleep(_):
        turn = next(turns)
        if turn == 1:
            file = folder / "ledger.jsonl"
            file.write_text(file.read_text() + file.read_text())
        if turn == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    out = folder.parent / "live.html"
    watch([folder], out, say=lambda r: written.append(out.read_text()))
    assert len(written) == 2
    assert 'data-live="5"' in written[0]
    assert 'data-live="0"' in out.read_text()  # what stays does not load itself anew


def test_gates_of_several_machines_are_told_apart(folder):
    rows = [row for row in material.ledger() if row["kind"] == "gate"]
    rows += [row | {"device": "another CPU"} for row in rows]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(folder)
    (gates,) = material.data_of(page)["charts"]["plot-benchmarks-gates"]
    labels = ["linear 4096 · lora · a CPU", "linear 4096 · lora · another CPU"]
    assert [point["label"] for point in material.points_of(gates)] == labels
    assert [page.count(f"{label}</option>") for label in labels] == [1, 1]


def test_watch_writes_again_when_a_run_ends(tmp_path, monkeypatch):
    from tiny_study import ended, job

    from dual_lora.lab.report import report as module
    from dual_lora.lab.study.folder import StudyFolder
    from dual_lora.lab.study.job import write_outcome

    runs, written, turns = tmp_path / "study" / "runs", [], iter(range(9))
    one = job("boolq", "lora", 1, settings={"train.lr": 0.1})

    def sleep(_):
        turn = next(turns)
        if turn == 1:
            write_outcome(runs, ended(one, metric="choice", score=0.71)[1])
        if turn == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", sleep)
    with StudyFolder(tmp_path / "study") as study:
        study.begin({"name": "going", "question": "How far?"}, {}, {}, runs, False)
        study.plan([one])
        runs.mkdir()
        out = tmp_path / "live.html"
        watch([tmp_path / "study"], out, say=lambda _: written.append(out.read_text()))
    assert ["0.7100" in page for page in written] == [False, True]


def test_commands(folder, capsys):
    from dual_lora.lab.cli import main

    with pytest.raises(SystemExit) as end:
        main(["report", str(folder), "--out", str(folder.parent / "c.html"), "--json"])
    assert end.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert said["studies"] == said["analyses"] == said["ledgers"] == 1
    assert said["made_of"] == "1 study, 1 analysis, 1 ledger"
    with pytest.raises(SystemExit) as end:
        main(["report", str(folder / "nothing")])
    assert end.value.code == 1
    assert "There is no" in capsys.readouterr().err


def test_no_two_series_of_a_chart_look_alike(tmp_path):
    """A page with many names: each chart tells its own apart, and a name keeps its colour from chart to chart."""
    studies = []
    for number in range(9):  # 27 names, of which two are in every study
        study = material.study(f"x{number}")
        for m in study["methods"]:
            m["method"] = m["method"] if "lora" in m["method"] else f"{m['method']} {number}"
        studies.append(study)
    charts = material.data_of(page_of(material.write_studies(tmp_path / "work", *studies)))["charts"]
    legends = [view["legend"] for chart in charts.values() for view in chart if len(view.get("legend", [])) > 2]
    assert len(legends) >= 9
    for legend in legends:
        for part in ("colour", "shape"):
            assert len({each[part] for each in legend}) == len(legend), legend
    assert len({each["colour"] for legend in legends for each in legend if each["name"] == "dual_lora"}) == 1


def test_the_library_is_as_its_makers_published_it():
    """What README.md beside it says: the versions, and the hashes of the files."""
    folder = Path(page.__file__).parent / "vega"
    said = re.findall(r"`(\S+)`.*`([0-9a-f]{64})`", (folder / "README.md").read_text())
    assert len(said) == len(list(folder.glob("*.js"))) == 3
    for name, digest in said:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_rows_of_one_name_stay_apart(tmp_path):
    """One method on one task against two references: two rows, which look as they are named."""
    study = material.study()
    study["comparisons"] = [c | {"candidate": "a", "task": "t"} for c in study["comparisons"]]
    charts = material.data_of(page_of(material.write_studies(tmp_path / "work", study)))["charts"]
    (differences,) = [chart for name, chart in charts.items() if name.endswith("differences-in-choice")]
    points = material.points_of(differences[0])
    assert len({p["row"] for p in points}) == len(points) == 6
    assert {p["row"].rstrip("\u200b\u200c") for p in points} == {"a · t"}


def test_an_encoder_s_and_a_decoder_s_blocks_are_cells_of_their_own(folder):
    """Both have a layer of one name in a block of one number: neither may hide the other."""
    file = folder / "runs" / "dual" / "analysis" / "analysis.json"
    text = file.read_text().replace("model.layers.1.mlp", "decoder.layers.0.mlp")
    file.write_text(text.replace("model.layers", "encoder.layers"))
    charts = material.data_of(page_of(folder))["charts"]
    (heat,) = [chart for name, chart in charts.items() if name.endswith("x-by-layer")]
    points = material.points_of(heat[0])
    assert len({(p["x"], p["label"]) for p in points}) == len(points) == 3
    assert {p["label"] for p in points} >= {"mlp.up_proj (encoder.layers)", "mlp.up_proj (decoder.layers)"}


def test_a_study_may_have_the_name_of_a_run_s_part(folder):
    for name in ("model", "adapter", "checkpoints"):
        shutil.copytree(folder / "study", folder / "studies" / name)
    assert len([file for file in find([folder / "studies"]) if file.name == "results.json"]) == 3


def test_each_study_has_a_heading_of_its_own(folder):
    for place, name in (("p", "x"), ("q", "x-2"), ("r", "x")):
        shutil.copytree(folder / "study", folder / "studies" / place)
        file = folder / "studies" / place / "results.json"
        values = json.loads(file.read_text())
        values["study"]["name"] = name
        file.write_text(json.dumps(values))
    page = page_of(folder / "studies")
    ids = re.findall(r'<h2 id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert {"verdicts-x-h", "verdicts-x-2-h", "verdicts-x-3-h"} <= set(ids)


def overall(results):
    return {
        block.title: block for section in overall_sections(results) for block in section.blocks if block.kind != "text"
    }


def test_over_all_tasks_a_better_method_is_better_more_often():
    results = material.study()
    blocks = overall([("a study", results)])
    assert list(blocks) == ["How often a run is better", "Performance profile", "Mean ranks"]
    rows = {row["method"]: row for row in blocks["How often a run is better"].rows}
    assert rows.keys() == {"dual_lora", "dora", "lora|x"}
    pairs = [
        [(float(a["score"]), float(b["score"])) for a in mine["seeds"] for b in lora["seeds"]]
        for mine, lora in zip(
            *([m for m in results["methods"] if m["method"] == n] for n in ("dual_lora", "lora")), strict=True
        )
    ]
    by_hand = [sum((a > b) + 0.5 * (a == b) for a, b in task) / len(task) for task in pairs]
    assert rows["dual_lora"]["chance"] == pytest.approx(sum(by_hand) / 2)
    assert rows["lora|x"]["chance"] < 0.5
    ranks = [row["method"] for row in blocks["Mean ranks"].rows]
    assert ranks[-1] == "lora|x"
    points = blocks["Performance profile"].views[0].points
    assert {p["series"] for p in points} == {"lora", *rows}
    assert len({(p["series"], p["x"]) for p in points}) == len(points), "each point is said once"


def test_over_all_tasks_less_may_be_better_and_a_lost_run_counts_as_the_worst():
    results = material.study()
    for m in results["methods"]:
        m["better"] = "less"
        if m["method"] == "dora":
            m["seeds"][0] |= {"status": "diverged", "score": None}
    rows = {row["method"]: row for row in overall([("a study", results)])["How often a run is better"].rows}
    assert rows["lora|x"]["chance"] > 0.5
    kept = material.study()
    for m in kept["methods"]:
        m["better"] = "less"
    before = {row["method"]: row for row in overall([("a study", kept)])["How often a run is better"].rows}
    assert rows["dora"]["chance"] < before["dora"]["chance"]


def test_one_task_is_not_all():
    results = material.study()
    for part in ("methods", "comparisons"):
        results[part] = [row for row in results[part] if row["task"] == "arc"]
    assert overall([("a study", results)]) == {}
    assert overall([("a study", results), ("the same again", results)]) == {}
    results["comparisons"] = []
    assert overall([("a study", results)]) == {}
