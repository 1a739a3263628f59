"""`auto`: bf16 where it is faster, fp32 elsewhere; chosen once, written down, and kept by whatever comes after."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_study import write_study

from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.model import precision
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, read_recipe, shipped_recipes
from dual_lora.lab.run.resume import recipe_of_run
from dual_lora.lab.run.train import run
from dual_lora.lab.study import plan
from dual_lora.lab.study.cell import final_jobs
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.folder import StudyFolder
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.plan import settled_plan
from dual_lora.lab.study.read import read_study, shipped_studies


@pytest.fixture
def device(monkeypatch):
    """Function: make this device fast in bf16 or in fp32. Returns the milliseconds that it then has."""

    def make(short):
        found = {"bf16": {"fp32": 3.0, "bf16": 1.0}, "fp32": {"fp32": 3.0, "bf16": 30.0}}[short]
        monkeypatch.setattr(precision, "measure_products", lambda: found)
        precision.fast_precision.cache_clear()
        return found

    yield make
    precision.fast_precision.cache_clear()


AUTO = {"model": {"dtype": "auto"}, "train": {"autocast": "auto", "steps": 2, "checkpoint_every": 1}}


def auto_values(lm_values):
    return lm_values | {part: lm_values[part] | more for part, more in AUTO.items()}


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"),
    [(1.64, 0.42, "bf16"), (0.57, 1.02, "fp32"), (1.5, 36.0, "fp32"), (1.0, 0.8, "fp32")],
    ids=["tiles for bf16", "slower units", "none", "hardly faster"],
)
def test_the_faster_one_is_chosen(fp32, bf16, chosen):
    found = precision.faster_precision({"fp32": fp32, "bf16": bf16})
    assert found.precision == chosen
    assert found.milliseconds == {"fp32": fp32, "bf16": bf16}
    assert f"auto: {chosen}" in str(found)


CHOICE = """from dual_lora.lab.model.precision import fast_precision
print(fast_precision("cpu").precision, fast_precision("cpu") is fast_precision("cpu"))"""


def test_without_units_for_bf16_the_measurement_says_fp32():
    """oneDNN held to AVX2 has none, whatever the processor; torch's own queries still say that bf16 is supported."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("oneDNN is what computes in bf16 on x86-64")
    held = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", CHOICE], env=held, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["fp32", "True"]  # and it was measured once


def test_accelerators_are_asked_and_processes_on_cpus_do_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    precision.fast_precision.cache_clear()
    assert precision.fast_precision("cuda:0").precision == "bf16"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert precision.fast_precision("cuda:1").precision == "fp32"
    monkeypatch.setattr(precision, "measure_products", lambda: pytest.fail("each process would measure for itself"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert precision.fast_precision("cpu").precision == "fp32"
    precision.fast_precision.cache_clear()


@pytest.mark.parametrize(("short", "dtype", "autocast"), [("bf16", "bfloat16", "bf16"), ("fp32", "float32", "none")])
def test_a_run_writes_down_what_it_chose_and_keeps_it(short, dtype, autocast, device, lm_values, tmp_path, capsys):
    times = device(short)
    out = tmp_path / "run"
    run(build_recipe(auto_values(lm_values)), out)
    assert capsys.readouterr().err.count(f"auto: {short}") == 1
    kept = recipe_of_run(out)
    assert (kept.model.dtype, kept.train.autocast) == (dtype, autocast)
    said = json.loads((out / "record.json").read_text())["precision"]
    assert said["asked"] == {"model.dtype": "auto", "train.autocast": "auto"}
    assert said["chosen"] == {"model.dtype": dtype, "train.autocast": autocast}
    assert said["milliseconds"] == times

    device("fp32" if short == "bf16" else "bf16")  # another machine
    assert str(open_tuned(out).model.base_model.model.dtype) == f"torch.{dtype}"
    merge(out, tmp_path / "merged")
    weights = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert {str(w.dtype) for w in weights.values()} == {f"torch.{dtype}"}
    again = run(build_recipe(auto_values(lm_values)), out, resume=True, progress=False)
    assert again.steps == 2  # finished: the recipe is still the run's


def test_a_run_that_goes_on_elsewhere_keeps_its_precision(device, lm_values, tmp_path, monkeypatch):
    from dual_lora.lab.run.watch import Watch

    device("bf16")
    step_end = Watch.on_step_end

    def stop_at_one(self, args, state, control, **more):
        self.stopped_by = 2 if state.global_step == 1 else 0
        step_end(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", stop_at_one)
        assert run(build_recipe(auto_values(lm_values)), tmp_path / "run", progress=False).state == "interrupted"
    before = json.loads((tmp_path / "run" / "record.json").read_text())["precision"]
    device("fp32")
    result = run(build_recipe(auto_values(lm_values)), tmp_path / "run", resume=True, progress=False)
    assert result.state == "finished"
    assert result.tuned.model.base_model.model.dtype == torch.bfloat16
    assert json.loads((tmp_path / "run" / "record.json").read_text())["precision"] == before


def test_written_precision_is_not_measured(monkeypatch, lm_values, tmp_path):
    monkeypatch.setattr(precision, "measure_products", lambda: pytest.fail("measured"))
    precision.fast_precision.cache_clear()
    lm_values["train"]["steps"] = 1
    run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_shipped_recipes_and_studies_leave_the_precision_to_the_device():
    """But for settings of the paper and its predecessors, for models that need a GPU."""
    for name in shipped_recipes():
        recipe = read_recipe(name)
        written = {recipe.model.dtype, recipe.train.autocast} & {"bfloat16", "bf16"}
        assert not (written and recipe.model.path.startswith("package:")), name
    for name in shipped_studies():
        study = read_study(name)
        assert study.overrides.get("train", {}).get("autocast", "auto") == "auto", name


# Studies.

SHORT = {"search": None, "seeds": 1, "overrides": {"train": {"autocast": "auto"}, "model": {"dtype": "auto"}}}


def precision_of(folder):
    return {
        (recipe["model"]["dtype"], recipe["train"]["autocast"])
        for recipe in (yaml.safe_load(file.read_text()) for file in (folder / "runs").glob("*/recipe.yaml"))
    }


def test_a_study_chooses_once_and_says_what_it_had(device, tmp_path, capsys):
    times = device("bf16")
    study = write_study(tmp_path, **SHORT)
    results = compare(study, tmp_path / "out")
    assert capsys.readouterr().err.count("auto: bf16 for the whole study") == 1
    assert precision_of(tmp_path / "out") == {("bfloat16", "bf16")}
    assert results["precision"]["precision"] == results["study"]["precision"] == "bf16"
    assert results["precision"]["milliseconds"] == times
    assert "All runs: bfloat16 weights with bf16 autocast." in results["notes"]

    device("fp32")  # another machine: nothing is run again, and nothing is mixed
    again = compare(study, tmp_path / "out", progress=False)
    assert again["precision"] == results["precision"]
    assert precision_of(tmp_path / "out") == {("bfloat16", "bf16")}
    assert forecast(study, tmp_path / "out").done == forecast(study, tmp_path / "out").runs
    compare(tmp_path / "out" / "study.yaml", tmp_path / "out", progress=False)  # the folder's own study is the same

    new = compare(study, tmp_path / "new", progress=False)
    assert precision_of(tmp_path / "new") == {("float32", "none")}
    assert "All runs: float32 weights." in new["notes"]
    keys = [{s["key"] for m in r["methods"] for s in m["seeds"]} for r in (results, new)]
    assert not keys[0] & keys[1]


def test_a_study_begun_before_precisions_were_named_asks_for_its_own(device, tmp_path):
    device("fp32")
    written = {"train": {"autocast": "bf16"}, "model": {"dtype": "bfloat16"}}
    before = compare(write_study(tmp_path, **{**SHORT, "overrides": written}), tmp_path / "out", progress=False)
    (tmp_path / "out" / "study.json").unlink()  # as such a study was: it named no precision
    known = yaml.safe_load((tmp_path / "out" / "study.yaml").read_text())
    del known["precision"]
    (tmp_path / "out" / "study.yaml").write_text(yaml.safe_dump(known))
    with pytest.raises(UserError, match=r"begun with precision None: write `precision: bf16` or .*runs have it"):
        compare(write_study(tmp_path, **SHORT), tmp_path / "out", progress=False)
    after = compare(write_study(tmp_path, **SHORT, precision="bf16"), tmp_path / "out", progress=False)
    keys = [[s["key"] for m in r["methods"] for s in m["seeds"]] for r in (before, after)]
    assert keys[0] == keys[1]
    assert precision_of(tmp_path / "out") == {("bfloat16", "bf16")}


def test_keys_of_runs_that_were_written_in_bf16_are_the_same(tmp_path):
    written = {"train": {"autocast": "bf16"}, "model": {"dtype": "bfloat16"}}

    def keys(**study):
        read = read_study(write_study(tmp_path, **study))
        return [job.key for cell in plan.lay_out(plan.Plan.read(read)) for job in final_jobs(read, cell, {})]

    assert keys(**{**SHORT, "precision": "bf16"}) == keys(**{**SHORT, "overrides": written})
    assert set(keys(**{**SHORT, "precision": "bf16"})).isdisjoint(keys(**{**SHORT, "precision": "fp32"}))


def test_auto_is_no_value_to_vary(tmp_path):
    varied = {"sweep": {"train.autocast": ["auto", "none"]}, "reference": None, "budget": None}
    study = read_study(write_study(tmp_path, search=None, seeds=1, **varied))
    with pytest.raises(UserError, match="auto is one choice for the whole study"):
        settled_plan(study, StudyFolder(tmp_path / "none"))
