"""Nothing about a study changes unseen: plan, code, search. A stranger's study names no folder but its own."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

pytest.importorskip("peft")

from tiny_study import SHORT, cell, ended, figures, job, judged, laid_out, outcomes, trials, write_study

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import write_json
from dual_lora.lab.report.report import report
from dual_lora.lab.report.tables import show_results
from dual_lora.lab.study import compare as comparing
from dual_lora.lab.study import folder as folders
from dual_lora.lab.study import perform
from dual_lora.lab.study.cell import probe_job, trial_jobs
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.folder import StudyFolder, changes
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.job import damage, read_outcome, run_file
from dual_lora.lab.study.read import shipped_studies
from dual_lora.lab.study.rejudge import rejudge
from dual_lora.lab.study.search import choose, next_beyond_grid

RESULTS = Path(__file__).parents[2] / "results" / "studies"
LATE = "Amended after final runs had ended."


def test_the_plan_is_written_before_the_first_run(tiny, tmp_path, no_training, monkeypatch):
    original, seen = perform._trained, []

    def trained(job, runs, *more):
        plan = json.loads((runs.parent / "study.json").read_text())["plan"]
        seen.append((job.kind, plan.get("hash"), plan.get("before")))
        return original(job, runs, *more)

    monkeypatch.setattr(perform, "_trained", trained)
    results = compare(write_study(tiny), tmp_path / "out", progress=False)
    (plan,) = {print_of for _, print_of, _ in seen}
    assert results["plan"]["hash"] == plan
    assert {before for kind, _, before in seen if kind == "final"} == {0}
    assert results["amendments"] == []
    assert not any(LATE in c["sentence"] for c in results["comparisons"])


def test_a_change_is_named_in_results_verdicts_terminal_and_page(tiny, whole, copy_of_whole, capsys):
    before = outcomes(copy_of_whole)
    changed = write_study(tiny, seeds=3)
    with pytest.raises(UserError, match=r"study has changed since.*: seeds\. A study keeps .* --runs"):
        compare(changed, copy_of_whole, progress=False)
    results = compare(changed, copy_of_whole, longer=True, progress=False)
    assert before.items() <= outcomes(copy_of_whole).items(), "runs that both studies contain are kept"
    assert len(outcomes(copy_of_whole)) == len(before) + 2
    for now, then in zip(figures(results)[0], figures(whole)[0], strict=True):
        assert now[:2] == then
    (amendment,) = results["amendments"]
    assert amendment["what"] == "Changed: seeds."
    assert amendment["fields"] == {"seeds": [[1, 2], [1, 2, 3]]}
    assert (amendment["ended"], amendment["of"]) == (4, 4)
    assert results["plan"]["hash"] != whole["plan"]["hash"]
    assert all(c["sentence"].endswith(LATE) for c in results["comparisons"])
    show_results(results)
    said = "Changed: seeds. 4 of 4 final runs known by then had ended."
    assert said in " ".join(capsys.readouterr().out.split())
    page = copy_of_whole / "page.html"
    report([copy_of_whole / "results.json"], page)
    assert said in page.read_text()
    again = compare(changed, copy_of_whole, progress=False)
    assert again["amendments"] == results["amendments"], "once"
    judged = rejudge(again)
    assert len(judged["amendments"]) == 2
    assert all(c["sentence"].endswith(LATE) for c in judged["comparisons"])


def test_a_changed_study_takes_a_new_name_and_shares_the_runs(tiny, whole, copy_of_whole, tmp_path):
    before, runs = outcomes(copy_of_whole), copy_of_whole / "runs"
    results = compare(write_study(tiny, seeds=3), tmp_path / "more-seeds", runs=runs, progress=False)
    assert before.items() <= outcomes(copy_of_whole).items(), "runs that both studies contain are kept"
    assert len(outcomes(copy_of_whole)) == len(before) + 2
    assert results["amendments"] == []
    said = "4 of the final runs had ended before this study's plan was written, and were taken over."
    assert said in results["notes"]
    assert figures(compare(write_study(tiny), copy_of_whole, progress=False)) == figures(whole), "the first one's stay"


def test_a_change_before_any_final_run_is_no_late_one(tiny, tmp_path, no_training, monkeypatch):
    """It stands in the results, and casts no doubt on the verdicts."""
    with monkeypatch.context() as patch:
        patch.setattr(comparing.Runner, "run", lambda self: None)
        compare(write_study(tiny, search=None), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"changed since.*: margin"):  # that is not longer
        compare(write_study(tiny, search=None, margin=0.5), tmp_path / "out", longer=True, progress=False)
    results = compare(write_study(tiny, search=None, seeds=3), tmp_path / "out", longer=True, progress=False)
    (amendment,) = results["amendments"]
    assert (amendment["what"], amendment["ended"]) == ("Changed: seeds.", 0)
    assert not any(LATE in c["sentence"] for c in results["comparisons"])


def test_a_field_that_came_later_changes_no_study():
    assert changes({"a": 1}, {"a": 1, "new": 2}) == {}
    assert changes({"a": 1, "search": None}, {"a": 2, "search": {"x": 1}}) == {
        "a": (1, 2),
        "search": (None, {"x": 1}),
    }
    assert changes({"search": {"x": 1}}, {"search": {"x": 2, "why": ""}}) == {"search.x": (1, 2)}


def test_a_new_field_of_the_program_writes_no_new_plan(tmp_path):
    made = folders.StudyFolder(tmp_path)
    made.begin({"a": 1}, {"t data": {"b": 2}}, {}, tmp_path / "runs", False)
    plan = made.known.plan.model_copy()
    made.begin_finals(0)
    again = folders.StudyFolder(tmp_path).read()
    again.begin({"a": 1, "new": 0}, {"t data": {"b": 2, "new": 0}}, {}, tmp_path / "runs", False)
    assert (again.known.plan.hash, again.known.plan.before) == (plan.hash, 0)
    assert again.known.amendments == []
    with pytest.raises(UserError, match=r"recipes or data have changed since.*: t data\.b\."):
        again.begin({"a": 1, "new": 0}, {"t data": {"b": 3, "new": 0}}, {}, tmp_path / "runs", False)


# Versions of the code.


def of_version(monkeypatch, name):
    monkeypatch.setattr(perform, "code_version", lambda: name)
    monkeypatch.setattr(comparing, "code_version", lambda: name)


def test_runs_of_two_versions_are_not_compared(tiny, tmp_path, no_training, monkeypatch):
    study, out = write_study(tiny, search=None), tmp_path / "out"
    of_version(monkeypatch, "one, torch 1")
    with monkeypatch.context() as patch:
        original = perform._trained
        patch.setattr(perform, "_trained", lambda job, *more: original(job, *more) if job.seed == 1 else 1 / 0)
        first = compare(study, out, progress=False)
    assert not first["complete"]
    before = outcomes(out)

    of_version(monkeypatch, "two, torch 1")
    with pytest.raises(UserError, match=r"2 finished runs were done by another version .*\(one, torch 1\).*--out"):
        compare(study, out, progress=False)
    assert outcomes(out) == before
    with pytest.raises(UserError, match="2 finished runs were done by another version"):
        compare(study, tmp_path / "sharing", runs=out / "runs", progress=False)
    second = compare(study, tmp_path / "new", progress=False)
    assert second["complete"]
    assert {s["code"] for m in second["methods"] for s in m["seeds"]} == {"two, torch 1"}

    of_version(monkeypatch, "three, torch 1")
    again = compare(study, tmp_path / "new", progress=False)
    assert figures(again) == figures(second), "a finished study is of one version"


def test_probes_of_two_versions_are_not_mixed(tiny, tmp_path, monkeypatch):
    """A method that is added later gets its steps by the code that measured the others."""
    monkeypatch.setattr(perform, "_trained", lambda *_: {"training": {"steps": 8, "seconds": 8.0}})

    def probes(self):
        return self._measure([probe_job(self.study, cell) for cell in self.cells])

    monkeypatch.setattr(comparing.Runner, "run", probes)

    def study(*methods):
        budget = {"match": "time", "like": "lora"}
        return write_study(tiny, search=None, methods={name: {"r": 4} for name in methods}, budget=budget)

    of_version(monkeypatch, "one")
    compare(study("lora"), tmp_path / "out", progress=False)
    of_version(monkeypatch, "two")
    with pytest.raises(UserError, match=r"1 finished runs were done by another version of the code \(one\)"):
        compare(study("lora", "dual_lora"), tmp_path / "more", runs=tmp_path / "out" / "runs", progress=False)


def test_runs_that_do_not_say_their_version_are_kept_and_named(tiny, copy_of_whole):
    """As those of earlier versions are."""
    before = {}
    for file in (copy_of_whole / "runs").glob("*.json"):
        if file.stem.isalnum():
            values = json.loads(file.read_text())
            del values["code"]
            file.write_text(json.dumps(values))
            before[file.name] = file.stat().st_mtime_ns
    results = compare(write_study(tiny, seeds=3), copy_of_whole, longer=True, progress=False)
    assert before.items() <= outcomes(copy_of_whole).items()
    (note,) = [n for n in results["notes"] if "several versions of the code" in n]
    assert "not recorded" in note


# Old studies.


def as_begun_before(finished, out):
    """A finished study as an earlier version left it: a database, and no study.json."""
    shutil.copytree(finished, out)
    (out / "study.json").unlink()
    (out / "state.sqlite").write_bytes(b"SQLite format 3\0")
    values = yaml.safe_load((out / "study.yaml").read_text())
    for name in ("extend", "why") if values["search"] else ():
        del values["search"][name]
    (out / "study.yaml").write_text(yaml.safe_dump(values))


def test_an_old_study_opens_and_repeats_nothing(tiny, short, tmp_path):
    out = tmp_path / "out"
    as_begun_before(tiny / "short", out)
    before = outcomes(out)
    results = compare(write_study(tiny, **SHORT), out, progress=False)
    assert results["complete"]
    assert outcomes(out) == before


def test_an_old_search_went_not_beyond_its_grid_and_says_so(tiny, whole, tmp_path):
    out = tmp_path / "out"
    as_begun_before(tiny / "whole", out)
    before = outcomes(out)
    with pytest.raises(UserError, match=r"changed since.*: search\.extend\. A study keeps"):
        compare(write_study(tiny), out, progress=False)
    search = whole["study"]["search"] | {"extend": 0}
    assert compare(write_study(tiny, search=search), out, progress=False)["amendments"] == []
    assert outcomes(out) == before


def test_an_old_study_whose_runs_are_elsewhere_asks_for_them(tiny, short, tmp_path):
    out = tmp_path / "out"
    as_begun_before(tiny / "short", out)
    (out / "runs").rename(tmp_path / "shared")
    study = write_study(tiny, **SHORT)
    with pytest.raises(UserError, match=r"runs of this study lie in another folder.*name it with --runs"):
        compare(study, out, progress=False)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("*.json")}
    assert compare(study, out, runs=tmp_path / "shared", progress=False)["complete"]
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("*.json")}


# A stranger's study.


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("how", ["study.json", "link", "link of a run"])
def test_a_strangers_study_touches_no_other_folder(how, tiny, whole, copy_of_whole, tmp_path):
    mine = tmp_path / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    (mine / "checkpoints" / "precious.txt").write_text("years of work")
    (mine / "recipe.yaml").write_text("x")
    key = whole["methods"][0]["seeds"][0]["key"]
    runs = copy_of_whole / "runs"
    if how == "study.json":
        file = copy_of_whole / "study.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"runs": "../mine"}))
    elif how == "link":
        shutil.rmtree(runs)
        runs.symlink_to(mine)
    else:
        shutil.rmtree(runs / key)
        (runs / f"{key}.json").unlink()
        (runs / key).symlink_to(mine)
    before = snapshot(mine)
    if how == "link of a run":
        (failed,) = compare(tiny / "study.yaml", copy_of_whole, progress=False)["failed"]
        assert "is a link to" in failed
    else:
        with pytest.raises(UserError, match=r"outside of .*name it with --runs"):
            compare(tiny / "study.yaml", copy_of_whole, progress=False)
    report([copy_of_whole], tmp_path / "page.html")
    assert snapshot(mine) == before


def test_a_strangers_outcome_names_no_path(tmp_path):
    """The version of the code becomes part of a file's name, when a run is done again."""
    done = ended(job())[1]
    write_json(run_file(tmp_path, done.key), done.model_dump() | {"code": "../../.ssh/x, torch 1"})
    assert read_outcome(tmp_path, done.key) is None
    assert "damaged" in damage(tmp_path, done.key)


# The search.


def test_a_rate_beyond_the_grid():
    tried = [{"train.learning_rate": rate, "train.epochs": e} for rate in (1e-4, 3e-4, 1e-3) for e in (1, 2)]
    assert next_beyond_grid(tried[5], tried) == {"train.learning_rate": 3.3e-3, "train.epochs": 2}
    assert next_beyond_grid(tried[0], tried) == {"train.learning_rate": 3.3e-5, "train.epochs": 1}
    assert next_beyond_grid(tried[2], tried) is None
    assert next_beyond_grid(tried[0], tried[:4]) is None, "two rates have no inside"
    words = [{"train.learning_rate": rate} for rate in ("1e-4", 3e-4, "1e-3")]  # as YAML reads 1e-4
    assert next_beyond_grid(words[2], words) == {"train.learning_rate": 3.3e-3}
    assert next_beyond_grid({"train.epochs": 1}, [{"train.epochs": e} for e in (1, 2, 3)]) is None, "rates alone"


@pytest.mark.parametrize(("best", "extend", "rates"), [(1.0, 2, [3.3e-3, 1.1e-2]), (1.0, 0, []), (1.5e-3, 2, [3.3e-3])])
def test_the_search_goes_on_at_an_end_and_is_capped(best, extend, rates, tiny):
    grid = [1e-4, 3e-4, 1e-3]
    search = {"space": {"learning_rate": grid}, "extend": extend}
    study, cells = laid_out(tiny, search=search)
    done = {}

    def outcome(job):
        return done.get(job.key)

    def distance(job):
        return abs(math.log(job.settings["train.learning_rate"] / best))

    for own in cells.values():
        while left := [job for job in trial_jobs(study, own, outcome) if job.key not in done]:
            done |= {job.key: ended(job, score=distance(job))[1] for job in left}
        jobs = trial_jobs(study, own, outcome)
        assert [job.settings["train.learning_rate"] for job in jobs] == grid + rates
        assert len({job.key for job in jobs}) == len(jobs)
    assert [j.key for j in trial_jobs(study, own)] == [j.key for j in jobs[:3]], (
        "nothing beyond before the grid is done"
    )


def test_a_search_beyond_its_grid_is_said_and_repeated_by_nobody(tiny, tmp_path):
    """The loss of a model that has hardly begun to learn falls with the rate."""
    search = {"space": {"learning_rate": [1e-5, 3e-5, 1e-4]}}
    study = write_study(tiny, search=search, seeds=1)
    results = compare(study, tmp_path / "out", progress=False)
    for m in results["methods"]:
        assert [t["beyond"] for t in m["trials"]] == [False] * 3 + [True] * 2
        assert m["settings"] == {"train.learning_rate": 1.1e-3}
    (note,) = [n for n in results["notes"] if "went on beyond" in n]
    assert "(2 more at most): lora on letters (0.00033, 0.0011), dual_lora on letters" in note
    assert any("largest train.learning_rate tried (0.0011)" in n for n in results["notes"])
    before = outcomes(tmp_path / "out")
    assert figures(compare(study, tmp_path / "out", progress=False)) == figures(results)
    assert outcomes(tmp_path / "out") == before


def test_a_diverged_rate_ends_the_search():
    done = trials({1e-4: 0.3, 3e-4: 0.4, 1e-3: None})
    assert choose(done) == {"train.learning_rate": 3e-4}
    assert next_beyond_grid(choose(done), [job.settings for job, _ in done]) is None


def test_a_search_goes_by_what_judges_or_says_why(tiny):
    tasks = {"letters": {"recipe": str(tiny / "letters.yaml"), "metric": "choice"}}
    search = {"space": {"learning_rate": [1e-3, 1e-2]}, "metric": "loss"}
    with pytest.raises(UserError, match=r"letters compares by choice, but the search uses loss.*search.why"):
        laid_out(tiny, tasks=tasks, search=search)
    _, cells = laid_out(tiny, tasks=tasks, search=search | {"why": "forty records are few"})
    study, cells = laid_out(tiny, tasks=tasks, search=search | {"metric": None})
    assert {job.metric for job in trial_jobs(study, cells["lora"])} == {"choice"}


def test_published_results_say_by_what_they_were_tuned():
    results = rejudge(json.loads((RESULTS / "methods-cola" / "results.json").read_text()))
    note = "Tuned by loss, compared by matthews. What is best by one may be worst by the other."
    assert note in results["notes"]
    for tuned_by_what_judges in ("methods-e2e", "longer-cola"):
        results = rejudge(json.loads((RESULTS / tuned_by_what_judges / "results.json").read_text()))
        assert not any("Tuned by" in note for note in results["notes"])


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_searches_go_by_what_judges_or_say_why(name):
    from dual_lora.lab.recipe.read import read_recipe
    from dual_lora.lab.study.metrics import default_metric
    from dual_lora.lab.study.read import read_study

    study = read_study(name)
    for task in study.tasks.values():
        recipe = read_recipe(task.recipe)
        judge = task.metric or default_metric(recipe.evaluate.tasks, recipe.model.head)
        if study.search is not None:
            assert (study.search.metric or judge) == judge or study.search.why
            assert "cola" not in name or study.search.metric in (None, "matthews")


def other_weights(folder):
    """In the model that a study's recipe names."""
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder / "model").config).save_pretrained(folder / "model")


def test_other_weights_of_the_base_are_noticed(tmp_path):
    study = write_study(tmp_path, **SHORT)
    compare(study, tmp_path / "out", progress=False)
    compare(study, tmp_path / "out", progress=False)
    other_weights(tmp_path)
    with pytest.raises(UserError, match=r"recipes or data have changed.*: letters weights\. A study keeps"):
        compare(study, tmp_path / "out", progress=False)
    file = tmp_path / "out" / "study.json"
    known = json.loads(file.read_text())
    nameless = {"letters weights": {"file pytorch_model.bin": "0"}}
    file.write_text(json.dumps(known | {"recipes": known["recipes"] | nameless}))
    doubt = "It cannot be checked whether .* weights are those that the study was begun with"
    asks = pytest.raises(UserError, match=r"1 finished runs were made on other weights.*another --out")
    with pytest.warns(UserWarning, match=doubt), asks:  # by what the runs say
        compare(study, tmp_path / "out", progress=False)
    assert forecast(study, tmp_path / "new", runs=tmp_path / "out" / "runs").done == 0


def test_runs_on_another_base_are_kept_for_when_it_comes_back(tmp_path):
    """Its path is in their keys."""
    study = write_study(tmp_path, **SHORT)
    before = compare(study, tmp_path / "out", progress=False)
    config = LlamaForCausalLM.from_pretrained(tmp_path / "model").config
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    recipe = tmp_path / "letters.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace(str(tmp_path / "model"), str(tmp_path / "other")))
    assert recipe.read_text() != text
    compare(study, tmp_path / "other-out", runs=tmp_path / "out" / "runs", progress=False)
    recipe.write_text(text)
    runs = outcomes(tmp_path / "out")
    after = compare(study, tmp_path / "out", progress=False)
    assert figures(after)[:2] == figures(before)[:2]
    assert outcomes(tmp_path / "out") == runs, "nothing was done again"


def test_a_new_study_takes_no_run_on_other_weights(tmp_path):
    """From a folder that studies share."""
    study, shared = write_study(tmp_path, **SHORT), tmp_path / "shared"
    compare(study, tmp_path / "first", runs=shared, progress=False)
    other_weights(tmp_path)
    second = compare(study, tmp_path / "second", runs=shared, progress=False)
    alone = compare(study, tmp_path / "alone", progress=False)
    assert figures(second)[:2] == figures(alone)[:2]
    assert second["untrained"] == alone["untrained"]
    assert second["amendments"] == [], "nothing of it was changed"
    assert second["plan"]["before"] == 0
    with pytest.raises(UserError, match=r"changed since.*letters weights"):
        compare(study, tmp_path / "first", runs=shared, progress=False)


def test_weights_that_change_while_a_study_goes_on_are_noticed(tmp_path, monkeypatch):
    study, original = write_study(tmp_path, **SHORT), perform._base

    def then_others(job, runs):
        came = original(job, runs)
        other_weights(tmp_path)
        return came

    monkeypatch.setattr(perform, "_base", then_others)
    with pytest.raises(UserError, match="weights of a base have changed while the study went on"):
        compare(study, tmp_path / "out", progress=False)


def test_a_base_that_is_not_here_for_a_while_is_not_forgotten(tmp_path):
    now = {"letters model": {"path": "me/model", "revision": None}, "letters weights": {"a": "1"}}
    gone, other = ({**now, "letters weights": value} for value in ({}, {"a": "2"}))
    with StudyFolder(tmp_path) as folder:
        folder.begin({}, now, {}, tmp_path / "runs")
        folder.begin({}, gone, {}, tmp_path / "runs")
        with pytest.raises(UserError, match="letters weights"):
            folder.begin({}, other, {}, tmp_path / "runs")
        config = {**now, "letters weights": {"config hidden_size": "8"}}  # all that is here of a hub's at first
        folder.begin({}, config, {}, tmp_path / "runs")
        assert folder.known.recipes["letters weights"] == {"a": "1", "config hidden_size": "8"}
        wider = {**now, "letters weights": {"config hidden_size": "9"}}
        for another in (wider, other, {**gone, "letters model": {"path": "me/other", "revision": None}}):
            with pytest.raises(UserError, match="recipes or data have changed"):
                folder.begin({}, another, {}, tmp_path / "runs")


def test_a_longer_study_waits_for_no_run_of_the_plan_before(tmp_path, no_training):
    class Enough(Exception):
        pass

    ended = []

    def stop(*_, **__):
        ended.append(1)
        if len(ended) > 2:
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perform, "_trained", lambda *given, real=perform._trained: (stop(), real(*given))[1])
        with contextlib.suppress(Enough):
            compare(write_study(tmp_path, search=None, seeds=3), tmp_path / "out", progress=False)
    results = compare(write_study(tmp_path, search=None, seeds=[11, 12]), tmp_path / "out", longer=True, progress=False)
    assert results["complete"]
    assert folders.progress(tmp_path / "out" / "study.json") is None
    more = write_study(tmp_path, search=None, seeds=[11, 12, 13])
    amendments = compare(more, tmp_path / "out", longer=True, progress=False)["amendments"]
    assert (amendments[-1]["ended"], amendments[-1]["of"]) == (4, 4)


def test_a_retired_run_leaves_no_figure_of_what_it_forgot(tmp_path):
    runs, measured = [], lambda shift: [[100.0, 100 + shift + 0.1 * k, 20.0] for k in range(30)]
    for method, shift in (("a", 0.0), ("b", 6.0)):
        made = cell(tmp_path, method, [[[1.0]] * 30] * 3, metric="choice")
        evaluate = made.cell.recipe.evaluate.model_copy(update={"forgetting": "x.txt"})
        made.cell.recipe = made.cell.recipe.model_copy(update={"evaluate": evaluate})
        for of, _ in made.finals:
            write_json(run_file(tmp_path, of.key, "forgetting"), measured(shift))
        runs.append(made)
    of, outcome = runs[1].finals[2]
    perform.set_aside(tmp_path, outcome.key, outcome.code)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(f"{of.key}.f")]
    write_json(run_file(tmp_path, of.key, "forgetting"), measured(0.0))  # left by an earlier version
    runs[1].finals[2] = ended(of, status="diverged", score=None)
    said = judged(tmp_path, runs)
    assert not [c for c in said["comparisons"] if c["metric"] == "forgetting"]
    assert any("Forgetting of b on t is not compared" in note for note in said["notes"])


def test_an_unfinished_study_that_measures_forgetting_is_judged_again_alike(tmp_path):
    random = np.random.default_rng(3)
    runs = []
    for method, skill in (("a", 0.6), ("b", 0.72), ("c", 0.6), ("d", 0.6)):
        right = [(random.random((200, 1)) < skill).astype(float).tolist() for _ in range(4)]
        made = cell(tmp_path, method, right, metric="choice", finals=range(9) if method in "ab" else [0])
        evaluate = made.cell.recipe.evaluate.model_copy(update={"forgetting": "x.txt"})
        made.cell.recipe = made.cell.recipe.model_copy(update={"evaluate": evaluate})
        for of, _ in made.finals:
            nats = [[100.0, 100 + 6 * random.normal(), 20.0] for _ in range(30)]
            write_json(run_file(tmp_path, of.key, "forgetting"), nats)
        runs.append(made)
    before = judged(tmp_path, runs, reference="a")
    after = rejudge(before)
    assert not before["complete"]
    assert len(before["comparisons"]) == 2
    assert [c["p_holm"] for c in after["comparisons"]] == pytest.approx([c["p_holm"] for c in before["comparisons"]])


def test_times_of_two_devices_are_not_compared(tmp_path):
    runs = [cell(tmp_path, m, [[[1.0]] * 5] * 2, metric="choice", device="one") for m in "ab"]
    assert not [note for note in judged(tmp_path, runs)["notes"] if "devices" in note]
    of, outcome = runs[1].finals[1]
    runs[1].finals[1] = of, outcome.model_copy(update={"device": "another"})
    (note,) = [note for note in judged(tmp_path, runs)["notes"] if "devices" in note]
    assert note.endswith("one: a on t, b on t; another: b on t.")
