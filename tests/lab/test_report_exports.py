"""Tables as people read them, and as files for papers and spreadsheets."""

import csv
import re

import pytest
import report_material as material

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.blocks import Table
from dual_lora.lab.report.columns import Column, number
from dual_lora.lab.report.exports import written
from dual_lora.lab.report.report import report


@pytest.fixture
def folder(tmp_path):
    return material.write(tmp_path / "work")


def test_numbers_for_people():
    assert number(-0.123456, ".3f") == "−0.123"
    assert number(0.5, ".1%") == "50.0 %"
    assert number(1.5e9, "B") == "1.5 GB"
    assert number(12) == "12"
    assert number(0.00001234) == "1.23e-05"
    assert number(3.0, "+.2f") == "+3.00"
    assert number(None) == ""


@pytest.fixture
def table():
    columns = [Column("name", "na|me"), Column("x", "x_1", ".1%"), Column("v", "verdict", "verdict")]
    rows = [
        {"name": "=cmd()", "x": 0.123456, "v": "significantly better"},
        {"name": 'a "b", c|d & 50% \\', "x": None, "v": "significantly worse"},
        {"name": "<i>", "x": -0.5, "v": ""},
    ]
    return Table("t", columns, rows)


def test_csv_has_full_precision(table):
    rows = list(csv.reader(written(table, "csv").splitlines()))
    assert rows[0] == ["na|me", "x_1", "verdict"]
    assert rows[2][0] == 'a "b", c|d & 50% \\'
    assert [row[1] for row in rows[1:]] == ["0.123456", "", "-0.5"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "＝", "＋", "－", "＠"])
def test_csv_has_no_formulas(start):
    """Neither in a text, nor where a file has a text for a figure, nor in a heading that a file gave."""
    text = f'{start}HYPERLINK("http://x")'
    table = Table("t", [Column("a", text), Column("b", "b", "g")], [{"a": text, "b": text}, {"a": "x", "b": -1}])
    rows = list(csv.reader(written(table, "csv").splitlines(keepends=True)))
    assert [rows[0][0], *rows[1]] == [f"'{text}"] * 3
    assert rows[2] == ["x", "-1"], "a negative figure is one"


def test_markdown_keeps_its_columns(table):
    lines = written(table, "md").splitlines()
    assert lines[1] == "|---|---:|---|"
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)


@pytest.mark.parametrize(
    "hostile",
    ["![](http://x/p.png)",
     "[a](//x)", "<http://x>", "http://x", "www.x.org", "a@x.org", "[a]: http://x", "`|`", "&#33;[a](b)",
     "![a][b]", "a\r\n\r\n![](x)"],
)  # fmt: skip
def test_markdown_has_no_links_and_no_pictures(hostile):
    markdown = pytest.importorskip("markdown_it", reason="rich brings it")
    reader = markdown.MarkdownIt("commonmark").enable("table")
    html = reader.render(written(Table("t", [Column("a", hostile)], [{"a": hostile}]), "md"))
    assert html.count("<td") == html.count("<th>") == 1, html
    assert "<a" not in html
    assert "<img" not in html
    assert not re.search(
        r"(?<!\\)(:(?=//)|@|www\.)", written(Table("t", [Column("a", hostile)], []), "md").partition("\n")[0]
    )


def test_latex_is_escaped(table):
    text = written(table, "tex")
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
