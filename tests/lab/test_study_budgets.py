"""Budgets in time and memory, matched by probes, and what --dry-run can say of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

import pytest

pytest.importorskip("peft")

from tiny_study import write_study

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.empty import fit
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.report.tables import show_forecast
from dual_lora.lab.run.train import run
from dual_lora.lab.study import plan
from dual_lora.lab.study.budget import Scale, _routed, match_by_probes, planned_steps
from dual_lora.lab.study.cell import final_jobs, probe_job
from dual_lora.lab.study.compare import Runner, compare
from dual_lora.lab.study.execute import Options
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.job import Outcome, Training, write_outcome
from dual_lora.lab.study.read import read_study

BOTH = {"lora": {"r": 4}, "dual_lora": {"r": 4}}


def took(job, **training):
    return Outcome(key=job.key, status="done", seconds=2.0, training=Training(**training))


def matched(tiny, measure, **changes):
    """The cells of a study by method, its probes answered by measure(method, rank) with what training took."""
    study = read_study(write_study(tiny, search=None, **changes))
    cells = plan.lay_out(plan.Plan.read(study))
    match_by_probes(study, cells, lambda jobs: [took(j, **measure(j.method, j.recipe.method.get("r"))) for j in jobs])
    return {cell.method: cell for cell in cells}


def memory(peak):
    return lambda method, rank: {"peak_memory": peak(method, rank)}


def time(seconds):
    return lambda method, rank: {"steps": 8, "seconds": 8 * seconds[method]}


def test_memory_budget_solves_for_the_rank(tiny):
    peak = memory(lambda method, r: 1e8 + 1e6 * r - 4e7 * (method == "dual_lora"))
    cells = matched(tiny, peak, methods=BOTH, budget={"match": "memory", "like": "lora"})
    lora, dual = cells["lora"], cells["dual_lora"]
    assert lora.rank == 4
    assert dual.rank == 44, "1e8 + 4e6 = 6e7 + 44e6"
    assert dual.recipe.method["r"] == 44
    assert dual.size.trainable == lora.size.trainable * 11
    assert abs(dual.mismatch) < 0.01


def test_memory_budget_tries_ranks_whose_parts_are_whole(tiny):
    methods = {"lora": {"r": 4}, "dual_lora": {"r": 5, "r1": "3r/5", "r2": "2r/5"}}
    peak = memory(lambda method, r: 1e8 + 1e6 * r - 4e7 * (method == "dual_lora"))
    dual = matched(tiny, peak, methods=methods, budget={"match": "memory", "like": "lora"})["dual_lora"]
    assert dual.rank == 40, "44, down to a multiple of 5"
    assert [dual.recipe.method[part] for part in ("r1", "r2")] == [24, 16]


def test_a_budget_like_dual_lora_by_the_ranks_of_its_parts(tiny):
    dual = {"r1": 3, "r2": 1, "alpha": "2r"}
    methods, budget = {"lora": {}, "dual_lora": dual}, {"match": "parameters", "like": "dual_lora"}
    cells = {
        cell.method: cell
        for cell in plan.lay_out(plan.Plan.read(read_study(write_study(tiny, methods=methods, budget=budget))))
    }
    assert cells["dual_lora"].rank == 4
    assert cells["dual_lora"].recipe.method["alpha"] == 8
    assert cells["dual_lora"].mismatch == 0


def test_memory_budget_that_cannot_be_met(tiny):
    with pytest.raises(UserError, match="191 MiB peak memory cannot be matched"):
        matched(tiny, memory(lambda _, r: 1e8 + 1e3 * r), methods=BOTH, budget={"match": "memory", "value": 2e8})


def test_time_budget_may_be_that_of_full_fine_tuning(tiny):
    """It is outside of every budget, and still may set one."""
    methods, budget = {"full": {}, "lora": {"r": 4}}, {"match": "time", "like": "full"}
    took = time({"full": 2.0, "lora": 0.5})
    cells = matched(tiny, took, methods=methods, reference="full", budget=budget)
    assert cells["full"].recipe.train.steps == 4
    assert cells["lora"].recipe.train.steps == 16
    assert cells["lora"].mismatch == 0


def test_time_budget_goes_by_steps_that_do_not_warm_up(tiny):
    """A method whose first step compiles its kernels is no slower in all others."""
    study = read_study(write_study(tiny, search=None, methods=BOTH, budget={"match": "time", "like": "lora"}))

    def probes(jobs, **more):
        seconds = {"lora": 8.0, "dual_lora": 80.0}
        return [took(j, steps=8, seconds=seconds[j.method]).model_copy(update=more) for j in jobs]

    def steps(measure):
        cells = plan.lay_out(plan.Plan.read(study))
        match_by_probes(study, cells, measure)
        return [cell.recipe.train.steps for cell in cells]

    assert steps(partial(probes, step_seconds=1.0)) == [4, 4]
    with pytest.raises(UserError, match=r"methods.dual_lora: the budget of 4 s .* 10 s with 1 steps"):
        steps(probes)  # of an earlier version, which did not tell


def test_time_budget_that_no_number_of_steps_meets(tiny):
    with pytest.raises(UserError, match=r"methods.lora: the budget of 1 s of training .* within 5%.* 2 s with 1 steps"):
        matched(tiny, time({"lora": 2.0, "dual_lora": 2.0}), budget={"match": "time", "value": 1.0})


def test_time_budget_gives_the_slower_method_fewer_steps(tiny, tmp_path):
    budget = {"match": "time", "like": "lora", "tolerance": 0.9}
    results = compare(
        write_study(tiny, methods=BOTH, budget=budget, search=None, seeds=1), tmp_path / "out", progress=False
    )
    lora, dual = results["methods"]
    assert "steps fit into" in dual["notes"][0]
    assert abs(dual["mismatch"]) < 0.9
    assert lora["cost"]["train_seconds"] is not None


@pytest.mark.parametrize(("match", "decided"), [("time", "steps"), ("memory", "rank")])
def test_forecast_says_what_probes_will_decide(match, decided, tiny, tmp_path, capsys):
    study = write_study(tiny, methods=BOTH, search=None, budget={"match": match, "like": "lora"})
    show_forecast(forecast(study, tmp_path / "out"))
    assert f"{decided}: by a probe of 8 steps" in capsys.readouterr().out


def test_forecast_of_a_time_budget_knows_its_finished_runs(tiny, tmp_path):
    budget = {"match": "time", "value": 1.0, "tolerance": 0.99}
    file = write_study(tiny, methods=BOTH, budget=budget, search=None, seeds=1)
    study, runs = read_study(file), tmp_path / "out" / "runs"
    runs.mkdir(parents=True)
    for cell in plan.lay_out(plan.Plan.read(study)):
        write_outcome(runs, took(probe_job(study, cell), steps=8, seconds=1.0))
    assert [row["steps"] for row in forecast(file, tmp_path / "out").rows] == [8, 8]


def test_time_left_counts_the_runs_after_the_search(tiny, tmp_path):
    study = read_study(write_study(tiny, search=None))
    made = Runner(study, StudyFolder(tmp_path), tmp_path, Options(), plan.lay_out(plan.Plan.read(study)))
    job = final_jobs(study, made.cells[0], {})[0]
    made.times.estimates = {(kind, "", "letters", "lora"): 60.0 for kind in ("trial", "final")}
    left = {"x": dataclasses.replace(job, kind="trial")}
    assert made._note(left) == "about 60 s left"
    made.later = [job] * 9
    assert made._note(left) == "about 10 min left"
    made.times.learn(
        job, 15.0
    )  # four times as fast as was foretold: so are, until one was seen, the runs of the search
    assert made.times.expect(dataclasses.replace(job, kind="trial")) == 15.0
    assert made.times.expect(job) == 15.0
    made.times.learn(dataclasses.replace(job, kind="trial"), 30.0)
    assert made.times.expect(dataclasses.replace(job, kind="trial")) == 30.0


def test_a_count_knows_the_modules_that_are_new(reviews, encoder_values, tmp_path):
    """DeBERTa's published files have no pooler: it is trained whole, as the head is."""
    from transformers import AutoTokenizer, DebertaV2Config, DebertaV2Model

    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_values["model"]["path"])
    DebertaV2Model(DebertaV2Config(vocab_size=len(tokenizer), max_position_embeddings=64, **size)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    encoder_values["model"]["path"], encoder_values["train"]["steps"] = str(tmp_path), 1
    recipe = build_recipe(encoder_values)
    done = run(recipe, tmp_path / "run", progress=False)
    assert Scale().size(recipe, 2).trainable == fit(recipe).trainable == done.trainable_parameters


def test_steps_of_epochs_are_of_the_records_that_are_left(lm_values, tmp_path):
    short, long = ({"prompt": "is the fire warm ? " * n, "answer": "true"} for n in (1, 20))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [short, long] * 12))
    lm_values["data"] |= {"train": str(tmp_path / "train.jsonl"), "max_length": 32}
    lm_values["train"] = {"epochs": 1.0, "batch_size": 4, "learning_rate": 0.01}
    recipe = build_recipe(lm_values)
    assert planned_steps(recipe) == 3 == run(recipe, tmp_path / "run", progress=False).steps
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(short) + "\n" for _ in range(20)))
    assert planned_steps(recipe) == 5, "a changed file is read again"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [short, long] * 12))
    nowhere = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": "not/here"})})
    assert planned_steps(nowhere) == 6, "for another machine: all of them"
    late = tmp_path / "late"
    comes = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(late)})})
    assert planned_steps(comes) == planned_steps(comes, fetch=True) == 6
    shutil.copytree(recipe.model.path, late)
    assert planned_steps(comes) == 3, "it is here now"


def test_experts_that_a_token_meets_cost_arithmetic():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )  # fmt: skip
    assert _routed(Qwen2MoeForCausalLM(config)) == 2 * 2 * 3 * 16 * 32  # layers, experts of a token, matrices
