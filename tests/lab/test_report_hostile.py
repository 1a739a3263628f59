"""A stranger's file costs the report no more than itself, and the page overwrites nothing that is no report."""

import html
import json
import os
import re
from pathlib import Path

import pytest
import report_material as material

from dual_lora.lab.errors import UserError
from dual_lora.lab.report.gather import gather
from dual_lora.lab.report.report import report

pytestmark = pytest.mark.timeout(60)  # what hangs is the failure


def fifo(file):
    os.mkfifo(file)


def endless(file):
    """A device for each, as several links to one file count once."""
    devices = {"results.json": "/dev/zero", "ledger.jsonl": "/dev/urandom", "study.json": "/dev/random"}
    file.symlink_to(devices[file.name])


def deep(file):
    file.write_text("[" * 200_000)


def binary(file):
    file.write_bytes(b"\xff\xfe\x00")


def gone(file):
    file.symlink_to(file.parent / "nowhere")


def itself(file):
    file.symlink_to(file)


def huge(file):
    with file.open("wb") as sparse:
        sparse.truncate(10**12)


def long_number(file):
    file.write_text("9" * 10_000)


def test_each_file_that_cannot_be_read_is_named(tmp_path):
    folder = material.write(tmp_path / "work")
    bad = []
    for make in (fifo, endless, deep, binary, gone, itself, huge, long_number):
        for name in ("results.json", "ledger.jsonl", "study.json"):
            (file := folder / f"bad-{len(bad)}" / name).parent.mkdir()
            make(file)
            bad.append(f"{file.parent.name}/{name} could not be read")
    said = report([folder], tmp_path / "r.html")
    assert said.studies == said.analyses == 1
    page = (tmp_path / "r.html").read_text()
    assert [one for one in bad if one not in page] == []
    assert [one for one in bad if not any(one in problem for problem in said.problems)] == []
    assert "Analysis: dual" in page


@pytest.mark.parametrize("jobs", [5, {"a": 5}, {"../../a": {}}, {"a": {"settings": 5}}])
def test_a_study_under_way_of_another_shape_costs_only_itself(tmp_path, jobs):
    folder = material.write(tmp_path / "work")
    (folder / "bad").mkdir()
    (folder / "bad" / "study.json").write_text(json.dumps({"format": "dual-lora study", "study": {}, "jobs": jobs}))
    said = report([folder], tmp_path / "r.html")
    assert said.studies == said.analyses == 1
    assert "Analysis: dual" in (tmp_path / "r.html").read_text()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="an administrator reads everything")
def test_an_unreadable_file_and_folder_are_named(tmp_path):
    folder = material.write(tmp_path / "work")
    (folder / "ledger.jsonl").chmod(0)
    (folder / "closed").mkdir(mode=0)
    problems = " ".join(report([folder], tmp_path / "r.html").problems)
    assert "ledger.jsonl could not be read" in problems
    assert "closed could not be read" in problems


def wrong(**parts):
    return lambda study: study | parts


def test_a_folder_that_is_closed_or_has_no_end_costs_only_itself(tmp_path, monkeypatch):
    record = {"state": "finished", "method": {"name": "lora"}, "versions": {}, "problems": []}
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text("name: x\n")
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    real = Path.is_file
    (tmp_path / "/".join("d" * 150)).mkdir(parents=True)  # with 1,000 os.walk itself gives up, and so does pytest

    def is_file(self):
        if self.parent.name == "b":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter([self / name for name in ("b", "a", "c")]))
    said = gather([tmp_path])
    assert [file.parent.name for file, _ in said.runs] == ["a", "c"]
    assert any("more than 100 deep" in problem for problem in said.problems)


CHANGES = [
    wrong(study=[]),
    wrong(study={"name": 5, "level": "x"}),
    wrong(provenance="x"),
    wrong(comparisons={"a": 1}),
    wrong(methods=5),
    wrong(untrained=[{"task": [], "metric": 1, "score": "x"}]),
    lambda study: study | {"comparisons": [c | {"candidate": []} for c in study["comparisons"]]},
    lambda study: study | {"comparisons": [c | {"difference": 10**400} for c in study["comparisons"]]},
    lambda study: study | {"comparisons": [c | {"margin": "wide"} for c in study["comparisons"]]},
    lambda study: study | {"methods": [m | {"score": "x"} for m in study["methods"]]},
    lambda study: study | {"pareto": [p | {"label": 3} for p in study["pareto"]]},
]


def test_studies_of_another_shape_cost_only_themselves(tmp_path):
    bad = [change(material._finite(material.study("bad"))) for change in CHANGES]
    folder = material.write_studies(tmp_path / "work", *bad, material.study("one"), material.study("two"))
    said = report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count('<p class="asked">') + len(said.problems) == len(CHANGES) + 2, "shown, or named"
    named = [re.search(r"\bs(\d+)/results.json could not be shown", problem) for problem in said.problems]
    assert all(one and int(one[1]) < len(CHANGES) for one in named)
    assert "Verdicts: activations one</h2>" in page
    assert "Verdicts: activations two</h2>" in page


@pytest.mark.parametrize("runs", [5, [], [{}], [{"name": "a", "layers": "x"}]])
def test_an_analysis_of_another_shape_costs_only_itself(tmp_path, runs):
    folder = material.write(tmp_path / "work")
    (folder / "runs" / "dual" / "analysis" / "other.json").write_text(json.dumps(material.analysis() | {"runs": runs}))
    report([folder], tmp_path / "r.html")
    assert "Analysis: dual, lora|x</h2>" in (tmp_path / "r.html").read_text()


def test_what_is_no_text_is_replaced(tmp_path):
    """Half of a surrogate pair, which JSON may hold and no file; a name of bytes that are no text."""
    folder = material.write(tmp_path / "work", "half \ud800")
    bad = os.fsdecode(os.fsencode(folder) + b"/\xff")
    os.mkdir(bad)
    (folder / "study" / "results.json").rename(os.path.join(bad, "results.json"))
    report([folder], tmp_path / "r.html", tables=tmp_path / "tables")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "half \\ud800" in page
    assert "�/results.json" in page
    assert len(list((tmp_path / "tables").iterdir())) > 20


def test_control_characters_in_names_are_written_out(tmp_path):
    """A page is read with `less` and `cat` as well."""
    folder = material.write(tmp_path / "work", "\x1b[2Jred \u202e")
    report([folder], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "\\u001b[2Jred \\u202e" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_only_a_report_is_overwritten(tmp_path):
    folder = material.write(tmp_path / "work")
    out = tmp_path / "thesis.html"
    out.write_text("<html>my thesis</html>")
    with pytest.raises(UserError, match="exists and is no report: give another --out"):
        report([folder], out)
    assert out.read_text() == "<html>my thesis</html>"
    page = tmp_path / "report.html"
    for _ in range(2):
        report([folder], page)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="exists and is no report"):
        report([folder], tmp_path / "fifo")
    with pytest.raises(UserError, match="exists and is no report"):
        report([folder], folder / "study" / "results.json")


SECRET = "token-of-the-user-7f3a"


def running(folder, key="ab12"):
    """A study under way, of which one run failed."""
    (folder / "runs").mkdir(parents=True)
    job = {"kind": "final", "model": "", "task": "boolq", "method": "lora", "seed": 0, "settings": {}}
    (folder / "study.json").write_text(json.dumps({"study": {"name": "theirs"}, "jobs": {key: job}}))
    return folder / "runs" / f"{key}.error.json"


def test_links_in_a_folder_show_no_file_of_the_user(tmp_path):
    (secret := tmp_path / "secret.json").write_text(json.dumps(SECRET))
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"benchmark": SECRET, "date": "2026-01-01"}) + "\n")
    (study := tmp_path / "study-of-mine.json").write_text(
        json.dumps(material._finite(material.study())).replace('"about": ""', f'"about": "{SECRET}"')
    )
    theirs = tmp_path / "theirs"
    error = running(theirs / "one")
    error.symlink_to(secret)
    (theirs / "ledger.jsonl").symlink_to(rows)
    (theirs / "results.json").symlink_to(study)
    (theirs / "a-link").mkdir()
    (theirs / "a-link/study.json").symlink_to(error.parents[1] / "study.json")  # does not hide the file itself
    said = report([theirs, material.write(tmp_path / "work")], tmp_path / "r.html")
    assert SECRET not in (tmp_path / "r.html").read_text()
    assert sum("it is a link" in problem for problem in said.problems) == 3
    report([rows], tmp_path / "mine.html")
    error.unlink()
    error.write_text(json.dumps("it failed"))
    report([theirs], tmp_path / "r.html")
    assert "it failed" in (tmp_path / "r.html").read_text()


def test_a_number_that_is_none_costs_no_other_source(tmp_path):
    """JSON has no NaN, and neither has the page: its data could not be written."""
    folder = material.write(tmp_path / "work")
    for name in ("results.json", "analysis.json", "ledger.jsonl"):
        text = next(folder.rglob(name)).read_text()
        for number in ("NaN", "-Infinity", "1e999"):
            bad = re.sub(r"(?<=[\[:, ])-?\d+\.\d+(?=[,}\]\s])", number, text)
            assert number in bad
            (tmp_path / "bad" / f"{number}-{name}").mkdir(parents=True)
            (tmp_path / "bad" / f"{number}-{name}" / name).write_text(bad)
    said = report([folder, tmp_path / "bad"], tmp_path / "r.html")
    assert said.studies >= 1
    assert said.analyses >= 1


def test_a_link_to_a_run_is_not_followed_out_of_a_folder(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("name: x\n")
    record = {"state": "finished", "method": {"name": "lora"}, "versions": {}, "problems": [SECRET]}
    (mine / "record.json").write_text(json.dumps(record))
    theirs = material.write(tmp_path / "work")
    (theirs / "a-run").symlink_to(mine)
    said = report([theirs], tmp_path / "r.html")
    assert SECRET not in (tmp_path / "r.html").read_text()
    assert "a-run is a link" in " ".join(said.problems)
    assert report([theirs / "a-run"], tmp_path / "mine.html").runs == 1, "named, it is shown"
    assert SECRET in (tmp_path / "mine.html").read_text()


def test_a_hard_link_in_a_folder_shows_no_file_of_the_user(tmp_path):
    (secret := tmp_path / "secret.json").write_text(json.dumps(SECRET))
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"benchmark": SECRET, "date": "2026-01-01"}) + "\n")
    os.link(secret, running(tmp_path / "theirs/one"))
    os.link(rows, tmp_path / "theirs/ledger.jsonl")
    said = report([tmp_path / "theirs", material.write(tmp_path / "work")], tmp_path / "r.html")
    assert SECRET not in (tmp_path / "r.html").read_text()
    assert sum("it is a hard link" in problem for problem in said.problems) == 2
    report([tmp_path / "theirs/ledger.jsonl"], tmp_path / "named.html")
    assert SECRET in (tmp_path / "named.html").read_text()


def run_of(folder, items=(), **metrics):
    """A run's folder with one evaluation."""
    (folder / "evaluation/a").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("model: {path: x}\n")
    record = {"state": "finished", "method": {"name": "lora"}, "versions": {}, "device": "cpu"}
    (folder / "record.json").write_text(json.dumps(record))
    result = {"examples": 1, "split": "test", "metrics": metrics}
    (folder / "evaluation/a/result.json").write_text(json.dumps(result))
    (folder / "evaluation/a/items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.mark.parametrize(
    "name", ["record.json", "metrics.jsonl", "evaluation/a/result.json", "evaluation/a/items.jsonl"]
)
def test_a_hard_link_in_a_run_shows_no_file_of_the_user(name, tmp_path):
    run = run_of(tmp_path / "theirs", tuned={"a": 1.0})
    (run / name).unlink(missing_ok=True)
    (mine := tmp_path / "mine").write_text(json.dumps({"step": 1, "examples": SECRET, "split": SECRET, "metrics": {}}))
    os.link(mine, run / name)
    said = report([run, material.write(tmp_path / "good")], tmp_path / "r.html")
    assert any("it is a hard link" in problem for problem in said.problems), said.problems
    assert SECRET not in (tmp_path / "r.html").read_text()


WHOLE = Path(__file__).parents[2] / "results/studies/quick/results.json"


def first(**parts):
    """Changes the first comparison."""
    return lambda study: study["comparisons"][0].update(parts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda study: None, None),
        (first(verdict="significantly better"), "is called significantly better, and by its figures it is"),
        (first(p_holm=1e-9), "the interval or p of"),
        (first(low=0.5), "the interval or p of"),
        (first(difference=0.5), "the difference of"),
        (first(candidate_score=0.999), "the difference of"),
        (lambda study: study["methods"][0].update(score=0.999), "in one table and"),
        (lambda study: study["methods"][0]["seeds"][0].update(score=0.001), "the mean of its runs is another"),
        (lambda study: study["study"].pop("tasks"), "could not be computed"),
    ],
)
def test_a_verdict_that_does_not_follow_from_the_file_s_figures_is_named(change, said, tmp_path):
    change(study := json.loads(WHOLE.read_text()))
    (tmp_path / "results.json").write_text(json.dumps(study))
    report([tmp_path], tmp_path / "r.html")
    page = html.unescape((tmp_path / "r.html").read_text())
    assert ("contradicts itself" in page or "could not be computed" in page) == (said is not None)
    assert said is None or said in page


def test_few_values_make_no_endless_table(tmp_path):
    """Each row has a column of its own: a thousand of them are a million cells."""
    good = material.write(tmp_path / "good")
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("".join(json.dumps({"kind": "a", f"k{i}": 1}) + "\n" for i in range(20_000)))
    wide = run_of(tmp_path / "wide", **{f"v{i}": {f"m{i}": 1.0} for i in range(5000)})
    said = report([good, ledger, wide], tmp_path / "r.html")
    assert said.studies
    assert any("ledger.jsonl could not be shown: ValueError: a table of 20,000 rows" in each for each in said.problems)
    assert any("a table of 25,000,000 figures" in each for each in said.problems), said.problems


def test_tasks_without_an_end_make_no_page(tmp_path):
    item = {"variant": "tuned", "correct": False, "where": "", "expected": "a", "predicted": "b"}
    many = run_of(tmp_path / "many", ({**item, "task": f"é{i}"} for i in range(50_000)), tuned={"a": 1.0})
    said = report([material.write(tmp_path / "good"), many], tmp_path / "r.html")
    assert any("50,003 tables and charts, at most 2,000 are shown" in each for each in said.problems), said.problems


def test_a_source_that_takes_too_long_costs_only_itself(tmp_path, monkeypatch):
    from dual_lora.lab.report import report as module

    def slow(*_):
        while True:
            pass

    monkeypatch.setattr(module, "SECONDS", 0.5)
    monkeypatch.setattr(module, "run_sections", slow)
    run = run_of(tmp_path / "slow", tuned={"a": 1.0})
    said = report([material.write(tmp_path / "good"), run], tmp_path / "r.html")
    assert said.studies
    assert any("could not be shown within 0.5 seconds" in each for each in said.problems), said.problems


def test_studies_that_take_too_long_together_cost_no_page(tmp_path, monkeypatch):
    """Each alone has one task, so that nothing is compared over tasks."""
    from dual_lora.lab.report import report as module

    def of(task):
        made = material.study()
        one = next(m for m in made["methods"] if m["task"] == task)
        seeds = [{**one["seeds"][0], "score": 0.5 + i / 1e4} for i in range(1000)]
        names = ["lora", *(f"m{i}" for i in range(30))]
        compared = next(c for c in made["comparisons"] if c["task"] == task)
        methods = [{**one, "method": name, "seeds": seeds, "trials": []} for name in names]
        return {**made, "comparisons": [compared], "methods": methods, "pareto": []}

    monkeypatch.setattr(module, "SECONDS", 1.0)
    monkeypatch.setattr(module, "study_sections", lambda *_, **__: [])
    said = report([material.write_studies(tmp_path, of("boolq"), of("arc"))], tmp_path / "r.html")
    assert said.studies == 2
    assert said.problems == ["What all studies say together could not be shown within 1 seconds."]
