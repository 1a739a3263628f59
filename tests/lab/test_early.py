"""What is wrong with a run is said before a library is imported, and what goes on is said from the first moment."""

import errno
import json
import sys

import pytest
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from dual_lora.lab.errors import UserError, memory_full
from dual_lora.lab.model.location import check_here, suggest_model
from dual_lora.lab.model.methods import method_config, method_fields
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.early import check, check_method, declared_fields
from dual_lora.lab.run.failures import _less_memory
from dual_lora.lab.run.record import total_memory
from forked import forking

HEAVY = {"torch", "transformers", "peft", "datasets", "scipy", "pandas", "huggingface_hub"}


@pytest.fixture(scope="module")
def fresh():
    """Function: code -> (exit status, what it printed), in a process that has the command line and no command yet."""
    with forking("from dual_lora.lab.cli import main") as run:
        yield run


@pytest.fixture
def here(tmp_path):
    """A folder with records, a folder that is in use, and a model's folder."""
    records = [{"prompt": "Is it so?", "answer": "yes"}, {"prompt": "Is it not?", "answer": "no"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "labels.csv").write_text("text,label\ngood,1\nfine,1\n")
    (tmp_path / "odd.csv").write_text("question,reply\nso?,yes\n")
    for folder, file in (("used", "x"), ("my-model", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--out used", "The output folder used is not empty"),
        ("--method.rank 4", "method dual_lora has no field 'rank'. Did you mean 'r'?"),
        ("--method.name lora --method.lora_alhpa 4", "Did you mean 'lora_alpha'?"),
        ("--data.train trian.jsonl", "Did you mean 'train.jsonl'?"),
        ("--data.train odd.csv", "odd.csv, line 2: fields question, reply fit no format"),
        ("--data.train labels.csv", "set model.head to classification"),
        ("--data.train labels.csv --model.head classification", "hold one class only (1)"),
        ("--model.path ./my-modle", "There is no folder ./my-modle. Did you mean ./my-model?"),
        ("--model.path ./my-model/config.json", "is a file, expected a folder with a config.json, a .gguf file"),
        ("--model.path package:no-such", "The package no-such is not installed"),
    ],
)
def test_an_early_error_imports_nothing_heavy(more, message, fresh, here):
    usual = {"--model.path": "./my-model", "--data.train": "train.jsonl", "--out": "runs/new"}
    words = more.split()
    usual |= dict(zip(words[::2], words[1::2], strict=True))
    given = ["train", *(word for pair in usual.items() for word in pair)]
    status, said = fresh(
        "from dual_lora.lab.cli import main\n"
        f"import os, sys\nos.chdir({str(here)!r})\n"
        f"try: main({given})\nexcept SystemExit as end: assert end.code == 1\n"
        f"sys.exit(repr(sorted({HEAVY} & set(sys.modules)))[1:-1] or 0)"
    )
    assert message in " ".join(said.split())
    assert status == 0, said
    assert not (here / "runs").exists()


@pytest.mark.parametrize("command", ["predict {} train.jsonl", "evaluate {}", "generate {} x", "chat {} --once x",
    "merge {} new", "export {} new --to lora --rank 4", "verify {}", "analyze {}", "card {}", "report {}"])  # fmt: skip
def test_a_misspelled_run_is_said_before_anything_heavy_is_imported(command, fresh, here):
    """But huggingface_hub, which looks into its cache."""
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "record.json").write_text("{}")
    status, said = fresh(
        "from dual_lora.lab.cli import main\n"
        f"import os, sys\nos.chdir({str(here)!r})\nos.environ['HF_HUB_OFFLINE'] = '1'\n"
        f"try: main({command.format('runs/mien').split()})\nexcept SystemExit as end: assert end.code == 1\n"
        f"sys.exit(repr(sorted({HEAVY - {'huggingface_hub'}} & set(sys.modules)))[1:-1] or 0)"
    )
    said_plainly = " ".join(said.split())
    assert "There is no" in said_plainly, said
    assert "Did you mean ./runs/mine?" in said_plainly or "Did you mean 'mine'?" in said_plainly, said
    assert status == 0, said


def test_the_first_line_comes_before_the_libraries(fresh, here):
    """With everything right the next thing is the import of torch, which is kept from happening here."""
    given = ["train", "--model.path", "./my-model", "--data.train", "train.jsonl", "--out", "new"]
    _, said = fresh(
        "from dual_lora.lab.cli import main\n"
        f"import os, sys\nos.chdir({str(here)!r})\nsys.modules['torch'] = None\n"
        f"try: main({given})\nexcept SystemExit: pass\n"
    )
    assert said.startswith("new: dual_lora on ./my-model, into new\n"), said


def test_the_help_needs_no_fields_of_a_recipe(fresh):
    status, said = fresh(
        "import sys\nfrom dual_lora.lab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'pydantic', 'yaml', 'rich.progress'} & set(sys.modules)))"
    )
    assert status == 0, said


def test_fields_are_those_of_the_configurations():
    """Read from the source. A class that inherits from another method's is left to the later check."""
    found = {name: declared_fields(name) for name in [str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING]}
    for name, fields in found.items():
        assert fields in ([], sorted(method_fields(name))), name
    assert "fused" in found["hira"]
    assert len([fields for fields in found.values() if fields]) > len(found) / 2
    assert {"r", "warmup_steps", "lora_alpha", "use_dora"} <= set(found["dual_lora"]), "LoRA's are taken"
    assert "use_dora" in found["lora"]
    assert declared_fields("full") == declared_fields("../lora") == []
    assert issubclass(PEFT_TYPE_TO_CONFIG_MAPPING["LORA"], PeftConfig)


def test_a_lora_recipe_takes_the_other_name_alone():
    """LoRA's fields stay, as in `DualLoraConfig`, and a value that is another method's is named."""
    lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "use_dora": False, "init_lora_weights": True, "bias": "none"}
    recipe = {"model": {"path": "x"}, "data": {"train": "t.jsonl"}, "method": {"name": "dual_lora", **lora}}
    check_method(build_recipe(recipe))
    found = method_config(recipe["method"], "causal", 100, [])
    assert (found.r, found.alpha, found.dropout, found.init_weights) == (8, 32, 0.1, True)
    with pytest.raises(UserError, match="use_dora=True asks for DoRA"):
        method_config(recipe["method"] | {"use_dora": True}, "causal", 100, [])


def test_an_alias_has_the_fields_of_its_method():
    recipe = {"model": {"path": "x"}, "data": {"train": "t.jsonl"}}
    check_method(build_recipe(recipe | {"method": {"name": "dora", "r": 8}}))
    with pytest.raises(UserError, match="method dora has no field 'rr'"):
        check_method(build_recipe(recipe | {"method": {"name": "dora", "rr": 8}}))


def test_records_on_the_hub_are_left_for_later(here, monkeypatch):
    monkeypatch.chdir(here)
    check(build_recipe({"model": {"path": "./my-model"}, "data": {"train": "hub:nobody/nothing"}}), here / "new")


def test_a_missing_model_names_the_one_beside(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"There is no model 'my-modell': .* Did you mean ./my-model\?"):
        check_here("my-modell")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE forbids a download\.$"):
        check_here("somebody/else-entirely")
    (run := here / "runs" / "mine").mkdir(parents=True)
    (run / "record.json").touch()
    for wrong in ("run/mine", "runs/mien"):
        with pytest.raises(UserError, match=r"Did you mean ./runs/mine\?"):
            check_here(wrong, others=", run or adapter")
    assert suggest_model("runs/mien") == ""  # a base is no run
    assert suggest_model("model") == " Did you mean ./my-model?"
    assert suggest_model(str(here / "my-modell")) == f" Did you mean {here / 'my-model'}?"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, **_: name)
    check_here("my-modell")  # it is on the hub


def _caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "The machine's memory is full."),
        (MemoryError("Unable to allocate 3.00 GiB for an array"), "when 3.00 GiB more were asked for"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096000000 bytes."), "4.1 GB"),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), "memory is full."),
        (RuntimeError("can't start new thread"), "memory is full."),
        (OSError(errno.ENOMEM, "no room"), "memory is full."),
        (_caused(ValueError("a library's own"), MemoryError()), "memory is full."),
        (_caused(UserError("in our words"), MemoryError()), ""),
        (RuntimeError("shapes do not fit"), ""),
        (ValueError("not so"), ""),
    ],
)
def test_memory_that_is_not_there(error, said, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.errors.memory_limit", lambda: 0)  # one that a command has set
    assert said in memory_full(error)
    assert bool(memory_full(error)) is bool(said)


def test_a_device_without_memory_says_what_would_help():
    import torch

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a capacity of 8 GiB")
    assert memory_full(error) == "The device's memory is full when 2.50 GiB more were asked for."
    recipe = build_recipe({"model": {"path": "x"}, "train": {"batch_size": 6}})
    assert "train.batch_size: 3 with train.accumulate: 2 (the same steps)" in _less_memory(recipe)
    assert "train.gradient_checkpointing" in _less_memory(recipe)
    least = {"path": "x", "dtype": "bfloat16"}
    recipe = build_recipe({"model": least, "train": {"batch_size": 1, "gradient_checkpointing": True}})
    assert "What helps: a smaller data.max_length (now 512)." in _less_memory(recipe)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_a_limit_of_the_process_counts_as_its_memory(monkeypatch):
    """As `ulimit -d` sets it."""
    import resource

    limits = {resource.RLIMIT_DATA: 7 * 10**8, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert total_memory() == 7 * 10**8
