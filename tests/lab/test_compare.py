"""A study can be killed at any moment and goes on; equal jobs are done once; what diverged is said, not dropped."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

pytest.importorskip("peft")

from dual_lora.lab.cost.forecast import forecast
from dual_lora.lab.errors import UserError
from dual_lora.lab.run.write import write_json
from dual_lora.lab.study import execute as executors
from dual_lora.lab.study import job as jobs
from dual_lora.lab.study import perform, plan
from dual_lora.lab.study import use_cost as cost
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.probes import match_by_probes
from dual_lora.lab.study.read import read_study
from dual_lora.lab.study.state import State
from dual_lora.lab.study.tables import show_forecast, show_results

sys.path.insert(0, str(Path(__file__).parent))
from tiny_study import write_model, write_records, write_study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Model and data, made once; tests write their own studies beside them."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_records(folder / "train.jsonl", 1, 64)
    write_records(folder / "test.jsonl", 2, 40)
    return folder


@pytest.fixture(scope="module")
def whole(tiny):
    """The study run without interruption: what every other way of running it has to give."""
    return compare(write_study(tiny), tiny / "whole", progress=False)


@pytest.fixture(scope="module")
def short(tiny):
    """The same without a search and with one seed: three runs."""
    return compare(write_study(tiny, **SHORT), tiny / "short", progress=False)


SHORT = {"search": None, "seeds": 1}


@pytest.fixture
def copy_of_whole(tiny, whole, tmp_path):
    """The finished study's folder, to be damaged."""
    write_study(tiny)
    return Path(shutil.copytree(tiny / "whole", tmp_path / "out"))


def figures(results):
    """All that must not depend on how the runs were done: no times."""
    seeds = [[(s["seed"], s["key"], s["status"], s["score"]) for s in m["seeds"]] for m in results["methods"]]
    trials = [[(t["key"], t["status"], t["score"]) for t in m["trials"]] for m in results["methods"]]
    return seeds, trials, results["comparisons"]


def outcomes(folder):
    """Name -> time of writing of every finished run: a repeated run would write its file again."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "runs").glob("*.json") if p.stem.isalnum()}


def in_child(work):
    """Run in a forked process; returns its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


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
    again = compare(tiny / "study.yaml", tiny / "whole", progress=False)
    assert outcomes(tiny / "whole") == before
    assert figures(again) == figures(whole)


def test_studies_share_the_runs_that_they_have_in_common(whole, tiny, copy_of_whole):
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
    again = compare(other, copy_of_whole.parent / "other", progress=False)  # the place of the runs is remembered
    assert {p.stem for p in shared.glob("*.json") if p.name not in before and p.stem.isalnum()} == new
    assert figures(again) == figures(made)
    expected = forecast(other, copy_of_whole.parent / "other")
    assert expected.done == expected.runs == 3 * (2 + 2) + 1  # --dry-run knows the place as well; 1 is the base
    write_study(tiny)


POINTS = {
    "before training": ("dual_lora.lab.run.train", "_train"),
    "trained, outcome not written": ("dual_lora.lab.study.perform", "_scored"),
    "scores written, outcome not": ("dual_lora.lab.study.perform", "write_json"),
    "outcome written, not noted": ("dual_lora.lab.study.state:State", "finish"),
    "run begun, nothing done": ("dual_lora.lab.study.state:State", "start"),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(point, tiny, short, tmp_path, monkeypatch):
    """SIGKILL at the second time that a process reaches this point, twice; then it goes through."""
    owner, name = pkgutil.resolve_name(POINTS[point][0]), POINTS[point][1]
    original, calls, kills = getattr(owner, name), [], tmp_path / "kills"

    def fatal(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and (not kills.exists() or len(kills.read_text()) < 2):
            with kills.open("a") as file:
                file.write("x")
            die()
        return original(*args, **kwargs)

    study = write_study(tiny, **SHORT)
    monkeypatch.setattr(owner, name, fatal)
    seen: dict[str, int] = {}
    codes = []
    while not codes or (codes[-1] != 0 and len(codes) < 6):
        codes.append(in_child(lambda: compare(study, tmp_path / "out", progress=False)))
        now = outcomes(tmp_path / "out")
        assert seen.items() <= now.items(), "a finished run was lost or repeated"
        seen = now
    assert codes[-1] == 0
    assert codes[:-1] == [-signal.SIGKILL] * len(kills.read_text()), "the point was reached"
    assert len(codes) > 1
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(short)


def test_killed_in_training_goes_on_from_the_checkpoint(tiny, short, tmp_path, monkeypatch):
    from dual_lora.lab.run import train

    step_end, train_begin = train.Watch.on_step_end, train.Watch.on_train_begin

    def fatal(self, args, state, *rest, **more):
        step_end(self, args, state, *rest, **more)
        if state.global_step == 3 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            die()

    def noted(self, args, state, *rest, **more):
        with (tmp_path / "starts").open("a") as file:
            file.write(f"{state.global_step}\n")
        train_begin(self, args, state, *rest, **more)

    monkeypatch.setattr(train.Watch, "on_step_end", fatal)
    monkeypatch.setattr(train.Watch, "on_train_begin", noted)
    study = write_study(tiny, **SHORT)
    assert in_child(lambda: compare(study, tmp_path / "out", progress=False)) == -signal.SIGKILL
    assert in_child(lambda: compare(study, tmp_path / "out", progress=False)) == 0
    assert (tmp_path / "starts").read_text().split() == ["0", "2", "0"], "second start: checkpoint of step 2"
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(short)


@pytest.mark.slow
def test_killed_at_random_moments(tiny, whole, tmp_path):
    study = write_study(tiny)
    seen, wait = {}, 0.4
    for _ in range(40):
        child = multiprocessing.get_context("fork").Process(
            target=lambda: compare(study, tmp_path / "out", progress=False)
        )
        child.start()
        child.join(wait)
        wait += 0.37  # ever longer, so that an end comes on a slow machine too
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        now = outcomes(tmp_path / "out") if (tmp_path / "out" / "runs").exists() else {}
        assert seen.items() <= now.items(), "a finished run was lost or repeated"
        seen = now
        if child.exitcode == 0:
            break
    assert child.exitcode == 0
    assert figures(json.loads((tmp_path / "out" / "results.json").read_text())) == figures(whole)


def test_changed_study_is_noticed(tiny, whole, copy_of_whole):
    out = copy_of_whole
    before = outcomes(out)
    changed = write_study(tiny, seeds=3)
    with pytest.raises(UserError, match=r"changed since.*seeds.*--update"):
        compare(changed, out, progress=False)
    results = compare(changed, out, update=True, progress=False)
    assert before.items() <= outcomes(out).items(), "runs that both studies contain are kept"
    assert len(outcomes(out)) == len(before) + 2
    for now, then in zip(figures(results)[0], figures(whole)[0], strict=True):
        assert now[:2] == then


def test_changed_data_is_noticed_and_makes_other_runs(tiny, copy_of_whole):
    study, _ = read_study(write_study(tiny))
    first = [job["key"] for job in jobs.trial_jobs(study, plan.lay_out(study)[0])]
    text = (tiny / "test.jsonl").read_text()
    try:
        write_records(tiny / "test.jsonl", 3, 40)
        second = [job["key"] for job in jobs.trial_jobs(study, plan.lay_out(study)[0])]
        with pytest.raises(UserError, match=r"recipes or data have changed.*letters records.*--update"):
            compare(tiny / "study.yaml", copy_of_whole, progress=False)
    finally:
        (tiny / "test.jsonl").write_text(text)
    assert len({*first, *second}) == 4


@pytest.mark.parametrize("damage", ["foreign", "middle"])
def test_broken_state_is_kept_and_nothing_is_repeated(damage, tiny, whole, copy_of_whole, capsys):
    out, before, file = copy_of_whole, outcomes(copy_of_whole), copy_of_whole / "state.sqlite"
    if damage == "foreign":
        file.write_bytes(b"not a database at all" * 100)
    else:
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.seek(size // 2)
            opened.write(b"\xff" * (size // 3))
    results = compare(tiny / "study.yaml", out, progress=False)
    assert outcomes(out) == before
    assert figures(results) == figures(whole)
    assert len(list(out.glob("state.broken-*.sqlite"))) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "broken" in said
    assert "none is repeated" in said


def test_lost_state_still_knows_its_study(tiny, copy_of_whole):
    (copy_of_whole / "state.sqlite").unlink()
    with pytest.raises(UserError, match="changed since"):
        compare(write_study(tiny, seeds=3), copy_of_whole, progress=False)


def test_two_leaders_are_refused(tiny, tmp_path):
    with State(tmp_path / "out"), pytest.raises(UserError, match="Another process"):
        compare(write_study(tiny), tmp_path / "out", progress=False)


@pytest.mark.parametrize("lost", ["outcome, state gone", "outcome", "scores", "half of the scores"])
def test_damaged_run_is_done_again_alone(lost, whole, tiny, copy_of_whole):
    """One file of one run is damaged or deleted: that run alone is done again, with the same result."""
    before = outcomes(copy_of_whole)
    key = whole["methods"][0]["seeds"][0]["key"]
    if lost == "scores":
        (copy_of_whole / "runs" / f"{key}.scores.json").unlink()
    elif lost == "half of the scores":
        scores = copy_of_whole / "runs" / f"{key}.scores.json"
        scores.write_text(scores.read_text()[: scores.stat().st_size // 2])
    else:
        (copy_of_whole / "runs" / f"{key}.json").write_text('{"key": "')
    if "state gone" in lost:
        (copy_of_whole / "state.sqlite").unlink()
    results = compare(tiny / "study.yaml", copy_of_whole, progress=False)
    now = outcomes(copy_of_whole)
    assert [n for n in now if now[n] != before[n]] == [f"{key}.json"]
    assert figures(results) == figures(whole)


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


def test_failed_run_is_said_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    original = perform._trained

    def failing(job, folder, runs):
        if job["method"] == "dual_lora" and job["seed"] == 2:
            raise RuntimeError("the dog ate it")
        return original(job, folder, runs)

    study = write_study(tiny, search=None)
    monkeypatch.setattr(perform, "_trained", failing)
    results = compare(study, tmp_path / "out", progress=False)
    assert not results["complete"]
    assert "the dog ate it" in results["failed"][0]
    assert [s["status"] for s in results["methods"][1]["seeds"]] == ["done", "missing"]
    assert results["comparisons"] == [], "no verdict from half the seeds"
    assert "dual_lora on letters is not compared with anything: 1 of 2 runs have ended." in results["notes"]
    show_results(results)
    monkeypatch.undo()
    before = outcomes(tmp_path / "out")
    repaired = compare(study, tmp_path / "out", progress=False)
    assert repaired["complete"]
    assert before.items() <= outcomes(tmp_path / "out").items()


@pytest.mark.parametrize(
    ("figures", "items"),
    [
        ({"accuracy": 0.69, "loss": float("nan")}, [{"correct": True}]),
        ({"loss": float("inf")}, [{"nats": 1.0}]),
        ({"choice": 0.5}, [{"correct": True, "scores": [float("nan"), float("nan")]}]),
    ],
)
def test_a_model_of_nan_has_diverged_however_well_it_scores(figures, items, tmp_path):
    """Its answer is the first class or choice for every item, and that may be the most frequent one."""
    job = {"key": "k", "kind": "base", "metric": "accuracy"}

    def scored(job, runs):
        measured = SimpleNamespace(metrics={"tuned": figures}, items=items)
        example = SimpleNamespace(label="x", messages=None)
        return perform._scored(job, runs, measured, [example], ["x"], lambda *_: [[1.0]], lambda *_: 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perform, "_base", scored)
        assert perform.perform(job, tmp_path)["status"] == "diverged"
    assert perform.read_outcome(tmp_path, "k")["status"] == "diverged"


def test_what_is_written_is_json_for_everybody(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, (float("inf"), "NaN")], "b": -float("inf")})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, [None, "NaN"]], "b": None}


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


def test_own_warnings_reach_the_person_once_and_stay_with_the_run(tiny, tmp_path, monkeypatch, capsys):
    """They point at their caller, which is transformers, whose own warnings are none of anybody's business here."""
    original = perform._trained

    def warning(job, folder, runs):
        warnings.warn_explicit(WARNED, UserWarning, "trainer.py", 1, "transformers.trainer")
        warnings.warn_explicit("Something else.", UserWarning, "trainer.py", 1, "transformers.trainer")
        if job["seed"] == 2:
            raise RuntimeError("then it broke")
        return original(job, folder, runs)

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
        assert perform.read_outcome(tmp_path / "out" / "runs", m["seeds"][0]["key"])["warnings"] == [WARNED]


def test_time_left_counts_the_runs_after_the_search(tiny, tmp_path):
    with State(tmp_path / "out") as state:
        made = course(tiny, tmp_path / "out", state, lambda *_: 1.0, like="lora")
        job = jobs.final_jobs(made.study, made.cells[0], {})[0]
        made.clock.estimates = {(kind, "", "letters", "lora"): 60.0 for kind in ("trial", "final")}
        made.way = dataclasses.replace(made.way, workers=1)
        left = {"x": job | {"kind": "trial"}}
        assert made._note(left) == "about 60 s left"
        made.later = [job] * 9
        assert made._note(left) == "about 10 min left"


def test_one_seed_has_no_winner(tiny, tmp_path, capsys):
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


OWN = """
from dataclasses import dataclass
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from dual_lora.method.registration import _add_enum_member

class ShiftLayer(torch.nn.Module, BaseTunerLayer):
    adapter_layer_names = ("shift_bias",)
    def __init__(self, base, name):
        super().__init__()
        self.base_layer, self._active_adapter, self._disable_adapters, self.merged_adapters = base, name, False, []
        self.shift_bias = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(base.out_features))})
    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters else y + sum(self.shift_bias[name] for name in self.active_adapters)

class ShiftModel(BaseTuner):
    prefix, tuner_layer_cls, target_module_mapping = "shift_", ShiftLayer, {}
    def _create_and_replace(self, config, name, target, target_name, parent, **_):
        self._replace_module(parent, target_name, ShiftLayer(target, name), target)

_add_enum_member(PeftType, "SHIFT")

@dataclass
class ShiftConfig(PeftConfig):
    target_modules: str | None = None
    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SHIFT

register_peft_method(name="shift", config_cls=ShiftConfig, model_cls=ShiftModel)
"""


def test_a_choice_knows_what_one_answer_to_everything_would_reach(tiny, tmp_path):
    tasks = {"letters": {"recipe": str(tiny / "letters.yaml"), "metric": "choice"}}
    results = compare(write_study(tiny, tasks=tasks, **SHORT), tmp_path / "out", progress=False)
    records = [json.loads(line) for line in (tiny / "test.jsonl").read_text().splitlines()]
    yes = sum(record["answer"] == "yes" for record in records) / len(records)
    assert results["untrained"][0]["constant"] == max(yes, 1 - yes)


def test_a_method_of_the_user_s_own(tiny, tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DUAL_LORA_ALLOW_MODULES", "my_methods,no_methods")
    methods = {"lora": {"r": 4}, "mine": {"name": "my_methods:shift"}}
    wrong = write_study(tiny, methods=methods | {"mine": {"name": "no_methods:shift"}}, budget=None, search=None)
    with pytest.raises(UserError, match=r"no_methods cannot be imported.*PYTHONPATH"):
        plan.lay_out(read_study(wrong)[0])
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


def test_time_budget_gives_the_slower_method_fewer_steps(tiny, tmp_path):
    study = write_study(
        tiny,
        methods={"lora": {"r": 4}, "dual_lora": {"r": 4}},
        budget={"match": "time", "like": "lora", "tolerance": 0.9},
        search=None,
        seeds=1,
    )
    results = compare(study, tmp_path / "out", progress=False)
    lora, dual = results["methods"]
    assert "steps fit into" in dual["notes"][0]
    assert abs(dual["mismatch"]) < 0.9
    assert lora["cost"]["train_seconds"] is not None


def course(tiny, folder, state, peak, **budget):
    """A study under a memory budget whose probes are answered by `peak(rank)`, in bytes."""
    from dual_lora.lab.study.compare import Way, _Course

    study, _ = read_study(
        write_study(
            tiny, methods={"lora": {"r": 4}, "dual_lora": {"r": 4}}, budget={"match": "memory", **budget}, search=None
        )
    )
    made = _Course(study, folder, folder / "runs", state, Way("process", 1, "nothing", False), plan.lay_out(study))
    made._do = lambda *_: None
    made._outcome = lambda job: {
        "status": "done",
        "training": {"peak_memory": peak(job["recipe"]["method"]["name"], job["recipe"]["method"]["r"])},
    }
    return made


def test_memory_budget_solves_for_the_rank(tiny, tmp_path):
    with State(tmp_path / "out") as state:
        made = course(
            tiny, tmp_path / "out", state, lambda name, r: 1e8 + 1e6 * r - 4e7 * (name == "dual_lora"), like="lora"
        )
        made._match_by_probes()
        lora, dual = made.cells
        assert lora.rank == 4
        assert dual.rank == 44, "1e8 + 4e6 = 6e7 + 44e6"
        assert dual.recipe.method["r"] == 44
        assert dual.size.trainable == lora.size.trainable * 11
        assert abs(dual.mismatch) < 0.01


def test_memory_budget_that_cannot_be_met(tiny, tmp_path):
    with State(tmp_path / "out") as state:
        made = course(tiny, tmp_path / "out", state, lambda name, r: 1e8 + 1e3 * r, value=2e8)
        with pytest.raises(UserError, match="191 MiB peak memory cannot be matched"):
            made._match_by_probes()


def in_time(tiny, seconds, **changes):
    """The cells of a study under a time budget; seconds: method -> what a step of it takes."""
    study, _ = read_study(write_study(tiny, search=None, **changes))
    cells = plan.lay_out(study)

    def measure(probes):
        return [{"steps": 8, "seconds": 8 * seconds[job["method"]]} for job in probes]

    match_by_probes(study, cells, measure)
    return {cell.method: cell for cell in cells}


def test_time_budget_may_be_that_of_full_fine_tuning(tiny):
    """It is outside of every budget, and still may set one."""
    methods, budget = {"full": {}, "lora": {"r": 4}}, {"match": "time", "like": "full"}
    cells = in_time(tiny, {"full": 2.0, "lora": 0.5}, methods=methods, reference="full", budget=budget)
    assert cells["full"].recipe.train.steps == 4
    assert cells["lora"].recipe.train.steps == 16
    assert cells["lora"].mismatch == 0


def test_time_budget_that_no_number_of_steps_meets(tiny):
    with pytest.raises(UserError, match=r"methods.lora: the budget of 1 s of training .* within 5%.* 2 s with 1 steps"):
        in_time(tiny, {"lora": 2.0, "dual_lora": 2.0}, budget={"match": "time", "value": 1.0})


@pytest.mark.parametrize(("match", "decided"), [("time", "steps"), ("memory", "rank")])
def test_forecast_says_what_probes_will_decide(match, decided, tiny, tmp_path, capsys):
    methods = {"lora": {"r": 4}, "dual_lora": {"r": 4}}
    study = write_study(tiny, methods=methods, search=None, budget={"match": match, "like": "lora"})
    show_forecast(forecast(study, tmp_path / "out"))
    assert f"{decided}: by a probe of 8 steps" in capsys.readouterr().out


def test_forecast_of_a_time_budget_knows_its_finished_runs(tiny, tmp_path):
    study = write_study(
        tiny,
        methods={"lora": {"r": 4}, "dual_lora": {"r": 4}},
        budget={"match": "time", "value": 1.0, "tolerance": 0.99},
        search=None,
        seeds=1,
    )
    cells = plan.lay_out(read_study(study)[0])
    runs = tmp_path / "out" / "runs"
    runs.mkdir(parents=True)
    for cell in cells:
        key = jobs.probe_job(read_study(study)[0], cell)["key"]
        training = {"steps": 8, "seconds": 1.0}
        write_json(runs / f"{key}.json", {"key": key, "status": "done", "training": training, "seconds": 2.0})
    assert [row["steps"] for row in forecast(study, tmp_path / "out").rows] == [8, 8]


def test_cost_of_use_is_measured_once(tiny, tmp_path):
    results = compare(write_study(tiny, search=None, cost=True), tmp_path / "out", progress=False)
    for m in results["methods"]:
        assert m["cost"]["merge_seconds"] > 0
        assert m["cost"]["forward_slowdown"] > 0
        assert m["cost"]["adapter_bytes"] > 0
        assert m["cost"]["peak_memory"] > 2**20
    fronts = [p for p in results["pareto"] if p["cost"] == "train_seconds"]
    assert any(point["front"] for point in fronts[0]["points"])


@pytest.mark.parametrize("broken", ["_decode", "_merge_seconds"])
def test_a_cost_that_cannot_be_measured_loses_no_run(broken, tiny, tmp_path, monkeypatch):
    def failing(*_):
        raise IndexError("not with this cache")

    monkeypatch.setattr(cost, broken, failing)
    study = write_study(tiny, search=None, seeds=1, cost=True, methods={"lora": {"r": 4}}, budget=None)
    results = compare(study, tmp_path / "out", progress=False)
    assert results["complete"]
    assert results["failed"] == []
    measured, name = results["methods"][0]["cost"], {"_decode": "decode_slowdown"}.get(broken, "merge_seconds")
    assert measured[name] is None
    assert measured["forward_slowdown"] > 0
    what = name.replace("_", " ")
    assert f"{what} of lora on letters could not be measured: IndexError: not with this cache" in results["notes"]


def test_forecast_counts_and_learns(tiny, whole, tmp_path, capsys):
    study = write_study(tiny)
    fresh = forecast(study, tmp_path / "nothing")
    assert (fresh.runs, fresh.done) == (9, 0)
    assert fresh.seconds > 0
    assert not (tmp_path / "nothing").exists(), "a dry run leaves nothing behind"
    finished = forecast(study, tiny / "whole")
    assert (finished.runs, finished.done, finished.seconds) == (9, 9, 0.0)
    show_forecast(fresh)
    assert "Nothing was run" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("cards", "visible", "expected"),
    [(0, None, [None, None, None]), (2, None, ["0", "1", "0"]), (2, "4, GPU-7", ["4", "GPU-7", "4"])],
)
def test_workers_take_the_gpus_in_turn(cards, visible, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [executors._share(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == expected
    assert executors.runs_side_by_side("process", None) == (cards or os.cpu_count())
    assert (executors.runs_side_by_side("process", 5), executors.runs_side_by_side("serial", 5)) == (5, 1)


def test_unknown_executor_and_missing_ray(tiny, tmp_path, monkeypatch):
    study = write_study(tiny, search=None, seeds=1)
    with pytest.raises(UserError, match="Did you mean 'process'"):
        compare(study, tmp_path / "a", executor="proces", progress=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        compare(study, tmp_path / "b", executor="ray", progress=False)
    gone = write_study(tiny, overrides={"data": {"train": str(tmp_path / "gone.jsonl")}})
    with pytest.raises(UserError, match="There is no data file"):
        compare(gone, tmp_path / "c", progress=False)
    assert not list(tmp_path.iterdir()), "what is wrong from the start leaves nothing behind"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_processes_give_the_same_results_and_end_with_their_leader(tiny, whole, tmp_path):
    study = write_study(tiny)
    out = tmp_path / "out"
    program = (
        "import sys; from dual_lora.lab.study.compare import compare\n"
        "if __name__ == '__main__':\n"
        f"    compare({str(study)!r}, {str(out)!r}, executor='process', workers=2, progress=False)\n"
    )
    script = tmp_path / "lead.py"
    script.write_text(program)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    leader = subprocess.Popen([sys.executable, str(script)], env=environment)
    until = time.time() + 400
    while time.time() < until and not (out.exists() and outcomes(out) if (out / "runs").exists() else False):
        time.sleep(0.2)
    leader.kill()
    leader.wait()
    before = outcomes(out)
    assert before
    again = subprocess.run([sys.executable, str(script)], env=environment, check=True, timeout=700)
    assert again.returncode == 0
    assert before.items() <= outcomes(out).items()
    assert figures(json.loads((out / "results.json").read_text())) == figures(whole)


@pytest.mark.slow
def test_killed_worker_is_named(tiny, tmp_path, monkeypatch):
    """The process of one run dies, as it does when memory is full."""
    study = write_study(tiny, search=None, seeds=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "out"
    monkeypatch.setattr(executors, "_work", _dying_worker)
    results = compare(study, folder, executor="process", workers=2, progress=False)
    assert not results["complete"]
    assert len(results["failed"]) == 3
    assert "killed by signal 9" in results["failed"][0]


def _dying_worker(line, runs, keep):
    line.recv()
    die()


def test_a_ray_that_does_not_start_is_said_in_words(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no such cluster")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(UserError, match="Ray could not be reached or started: ConnectionError: no such cluster"):
        list(executors.run_jobs("ray", [{"key": "k"}], tmp_path, 1, "nothing", print))


@pytest.mark.slow
def test_ray_gives_the_same_results(tiny, whole, tmp_path):
    pytest.importorskip("ray")
    results = compare(write_study(tiny), tmp_path / "out", executor="ray", workers=2, progress=False)
    assert figures(results) == figures(whole)


def test_study_file_of_the_folder_reads_back(whole, tiny):
    study, _ = read_study(tiny / "whole" / "study.yaml")
    assert study.model_dump(mode="json") == whole["study"]
    assert yaml.safe_load((tiny / "whole" / "study.yaml").read_text())["name"] == "tiny"
