"""A module that a file names is imported only if a person has named it too, whatever the command."""

import io
import json
import os
import shutil
import sys

import pytest
import yaml

from dual_lora.lab import permission
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import ModelSection
from dual_lora.lab.run.train import run

OPTIMIZER = """
import torch
made = []
def factory(groups, lr):
    made.append((sum(p.numel() for g in groups for p in g["params"]), lr, groups[0]["weight_decay"]))
    return torch.optim.SGD(groups, lr=lr)
def wrong(groups, lr):
    return "no optimizer"
number = 3
"""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module `a_trap` that leaves a file when it is imported; the file."""
    sprung = tmp_path / "sprung"
    (tmp_path / "code").mkdir()
    code = f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
    (tmp_path / "code/a_trap.py").write_text(code + OPTIMIZER)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setenv(permission.VARIABLE, "")
    monkeypatch.delitem(__import__("sys").modules, "a_trap", raising=False)
    return sprung


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_lm, questions):
    """A run that somebody has made so that it asks for the trap."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = {
        "model": {"path": str(tiny_lm)},
        "method": {"name": "lora", "r": 4},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"tasks": ["loss"]},
    }
    run(build_recipe(values), folder, progress=False)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["method"]["name"] = "a_trap:lora"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    note = json.loads((folder / "adapter/lab.json").read_text())
    (folder / "adapter/lab.json").write_text(json.dumps({**note, "recipe": recipe}))
    return folder


def commands(finished, tmp_path):
    study = {"name": "s", "tasks": {"t": {"recipe": str(finished / "recipe.yaml")}}, "seeds": 1}
    methods = {"theirs": {"name": "a_trap:lora", "r": 4}, "lora": {"r": 4}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**study, "methods": methods}))
    there, adapter, out = str(finished), str(finished / "adapter"), str(tmp_path / "out")
    yield "train", ["train", f"{there}/recipe.yaml", "--out", out]
    shutil.copytree(finished, tmp_path / "begun", ignore=shutil.ignore_patterns("adapter"))
    yield "resume", ["train", "--resume", "--out", str(tmp_path / "begun")]
    yield "evaluate", ["evaluate", there]
    yield "evaluate an adapter", ["evaluate", adapter]
    yield "generate", ["generate", there, "is ice warm ?"]
    yield "merge", ["merge", there, out]
    yield "export", ["export", there, out, "--to", "merged"]
    yield "analyze", ["analyze", there]
    yield "check", ["recipes", "check", f"{there}/recipe.yaml"]
    theirs = ["--method.name", "lora", "--train.optimizer", "a_trap:factory", "--out", out]
    yield "optimizer", ["train", f"{there}/recipe.yaml", *theirs]
    yield "dry run", ["compare", str(tmp_path / "study.yaml"), "--dry-run", "--out", out]
    yield "compare", ["compare", str(tmp_path / "study.yaml"), "--out", out]


def test_no_command_imports_what_a_file_names(finished, trap, tmp_path, call):
    before = sorted(finished.rglob("*"))
    for name, arguments in commands(finished, tmp_path):
        code, _, said = call(*arguments)
        assert code == 1, name
        assert "asks to import the Python module a_trap" in said, (name, said)
        assert "--allow-module a_trap" in said, name
        assert not trap.exists(), name
    assert sorted(finished.rglob("*")) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["flag", "flag with =", "environment"])
def test_a_person_can_allow_it(how, finished, trap, monkeypatch, call):
    flags = {"flag": ["--allow-module", "a_trap"], "flag with =": ["--allow-module=a_trap"], "environment": []}[how]
    if how == "environment":
        monkeypatch.setenv(permission.VARIABLE, "other, a_trap")
    code, out, _ = call("evaluate", finished, *flags, "--json")
    assert code == 0
    assert trap.exists()
    assert json.loads(out)["metrics"]["tuned"]["loss"] > 0
    assert "a_trap" in os.environ[permission.VARIABLE], "what children inherit"


def test_another_module_stays_forbidden(finished, trap, call):
    assert "asks to import" in call("evaluate", finished, "--allow-module", "a_trap.part", "--allow-module", "a_tra")[2]
    assert "expected the name of a Python module" in call("evaluate", finished, "--allow-module")[2]
    assert not trap.exists()


@pytest.mark.parametrize("name", [".x", "", "a b", "os;", "../evil"])
def test_what_is_no_name_of_a_module(name, monkeypatch):
    monkeypatch.setenv(permission.VARIABLE, name)
    with pytest.raises(UserError, match="is not the name of a Python module"):
        permission.import_allowed(name, "method")
    with pytest.raises(UserError, match="expected the name of a Python module"):
        permission.allow(name)


def test_an_optimizer_of_ones_own(trap, lm_values, tmp_path, monkeypatch):
    """It gets what is trained, in groups, and the rate; a run without one is the same run as before."""
    from dual_lora.lab.recipe.read import identity

    same = identity(build_recipe(lm_values))
    assert identity(build_recipe({**lm_values, "train": {**lm_values["train"], "optimizer": "adamw_torch"}})) == same
    lm_values["train"]["optimizer"] = "a_trap:factory"
    lm_values["train"] |= {"rates": {"lora_B": 4.0}, "weight_decay": 0.5}
    with pytest.raises(UserError, match="asks to import the Python module a_trap"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert not trap.exists()
    monkeypatch.setenv(permission.VARIABLE, "a_trap")
    result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    import a_trap

    assert a_trap.made == [(result.trainable_parameters, 0.01, 0.5)]
    for name, message in (("number", "nothing to call"), ("none", "nothing to call"), ("wrong", "made a str")):
        lm_values["train"]["optimizer"] = f"a_trap:{name}"
        with pytest.raises(UserError, match=message):
            run(build_recipe(lm_values), tmp_path / name, progress=False)


def test_a_model_s_own_code_is_never_run_unasked(trap, tiny_lm, tmp_path):
    """transformers asks, and nobody answers here; its kernels from the hub are code as well."""
    model = shutil.copytree(tiny_lm, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "a_trap.C", "AutoModelForCausalLM": "a_trap.M"}}
    (model / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "code/a_trap.py", model)
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(ModelSection(path=str(model)))
    assert not trap.exists()
    with pytest.raises(UserError, match=r"model\.attention is 'someone/kernel'"):
        build_recipe({"model": {"path": str(tiny_lm), "attention": "someone/kernel"}})


@pytest.mark.parametrize("command", [["generate", "MODEL", "x"], ["estimate", "RECIPE"]], ids=lambda given: given[0])
def test_a_line_that_is_piped_in_is_no_answer_about_a_models_own_code(
    command, trap, tiny_lm, questions, tmp_path, call, monkeypatch
):
    """transformers asks whether to run it, and took the first line of whatever came through a pipe."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "theirs.py").write_text((tmp_path / "code/a_trap.py").read_text())
    values = {
        "model": {"path": str(base)},
        "method": {"name": "lora"},
        "data": {"train": str(questions / "train.json")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    given = [{"MODEL": str(base), "RECIPE": str(tmp_path / "recipe.yaml")}.get(part, part) for part in command]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    code, _, told = call(*given)
    assert code == 1
    assert "Its own code was not run: give the command at a terminal" in " ".join(told.split())
    assert not trap.exists()


@pytest.mark.parametrize("part", ["tower", "tokenizer"])
def test_nor_an_answer_about_the_code_of_a_part(part, trap, tiny_lm, tmp_path, call, monkeypatch):
    """Parts of a model ask by themselves: transformers does not hand them the no that it was given."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    (base / "theirs.py").write_text((tmp_path / "code/a_trap.py").read_text())
    config, tokenizer = (json.loads((base / f).read_text()) for f in ("config.json", "tokenizer_config.json"))
    if part == "tower":
        text = {"model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 22}
        tower = {"model_type": "blip_vision_model", "auto_map": {"AutoModel": "theirs.M"}, "name_or_path": str(base)}
        config = {"model_type": "gemma3", "text_config": text, "vision_config": tower}
    else:
        config |= {"question_encoder": {"model_type": "vit"}, "generator": {"model_type": "vit"}, "model_type": "rag"}
        del tokenizer["tokenizer_class"]
        for name in ("question_encoder_tokenizer", "generator_tokenizer"):
            (base / name).mkdir()
            (base / name / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["theirs.M", null]}}')
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hub"))
    code, _, told = call("chat", base, "--once", "x")
    assert code == 1
    if "vision_tower.post_layernorm" not in told:  # older versions of transformers take a known tower as their own
        assert "Its own code was not run: give the command at a terminal" in " ".join(told.split())
    assert not trap.exists()
    assert sys.stdin.read() == "y\n" * 5, "nothing was asked"


def test_code_that_was_not_run_is_not_named_in_what_is_written(finished_plain, tmp_path):
    """transformers saves what a base's files say of it, and llama.cpp's converter would run it unasked."""
    merge(finished_plain, tmp_path / "merged")
    for folder in (finished_plain, tmp_path / "merged"):
        for file in folder.rglob("*.json"):
            assert "evil" not in file.read_text(), file


@pytest.fixture
def finished_plain(tiny_lm, questions, tmp_path):
    """A run on a base of transformers' own classes, whose files name code on a hub as well."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    codes = {
        "config": {"AutoModelForCausalLM": "evil/x--m.M"},
        "tokenizer_config": {"AutoTokenizer": ["evil/x--t.T", None]},
    }
    for name, code in codes.items():
        file = base / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    values = {
        "model": {"path": str(base)},
        "method": {"name": "dual_lora", "r": 4},
        "data": {"train": str(questions / "train.json")},
        "train": {"steps": 1, "batch_size": 4, "checkpoint_every": 1},
    }
    run(build_recipe(values), tmp_path / "run", progress=False)
    return tmp_path / "run"


def test_no_process_imports_from_the_folder_that_a_command_is_given_in(tmp_path, monkeypatch):
    """`python -c` and `python -m` look there first: a study's workers, and trials of kernels."""
    from dual_lora.lab import entry, gpu_check
    from dual_lora.lab.study import execute

    mark = tmp_path / "mark"
    for name in ("socket", "random", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\nraise ImportError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(permission.SAFE_PATH, raising=False)
    worker = execute._start_worker(tmp_path, execute.Options(), 1, 0)
    worker.line.close()
    worker.process.join()
    assert (worker.process.exitcode, mark.exists()) == (0, False)
    assert isinstance(gpu_check._process("nothing"), str)
    assert not mark.exists()
    monkeypatch.setattr("dual_lora.lab.cli.main", lambda: None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    entry.main()
    assert os.environ[permission.SAFE_PATH] == "1"  # for those that libraries start
    assert os.environ[permission.SAFE_PROGRAMS] == "1"
