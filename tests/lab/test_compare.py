"""What a study does: it tunes, repeats, judges, says what is missing, and does equal runs once."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("peft")

from tiny_study import SHORT, figures, in_child, job, outcomes, write_records, write_study

from dual_lora import DualLoraWarning
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import write_json
from dual_lora.lab.report.tables import show_results
from dual_lora.lab.study import metrics, notes, perform, plan
from dual_lora.lab.study.cell import trial_jobs
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.job import read_outcome, read_scores, run_file
from dual_lora.lab.study.read import read_study


def test_whole_study(whole, tiny):
    assert whole["complete"]
    assert whole["failed"] == []
    assert [m["method"] for m in whole["methods"]] == ["lora", "dual_lora"]
    for m in whole["methods"]:
        assert len(m["trials"]) == 2
        assert [s["seed"] for s in m["seeds"]] == [1, 2]
        assert m["trainable_parameters"] == 4096
        best = min(m["trials"], key=lambda t: t["score"])
        assert m["settings"] == best["settings"], "the loss is better when it is less"
    (verdict,) = whole["comparisons"]
    assert (verdict["candidate"], verdict["reference"]) == ("dual_lora", "lora")
    assert verdict["candidate_score"] == pytest.approx(whole["methods"][1]["score"])
    assert (verdict["difference"] > 0) == (verdict["candidate_score"] < verdict["reference_score"])
    assert json.loads((tiny / "whole" / "results.json").read_text()) == whole
    assert not list((tiny / "whole").rglob("*.sqlite*"))
    assert not list((tiny / "whole" / "runs").glob("*/checkpoints"))
    adapters = list((tiny / "whole" / "runs").glob("*/adapter"))
    assert len(adapters) == 4, "the finals' adapters are kept"
    for adapter in adapters:
        record = json.loads((adapter.parent / "record.json").read_text())
        assert record["trainable_parameters"] == 4096, "what was counted beforehand is what trained"


def test_score_is_the_evaluation_s_own(whole):
    """What the items add up to is the figure that the evaluation reports."""
    for m in whole["methods"]:
        for s in m["seeds"]:
            assert s["score"] == pytest.approx(s["figures"]["loss"], rel=1e-12)


def test_second_call_repeats_nothing(whole, tiny):
    before = outcomes(tiny / "whole")
    again = compare(write_study(tiny), tiny / "whole", progress=False)
    assert outcomes(tiny / "whole") == before
    assert figures(again) == figures(whole)


def test_studies_share_the_runs_that_they_have_in_common(whole, tiny, copy_of_whole, no_training):
    """A second study with a third method, told where the first one's runs lie, does that method's runs alone."""
    shared = copy_of_whole / "runs"
    before = {p.name for p in shared.glob("*.json")}
    methods = {"lora": {"r": 4, "lora_alpha": "2r"}, "dual_lora": {}, "rslora": {"lora_alpha": "2r"}}
    other = write_study(tiny, methods=methods)
    made = compare(other, copy_of_whole.parent / "other", runs=shared, progress=False)
    assert made["complete"]
    old = {s["key"] for m in whole["methods"] for s in m["seeds"] + m["trials"]}
    new = {p.stem for p in shared.glob("*.json") if p.name not in before and p.stem.isalnum()}
    assert not new & old
    assert len(new) == 4  # two trials and two seeds of rslora
    with pytest.raises(UserError, match=r"runs of this study lie in '\.\./out/runs', .*name it with --runs"):
        compare(other, copy_of_whole.parent / "other", progress=False)
    again = compare(other, copy_of_whole.parent / "other", runs=shared, progress=False)
    assert {p.stem for p in shared.glob("*.json") if p.name not in before and p.stem.isalnum()} == new
    assert figures(again) == figures(made)
    expected = forecast(other, copy_of_whole.parent / "other", runs=shared)
    assert expected.done == expected.runs == 3 * (2 + 2) + 1  # 1 is the base
    assert made["plan"]["before"] == 4
    said = "4 of the final runs had ended before this study's plan was written, and were taken over."
    assert said in made["notes"]


def test_changed_data_is_noticed_and_makes_other_runs(tiny, copy_of_whole):
    study = read_study(write_study(tiny))
    first = [job.key for job in trial_jobs(study, plan.lay_out(plan.Plan.read(study))[0])]
    text = (tiny / "test.jsonl").read_text()
    try:
        write_records(tiny / "test.jsonl", 3, 40)
        second = [job.key for job in trial_jobs(study, plan.lay_out(plan.Plan.read(study))[0])]
        with pytest.raises(UserError, match=r"recipes or data have changed.*letters records.*--runs"):
            compare(tiny / "study.yaml", copy_of_whole, progress=False)
    finally:
        (tiny / "test.jsonl").write_text(text)
    assert len({*first, *second}) == 4


def test_without_a_study_the_command_says_how_to_write_one(call):
    code, out, _ = call("compare")
    assert code == 0
    assert "dual-lora compare mine.yaml" in " ".join(out.split())


DIVERGING = {"lora": {"r": 4}, "wild": {"name": "lora", "train": {"learning_rate": 1e30, "max_grad_norm": 0.0}}}


def test_diverged_run_is_recorded_and_counts(tiny, tmp_path):
    study = write_study(tiny, methods=DIVERGING, search=None)
    results = compare(study, tmp_path / "out", progress=False)
    assert results["complete"]
    wild = results["methods"][1]
    assert [s["status"] for s in wild["seeds"]] == ["diverged", "diverged"]
    assert wild["diverged"] == 2
    assert wild["score"] is None
    assert any("Every run of wild on letters diverged" in note for note in results["notes"])
    assert [c["verdict"] for c in results["comparisons"]] == ["no verdict, every run diverged"]
    show_results(results)
    before = outcomes(tmp_path / "out")
    compare(study, tmp_path / "out", progress=False)
    assert outcomes(tmp_path / "out") == before, "a diverged run is finished, it is not tried again"


def test_method_whose_every_trial_diverged(tiny, tmp_path):
    wild = {"name": "lora", "train": {"max_grad_norm": 0.0}, "search": {"learning_rate": [1e30, 1e31]}}
    study = write_study(tiny, methods={"lora": {"r": 4}, "wild": wild})
    results = compare(study, tmp_path / "out", progress=False)
    assert results["complete"]
    assert results["methods"][1]["diverged_in_search"]
    assert [t["status"] for t in results["methods"][1]["trials"]] == ["diverged", "diverged"]
    assert results["comparisons"][0]["candidate"] == "wild"
    assert results["comparisons"][0]["verdict"] == "no verdict, every run diverged"
    show_results(results)


def test_failed_run_is_said_and_the_others_go_on(tiny, tmp_path, no_training, monkeypatch):
    original = perform._trained

    def failing(job, *more):
        if job.method == "dual_lora" and job.seed == 2:
            raise RuntimeError("the dog ate it")
        return original(job, *more)

    study = write_study(tiny, search=None)
    monkeypatch.setattr(perform, "_trained", failing)
    results = compare(study, tmp_path / "out", progress=False)
    assert not results["complete"]
    assert "the dog ate it" in results["failed"][0]
    assert [s["status"] for s in results["methods"][1]["seeds"]] == ["done", "missing"]
    assert results["comparisons"] == [], "no verdict from half the seeds"
    assert "dual_lora on letters is not compared with anything: 1 of 2 runs have ended." in results["notes"]
    show_results(results)
    error = run_file(tmp_path / "out" / "runs", results["methods"][1]["seeds"][1]["key"], "error")
    assert "the dog ate it" in json.loads(error.read_text())
    monkeypatch.undo()
    before = outcomes(tmp_path / "out")
    repaired = compare(study, tmp_path / "out", progress=False)
    assert repaired["complete"]
    assert before.items() <= outcomes(tmp_path / "out").items()
    assert not error.exists()


@pytest.mark.parametrize(
    ("figures", "items"),
    [
        ({"accuracy": 0.69, "loss": float("nan")}, [{"task": "x", "correct": True}]),
        ({"loss": float("inf")}, [{"task": "x", "correct": True}]),
        ({"choice": 0.5}, [{"task": "x", "correct": True, "scores": [float("nan"), float("nan")]}]),
    ],
)
def test_a_model_of_nan_has_diverged_however_well_it_scores(figures, items, tmp_path, monkeypatch):
    """Its answer is the first class or choice for every item, and that may be the most frequent one."""

    def scored(job, runs):
        measured = SimpleNamespace(metrics={"tuned": figures}, items=items)
        return perform._scored(job, runs, measured, [SimpleNamespace(label="x", messages=None, part="")], ["x"])

    monkeypatch.setattr(perform, "_base", scored)
    made = job(kind="base")
    assert perform.perform(made, tmp_path).status == "diverged"
    assert read_outcome(tmp_path, made.key).status == "diverged"


def test_what_an_answer_counts_is_kept_of_several_test_sets_also_where_it_is_wrong(tmp_path):
    examples = [SimpleNamespace(label="x", messages=None, part=part) for part in "aaab"]
    items = [{"task": "x", "correct": right} for right in (True, True, False, False)]
    measured, made = SimpleNamespace(metrics={"tuned": {"accuracy": 0.5}}, items=items), job()
    score = perform._scored(made, tmp_path, measured, examples, ["x"])["score"]
    rows = read_scores(tmp_path, made.key)
    assert score == pytest.approx(rows[:, 0].mean()) == pytest.approx(1 / 3)
    assert metrics.reach(made.metric, [rows]) == 2.0
    measured.items = items[:3]
    perform._scored(made, tmp_path, measured, examples[:3], ["x"])
    assert read_scores(tmp_path, made.key).tolist() == [[1.0], [1.0], [0.0]], "of one set as before"


def test_runs_remember_how_many_there_were_at_a_time(tiny, whole, copy_of_whole):
    """Taken up by a study that runs alone, they were still measured beside others."""
    assert [m["measured_beside"] for m in whole["methods"]] == [[1], [1]]
    assert not any("side by side" in note or "comparable" in note for note in whole["notes"])
    for m in whole["methods"]:
        for seed in m["seeds"]:
            file = copy_of_whole / "runs" / f"{seed['key']}.json"
            write_json(file, json.loads(file.read_text()) | {"runs_at_a_time": 2})
    reused = compare(tiny / "study.yaml", copy_of_whole, progress=False)
    assert reused["provenance"]["runs_at_a_time"] == 1
    assert any(note.startswith("2 runs went side by side") for note in reused["notes"])


WARNED = "The factors of a Dual LoRA adapter do not move."


def test_own_warnings_reach_the_person_once_and_stay_with_the_run(tiny, tmp_path, no_training, monkeypatch, capsys):
    """They point at their caller, which is transformers, whose own warnings are none of anybody's business here."""
    original = perform._trained

    def warning(job, *more):
        warnings.warn_explicit(WARNED, DualLoraWarning, "trainer.py", 1, "transformers.trainer")
        warnings.warn_explicit("Something else.", UserWarning, "trainer.py", 1, "transformers.trainer")
        if job.seed == 2:
            raise RuntimeError("then it broke")
        return original(job, *more)

    monkeypatch.setattr(perform, "_trained", warning)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        results = compare(write_study(tiny, search=None), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"warning: {WARNED}") == 1
    assert "Something else" not in said
    assert results["notes"].count(f"warning: {WARNED}") == 1
    assert all(f"then it broke Warned before: {WARNED}" in failed for failed in results["failed"])
    for m in results["methods"]:
        assert read_outcome(tmp_path / "out" / "runs", m["seeds"][0]["key"]).warnings == [WARNED]


def test_what_the_laboratory_warns_of_stays_with_the_run(tiny, tmp_path, no_training, monkeypatch, capsys):
    """An answer that cannot be as long as the expected one counts against each method: the results say so."""
    original = perform._trained
    long = "{} of 8 expected answers are longer than evaluate.max_new_tokens = 2."

    def warning(job, *more):
        here = (perform.__file__, 1, perform.__name__)
        warnings.warn_explicit(long.format(1000 + job.seed), DualLoraWarning, *here)
        warnings.warn_explicit("Of a library.", UserWarning, *here)
        return original(job, *more)

    monkeypatch.setattr(perform, "_trained", warning)
    results = compare(write_study(tiny, seeds=2, search=None), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("expected answers are longer") == 1
    seeds = [seed["seed"] for seed in results["methods"][0]["seeds"]]
    first = f"warning: {long.format(1000 + seeds[0])} (And 1 more, with other numbers.)"
    assert [note for note in results["notes"] if note.startswith("warning")] == [first]
    key = results["methods"][0]["seeds"][1]["key"]
    assert read_outcome(tmp_path / "out" / "runs", key).warnings == [long.format(1000 + seeds[1])]


def test_warnings_are_told_apart_by_all_but_their_numbers():
    assert notes.without_numbers("In 12 of 1,320 answers 0.5 (3e-05).") == notes.without_numbers(
        "In 3 of 320 answers 1.25 (0.1)."
    )
    for one, other in (
        ("fc1", "fc2"),
        ("pythia-14m", "pythia-70m"),
        ("runs/a1", "runs/a2"),
        ("sst2 has 1", "sst3 has 1"),
    ):
        assert notes.without_numbers(one) != notes.without_numbers(other)
    assert notes.without_numbers("the run runs/0f1e2d3c4b5a6978 has") == notes.without_numbers(
        "the run runs/00112233445566ff has"
    )


def test_one_seed_has_no_winner(tiny, tmp_path, no_training, capsys):
    results = compare(write_study(tiny, seeds=1, search=None), tmp_path / "out", progress=False)
    assert [c["verdict"] for c in results["comparisons"]] == ["no verdict from one seed"]
    assert any("no winner can be called" in note for note in results["notes"])
    show_results(results)
    assert "no verdict from one seed" in capsys.readouterr().out


def test_interventions_reach_the_training(tiny, tmp_path):
    """Frozen factors keep their start, rounded ones hold values of the coarser format."""
    import torch
    from safetensors.torch import load_file

    methods = {
        "dual_lora": {"r": 4},
        "still": {"name": "dual_lora", "r": 4, "freeze": {"dual_lora_[CD]": 0}},
        "half": {"name": "dual_lora", "r": 4, "freeze": {"dual_lora_[AB]": 0.5}},
        "coarse": {"name": "dual_lora", "r": 4, "round": {"dual_lora_[CD]": "bfloat16"}},
        "none": {"name": "dual_lora", "r": 4, "train": {"learning_rate": 1e-30}},
    }
    study = write_study(tiny, methods=methods, reference="dual_lora", budget={"match": "none"}, search=None, seeds=1)
    results = compare(study, tmp_path / "out", progress=False)
    assert results["failed"] == []
    factors = {
        m["method"]: load_file(
            tmp_path / "out" / "runs" / m["seeds"][0]["key"] / "adapter" / "adapter_model.safetensors"
        )
        for m in results["methods"]
    }
    for name, start in factors["none"].items():
        still = bool({"dual_lora_C", "dual_lora_D"} & set(name.split(".")))
        if "dual_lora_warmup" in name or start.numel() < 8:
            continue
        assert torch.allclose(factors["still"][name], start, atol=1e-6) == still, name
        moved = ~torch.isclose(factors["coarse"][name], factors["coarse"][name].bfloat16().float(), atol=0, rtol=0)
        assert moved.any() != still, name
    sizes = {m["method"]: m["trainable_parameters"] for m in results["methods"]}
    assert sizes["still"] * 2 == sizes["dual_lora"], "a group that never moves is not trainable"


def test_a_choice_knows_what_one_answer_to_everything_would_reach(tiny, tmp_path, no_training):
    tasks = {"letters": {"recipe": str(tiny / "letters.yaml"), "metric": "choice"}}
    results = compare(write_study(tiny, tasks=tasks, **SHORT), tmp_path / "out", progress=False)
    records = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()]
    yes = sum(record["answer"] == "yes" for record in records) / len(records)
    assert results["untrained"][0]["constant"] == max(yes, 1 - yes)


def test_a_method_of_the_user_s_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_ALLOW_MODULES", "own_method,no_methods")
    methods = {"lora": {"r": 4}, "mine": {"name": "own_method:shift"}}
    wrong = write_study(tiny, methods=methods | {"mine": {"name": "no_methods:shift"}}, budget=None, search=None)
    with pytest.raises(UserError, match=r"no_methods cannot be imported.*PYTHONPATH"):
        plan.lay_out(plan.Plan.read(read_study(wrong)))
    study = write_study(tiny, methods=methods, budget=None, search=None, seeds=1)
    assert in_child(lambda: compare(study, tmp_path / "out", progress=False)) == 0  # this process's PEFT stays as it is
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["complete"]
    mine = results["methods"][1]
    assert mine["trainable_parameters"] == 2 * (32 * 3 + 16 * 2 + 64 * 2)  # the outputs of both blocks' linear layers
    assert mine["seeds"][0]["score"] not in (
        results["methods"][0]["seeds"][0]["score"],
        results["untrained"][0]["score"],
    )


@pytest.mark.slow
def test_the_field_runs(tiny, tmp_path):
    """Every method that the shipped studies name trains, is evaluated and gets a verdict."""
    lora_like = ["lora", "rslora", "lora+", "dora", "pissa", "olora", "lora-ga"]
    names = [*lora_like, "dual_lora", "vera", "randlora", "hira", "loha"]
    methods = {name: {"r": 4} for name in names} | {"adalora": {"tinit": 1, "tfinal": 1}, "full": {}}
    study = write_study(tiny, methods=methods, budget={"match": "none"}, search=None, seeds=1)
    results = compare(study, tmp_path / "out", progress=False)
    assert results["failed"] == []
    assert all(m["seeds"][0]["status"] == "done" for m in results["methods"])
    assert len(results["comparisons"]) == len(methods) - 1
    scores = [m["seeds"][0]["score"] for m in results["methods"]]
    assert len(set(scores)) == len(scores), "no two methods are secretly the same"


@pytest.mark.parametrize(("name", "package"), [("galore", "galore_torch"), ("apollo", "apollo_torch")])
def test_low_rank_optimizers_run(name, package, tiny, tmp_path):
    """Their packages come with `pip install galore-torch apollo-torch`."""
    pytest.importorskip(package)
    study = write_study(tiny, methods={"full": {}, name: {}}, budget=None, search=None, seeds=1, reference="full")
    results = compare(study, tmp_path / "out", progress=False)
    assert results["failed"] == []
    full, other = results["methods"]
    assert other["seeds"][0]["status"] == "done"
    assert other["seeds"][0]["score"] != full["seeds"][0]["score"], "it trained by its own rule"


def test_study_file_of_the_folder_reads_back(whole, tiny):
    study = read_study(tiny / "whole" / "study.yaml")
    assert study.model_dump(mode="json") == whole["study"]
    assert yaml.safe_load((tiny / "whole" / "study.yaml").read_text())["name"] == "tiny"
