"""The report without a browser: what is gathered, said, escaped and exported."""

import csv
import json
import re
from pathlib import Path

import pytest
import report_material as material

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.blocks import Column, Table, number
from dual_lora.lab.report.exports import to_csv, to_latex, to_markdown
from dual_lora.lab.report.gather import find, gather
from dual_lora.lab.report.report import report, watch


@pytest.fixture
def folder(tmp_path):
    return material.write(tmp_path / "work")


def page_of(folder, **options):
    out = folder.parent / "report.html"
    report([folder], out, **options)
    return out.read_text(encoding="utf-8")


def test_verdicts_come_first_and_every_part_has_its_place(folder):
    page = page_of(folder)
    titles = re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", page)
    assert titles[0].startswith("Verdicts: ")
    assert titles[1].startswith("Figures: ")
    assert titles[2].startswith("Analysis: dual, ")
    assert titles[3:] == ["Benchmarks", "Provenance"]


def test_page_loads_nothing(folder):
    page = page_of(folder)
    assert not re.search(r"""(src|href|url|action)\s*[=(]\s*["']?(https?:)?//""", page)
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_each_figure_names_file_and_command(folder):
    page = page_of(folder)
    shown = page.count('<figure class="card">') + page.count('<table id="') - 1  # but for the list of sources itself
    assert page.count('<p class="from">From <code>') == shown
    assert page.count("results.json</code>, made by <code>dual-lora compare") > 5
    assert page.count("analysis.json</code>, made by <code>dual-lora analyze") > 5


def test_hostile_names_do_not_leave_their_text(tmp_path):
    page = page_of(material.write(tmp_path / "work", material.HOSTILE))
    script = page.index('<script type="application/json" id="data">')
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert "window.pwned=2&lt;/script&gt;" in page[:script]
    assert "\\u003cimg src=x" in page[script:]
    json.loads(page[script:].partition(">")[2].partition("</script>")[0])


def test_verdict_words_figures_and_counts_are_in_the_text(folder):
    page = page_of(folder)
    study = material.study()
    words = re.sub("</?strong>", "", page)
    for c in study["comparisons"]:
        assert c["sentence"].replace("'", "&#x27;") in words
    assert "6 comparisons, judged together" in page
    assert f"{study['comparisons'][0]['difference']:+.4f}" in page
    assert "This study is not complete" in page
    assert "Failed: lora|x: out of memory" in page
    assert "1 of 1 limits are kept" in page  # the newer row of the two
    assert "✓ met" in page
    assert "✗ missed" not in page


def test_analysis_is_said_in_a_sentence(folder):
    page = page_of(folder)
    assert "51.3 % of the entries of ΔW are zero" in page
    assert "10.0 % of the signs of DC flipped since the start" in page


def test_a_mean_over_layers_counts_entries():
    from dual_lora.lab.analysis.summary import mean_over_layers, spread_over_layers

    rows = [{"O": 1, "I": 1, "zero": 0.0}, {"O": 1, "I": 3, "zero": 1.0}, {"O": 9, "I": 9}]
    assert mean_over_layers(rows, "zero") == 0.75
    assert mean_over_layers(rows, "nothing") is None
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


def test_a_file_of_another_shape_is_named_and_the_rest_is_shown(folder):
    study = material.study()
    del study["methods"][0]["trials"]
    (folder / "study" / "results.json").write_text(json.dumps(study))
    page = page_of(folder)
    assert "results.json could not be shown: KeyError" in page
    assert "Analysis: dual" in page


def write_studies(folder, *studies):
    for i, study in enumerate(studies):
        (folder / f"s{i}").mkdir(parents=True)
        (folder / f"s{i}" / "results.json").write_text(json.dumps(material._finite(study)))
    return folder


def from_the_other_side(study):
    """The same study with the roles of candidate and reference changed."""
    turn = {"significantly better": "significantly worse", "significantly worse": "significantly better"}
    for c in study["comparisons"]:
        c["candidate"], c["reference"] = c["reference"], c["candidate"]
        c["difference"], c["low"], c["high"] = -c["difference"], -c["high"], -c["low"]
        c["verdict"] = turn.get(c["verdict"], c["verdict"])
    return study


def charts_of(page):
    text = page[page.index('id="data">') :].partition(">")[2].partition("</script>")[0]
    return json.loads(text)["charts"]


def test_several_studies_open_with_the_pair_that_most_of_them_compare(tmp_path):
    studies = [material.study("one"), from_the_other_side(material.study("two")), material.study("three")]
    only = [c for c in studies[2]["comparisons"] if c["candidate"] == "dora"]
    studies[2]["comparisons"] = only
    studies[0]["comparisons"] = [c for c in studies[0]["comparisons"] if c["candidate"] == "dual_lora"]
    studies[0]["comparisons"][0] |= {"verdict": "equivalent within the margin", "p_holm": 0.001}
    studies[1]["comparisons"] = [c for c in studies[1]["comparisons"] if c["reference"] == "dual_lora"]
    page = page_of(write_studies(tmp_path / "work", *studies))
    assert "dual_lora against lora, compared in 2 studies: " in page
    assert "1 × equivalent within the margin" in page
    assert "(of those equivalent, 1 significantly better, by little)" in page
    (chart,) = [chart for name, chart in charts_of(page).items() if name.startswith("plot-every-study-of-dual-lora")]
    first, second, *turned = chart["views"][0]["series"][0]["points"]
    figures = [[p[k] for k in ("x", "low", "high")] for p in (first, second)]
    assert [[p[k] for k in ("x", "low", "high")] for p in turned] == figures, "seen from the same side"
    c = studies[0]["comparisons"][0]
    assert figures[0] == pytest.approx([c[k] / c["margin"] for k in ("difference", "low", "high")], rel=1e-4)
    assert re.findall(r"<h2 id=[^>]*>([^<]*)</h2>", page)[0] == "Questions and answers"


def test_answers_lead_to_their_studies_though_two_have_one_name(tmp_path):
    page = page_of(write_studies(tmp_path / "work", material.study(), material.study()))
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    anchors = re.findall(r'<p class="asked"><a href="#([^"]*)">', page)
    assert len(set(anchors)) == 2
    assert set(anchors) <= set(ids)


def test_one_study_of_another_shape_costs_no_answer_but_its_own(tmp_path):
    broken = material.study("broken")
    del broken["comparisons"][0]["sentence"]
    page = page_of(write_studies(tmp_path / "work", broken, material.study("one"), material.study("two")))
    assert page.count('<p class="asked">') == 2
    assert "results.json could not be shown" in page


@pytest.mark.parametrize(
    ("metric", "label"), [(None, "choice on validation records (more"), ("loss", "loss on validation records (less")]
)
def test_trials_are_labelled_with_what_they_were_judged_by(tmp_path, metric, label):
    study = material.study()
    study["study"]["search"] = {"space": {}, "metric": metric}
    charts = charts_of(page_of(write_studies(tmp_path / "work", study)))
    (tuning,) = [chart for name, chart in charts.items() if name.endswith("-tuning")]
    assert tuning["views"][0]["y"]["label"] == f"{label} is better)"


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
    assert hidden / "results.json" not in find([folder])


def test_numbers_for_people():
    assert number(-0.123456, digits=3) == "−0.123"
    assert number(0.5, "percent") == "50.0 %"
    assert number(1.5e9, "bytes") == "1.5 GB"
    assert number(12) == "12"
    assert number(0.00001234) == "1.23e-05"
    assert number(3.0, digits=2, signed=True) == "+3.00"
    assert number(None) == ""


@pytest.fixture
def table():
    columns = [Column("name", "na|me"), Column("x", "x_1", "percent", 1), Column("v", "verdict", "verdict")]
    rows = [
        {"name": "=cmd()", "x": 0.123456, "v": "better"},
        {"name": 'a "b", c|d & 50% \\', "x": None, "v": "worse"},
        {"name": "<i>", "x": -0.5, "v": ""},
    ]
    return Table("t", columns, rows)


def test_csv_has_full_precision_and_no_formulas(table):
    rows = list(csv.reader(to_csv(table).splitlines()))
    assert rows[0] == ["na|me", "x_1", "verdict"]
    assert rows[1] == ["'=cmd()", "0.123456", "better"]
    assert rows[2][0] == 'a "b", c|d & 50% \\'
    assert rows[3][1] == "-0.5"


def test_markdown_keeps_its_columns(table):
    lines = to_markdown(table).splitlines()
    assert lines[1] == "|---|---:|---|"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)
    assert "&lt;i>" in lines[4]


def test_latex_is_escaped(table):
    text = to_latex(table)
    assert r"\begin{tabular}{lrl}" in text
    assert r"c|d \& 50\% \textbackslash{}" in text
    assert r"12.3 \%" in text
    assert r"$-$50.0 \%" in text
    assert "x\\_1" in text


def test_tables_are_exported(folder):
    written = report([folder], folder.parent / "r.html", tables=folder.parent / "tables")
    names = {path.rpartition("/")[2] for path in written.exported}
    assert "activations-lora-x-verdicts.csv" in names
    assert "analysis-dual-lora-x-at-a-glance.tex" in names
    assert all((folder.parent / "tables" / name).stat().st_size for name in names)


def test_a_study_under_way_is_shown_from_its_state(folder):
    from dual_lora.lab.comparison.state import State

    (folder / "study" / "results.json").unlink()
    job = {"kind": "final", "method": "lora", "task": "boolq", "model": "", "settings": {"train.lr": 0.1}}
    with State(folder / "study") as state:  # held open by its writer, as while the study runs
        state.put("study", json.dumps({"name": "going", "question": "How far?"}))
        state.plan([job | {"key": key, "seed": seed} for seed, key in enumerate("abcd")])
        for key in "abc":
            state.start(key)
        state.finish("a", {"status": "done", "metric": "choice", "score": 0.71})
        state.fail("c", material.HOSTILE)
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
    assert '"live":5' in written[0]
    assert '"live":0' in out.read_text()  # what stays does not load itself anew


def test_results_as_tables(folder):
    pytest.importorskip("pandas")
    from dual_lora.lab.results import load_analysis, load_ledger, load_study

    study = load_study(folder / "study")
    assert len(study.verdicts) == 6
    assert {"candidate", "verdict", "low", "high", "seeds"} <= set(study.verdicts.columns)
    assert len(study.seeds) == 24
    assert "train.learning_rate" in study.trials.columns
    assert "cost_peak_memory" in study.methods.columns
    assert study.pareto["front"].sum() == 4
    assert study.sentences[0].startswith("dual_lora against lora")
    analysis = load_analysis(folder / "runs" / "dual" / "analysis")
    assert list(analysis.runs["name"]) == ["dual", "lora|x"]
    assert len(analysis.layers) == 18
    course = analysis.over_training("norm_ratio")
    assert list(course.index) == [0, 10, 20]
    assert course.loc[20, "dual"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="Did you mean 'zero'"):
        analysis.over_training("zeros")
    with pytest.raises(UserError, match="is no analysis"):
        load_analysis(folder / "study" / "results.json")
    with pytest.raises(UserError, match="There is no file"):
        load_study(folder / "elsewhere")
    assert len(load_ledger(folder / "ledger.jsonl")) == 5


def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """As it lies there, on the project's own results."""
    pytest.importorskip("pandas")
    root = Path(__file__).parents[2]
    book = json.loads((root / "docs" / "results.ipynb").read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"]), "what its format demands"
    for folder in ("results", "benchmarks"):
        (tmp_path / folder).symlink_to(root / folder)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            assert cell["outputs"] == []  # outputs are not committed: they would be of somebody's machine
    assert (tmp_path / "docs" / "report.html").stat().st_size > 10_000


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
