"""PEFT's method comparison: its results are judged, its experiments are methods, and a study is written for it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic")

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.judge import judge
from dual_lora.lab.judge.peft import method_entry, write_peft


def peft_result(folder, name, seed, accuracy, status="success", **last):
    """A file as https://github.com/huggingface/peft/blob/main/method_comparison/MetaMathQA/run.py writes it."""
    metrics = [{"step": 5, "valid accuracy": 0.3, "train loss": 0.6}]
    metrics += [{"step": 10, "test accuracy": accuracy, "train loss": 0.5, "forgetting": 0.1, **last}]
    run = {
        "created_at": "2026-07-15T05:41:18+00:00", "total_time": 20.0, "experiment_name": name, "peft_branch": "main",
        "train_config": {"model_id": "some/model", "max_steps": 10, "seed": seed}, "error_msg": "",
        "peft_config": {"peft_type": name.partition("/")[0].upper(), "r": 8},
    }  # fmt: skip
    train = {
        "accelerator_memory_reserved_avg": 1, "accelerator_memory_max": 2_000_000, "train_time": 10.0 + seed,
        "file_size": 1000, "num_trainable_params": 500, "num_total_params": 9000, "status": status, "metrics": metrics,
    }  # fmt: skip
    file = folder / "results" / f"{name.replace('/', '--')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"run_info": run, "train_info": train, "meta_info": {}}))
    return file


def test_results_of_pefts_comparison_are_judged(tmp_path):
    task = tmp_path / "MetaMathQA"
    for seed in range(4):
        peft_result(task, f"lora/r8-seed{seed}", seed, 0.30 + 0.001 * seed)
        peft_result(task, f"hira/r8-seed{seed}", seed, 0.40 + 0.002 * seed)
    peft_result(task, "ia3/default", 0, 0.1, status="canceled")
    (task / "experiments" / "vera" / "default").mkdir(parents=True)
    (task / "experiments" / "vera" / "default" / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    results = judge(task, reference="lora/r8", metric="test accuracy")
    (c,) = results["comparisons"]
    assert (c["candidate"], c["task"], c["model"]) == ("hira/r8", "MetaMathQA", "")
    assert c["verdict"] == "significantly better"
    notes = " ".join(results["notes"])
    assert "All runs are of some/model." in notes
    assert "did not end well: ia3/default" in notes
    assert "without a result: vera/default" in notes
    m = results["methods"][0]
    assert (m["cost"]["train_seconds"], m["cost"]["peak_memory"], m["trainable_parameters"]) == (11.5, 2_000_000, 500)
    assert judge(task / "results", metric="forgetting")["comparisons"][0]["better"] == "less"
    assert {f["cost"] for f in results["pareto"]} >= {"train_seconds", "peak_memory", "adapter_bytes"}


def test_runs_that_were_trained_otherwise_are_named(tmp_path):
    """PEFT publishes runs of 1,000 steps beside those of 5,000, and called memory otherwise in 2025."""
    for name, steps in (("lora/r8", 10), ("hira/r8", 10), ("lora/r8-steps5", 5)):
        file = peft_result(tmp_path, name, 0, 0.3)
        value = json.loads(file.read_text())
        value["run_info"]["train_config"] |= {"max_steps": steps, "optimizer_kwargs": {"lr": len(name)}}
        if name == "hira/r8":  # a field that the other versions do not have
            value["run_info"]["train_config"]["init_kv_cache_prefix"] = None
        value["train_info"]["cuda_memory_max"] = value["train_info"].pop("accelerator_memory_max")
        file.write_text(json.dumps(value))
    results = judge(tmp_path, metric="test accuracy")
    assert results["methods"][0]["cost"]["peak_memory"] == 2_000_000
    (said,) = [note for note in results["notes"] if "trained alike" in note]
    assert said.endswith("no method's: max_steps 5 in lora/r8-steps5 (10 elsewhere).")


def test_a_damaged_result_of_peft_is_named(tmp_path):
    peft_result(tmp_path, "lora/r8", 0, 0.3)
    peft_result(tmp_path, "hira/r8", 0, float("nan"))
    with pytest.raises(UserError, match=r"test accuracy is nan"):
        judge(tmp_path, metric="test accuracy")
    file = peft_result(tmp_path, "hira/r8", 0, 0.4)
    value = json.loads(file.read_text())
    del value["train_info"]["metrics"]
    file.write_text(json.dumps(value))
    with pytest.raises(
        UserError, match=r"hira--r8.json is no result of PEFT's method comparison: KeyError\('metrics'\)"
    ):
        judge(tmp_path, metric="test accuracy")


def test_an_experiment_folder_becomes_a_method_of_a_study(tmp_path):
    from peft import LoraConfig

    LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM").save_pretrained(tmp_path)
    (tmp_path / "training_params.json").write_text('{"optimizer_kwargs": {"lr": 0.0003}}')
    entry = method_entry(tmp_path)
    assert entry == {
        "name": "lora", "r": 32, "lora_alpha": 64, "target_modules": None, "train": {"learning_rate": 0.0003},
    }  # fmt: skip
    with pytest.raises(UserError, match="is no experiment"):
        method_entry(tmp_path / "nothing")


def test_experiments_are_printed_as_a_study_s_methods(tmp_path, call):
    import yaml

    from dual_lora.lab.study.study import MethodEntry

    for name, config in (("lora/r8", '{"peft_type": "LORA", "r": 8}'), ("hira/r4", '{"peft_type": "HIRA", "r": 4}')):
        (tmp_path / "experiments" / name).mkdir(parents=True)
        (tmp_path / "experiments" / name / "adapter_config.json").write_text(config)
    (tmp_path / "experiments" / "full" / "plain").mkdir(parents=True)
    (tmp_path / "experiments" / "full" / "plain" / "training_params.json").write_text('{"optimizer_kwargs": {"lr": 1}}')
    code, out, _ = call("judge", tmp_path, "--methods")
    assert code == 0
    methods = yaml.safe_load(out)["methods"]
    assert {k: MethodEntry.model_validate(v).name for k, v in methods.items()} == {
        "full/plain": "full", "hira/r4": "hira", "lora/r8": "lora",
    }  # fmt: skip
    assert methods["lora/r8"] == {"name": "lora"}, "8 is PEFT's own rank"
    assert call("judge", tmp_path / "experiments", "--methods")[0] == 1


@pytest.mark.slow
def test_a_study_is_written_for_peft_and_read_back(tmp_path, call):
    from tiny_study import write_study

    from dual_lora.lab.study.compare import compare

    results = compare(write_study(tmp_path, seeds=3, search=None), tmp_path / "out", progress=False)
    assert call("judge", tmp_path / "out", "--peft", tmp_path / "suite", "--json")[0] == 0
    again = judge(tmp_path / "suite", reference="lora/letters-lora", metric="test loss", better="less")
    (c,), (mine,) = again["comparisons"], results["comparisons"]
    assert c["candidate"] == "dual_lora/letters-dual_lora"
    assert c["difference"] == pytest.approx(mine["difference"])
    assert not any("without a result" in note for note in again["notes"]), "its experiments are there too"
    file = tmp_path / "suite" / "results" / "lora--letters-lora-seed2.json"
    written = json.loads(file.read_text())
    assert written["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert written["train_info"]["metrics"][-1]["train samples"] == 32
    experiment = tmp_path / "suite" / "experiments" / "lora" / "letters-lora-seed2"
    entry = method_entry(experiment)
    assert (entry["name"], entry["r"]) == ("lora", 4)
    assert "lora_alpha" not in entry, "8 is PEFT's own"
    assert entry["train"]["learning_rate"] == written["run_info"]["train_config"]["optimizer_kwargs"]["lr"]
    (tmp_path / "out" / "runs").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is not there: PEFT's results hold each run's loss"):
        write_peft(tmp_path / "out", tmp_path / "again")


@pytest.mark.slow
def test_methods_of_one_name_and_tasks_of_one_study_stay_apart(tmp_path):
    from tiny_study import write_study

    from dual_lora.lab.study.compare import compare

    two = {"lora": {"r": 4}, "lora+": {"name": "lora", "r": 2}}
    compare(write_study(tmp_path, methods=two, budget=None, search=None, seeds=1), tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"Two methods of .* would be lora/letters-lora-seed1 .* 'lora\+': give them"):
        write_peft(tmp_path / "out", tmp_path / "suite")
    tasks = {name: {"recipe": str(tmp_path / "letters.yaml"), "metric": "loss"} for name in ("A", "B")}
    tasks["B"]["train"] = {"steps": 3}
    one = {"lora": {"r": 4}, "dual_lora": {"r": 4}}
    file = write_study(tmp_path, methods=one, tasks=tasks, budget=None, search=None, seeds=1)
    compare(file, tmp_path / "two", progress=False)
    assert write_peft(tmp_path / "two", tmp_path / "both") == {"results": 4, "experiments": 4}
    for task in "AB":
        assert len([*(tmp_path / "both" / task / "results").iterdir()]) == 2


def hostile_study(folder, method="LORA", task="t", key="k1"):
    """The results and the one run of a stranger's study."""
    run = folder / "runs" / "k1"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("model: {path: m}\ndata: {train: a.csv}\nmethod: {name: lora}\n")
    sizes = ("steps", "loss", "tokens", "peak_memory", "seconds", "adapter_bytes")
    ended = dict.fromkeys((*sizes, "trainable_parameters", "all_parameters"), 1)
    record = {"method": {"peft_type": method}, "versions": {}, "platform": "", "device": "cpu", "result": ended}
    (run / "record.json").write_text(json.dumps(record))
    seed = {"seed": 1, "key": key, "status": "done", "score": 0.1, "figures": None, "seconds": 1}
    rows = [{"model": "", "task": t, "method": "lora", "metric": "loss", "seeds": [seed]} for t in (task, "other")]
    (folder / "results.json").write_text(json.dumps({"methods": rows}))
    return folder


@pytest.mark.parametrize("name", ["../../../victim", "{}/victim", "..", ".", "", "a/../../../../victim"])
@pytest.mark.parametrize("field", ["method", "task"])
def test_no_name_in_a_study_leads_out_of_the_folder(tmp_path, field, name):
    study = hostile_study(tmp_path / "study", **{field: name.format(tmp_path)})
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert write_peft(study, tmp_path / "work" / "out")["results"] == 2
    written = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert all(file.is_relative_to(tmp_path / "work" / "out") for file in written)
    assert len(written) == 6


def test_no_key_in_a_study_names_another_run(tmp_path):
    study = hostile_study(tmp_path / "study", key="../../mine")
    (study / "runs" / "k1").rename(tmp_path / "mine")
    with pytest.raises(UserError, match="no key of a run"):
        write_peft(study, tmp_path / "out")
