"""Help pages in panels, what is folded away, and the shells' completion."""

import re
import subprocess
from importlib import import_module

import pytest
from cyclopts import App

from dual_lora.lab.cli import COMMANDS, build_app
from dual_lora.lab.commands.parameters import COMMON
from dual_lora.lab.recipe.schema import Recipe


def test_the_usual_options_come_first_and_the_rest_is_folded(call):
    code, out, _ = call("train", "--help")
    assert code == 0
    assert len(out.splitlines()) <= 110
    panels = [line.split()[1] for line in out.splitlines() if line.startswith("╭─")]
    assert panels == ["Parameters", "Model", "Data", "Training"]
    assert "--help-all" in out
    assert "--train.loraplus-ratio" not in out


def test_every_field_of_a_recipe_is_on_the_whole_page(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    code, out, _ = call("train", "--help-all")
    assert code == 0
    page = "".join(out.replace("│", "").split())
    for part, field in Recipe.model_fields.items():
        inner = getattr(field.annotation, "model_fields", {})
        for name in inner:
            assert f"--{part}.{name.replace('_', '-')}" in page
    assert "Training: more" in out
    assert "Training: more" not in call("train", "--help")[1]


def documented():
    """Every command's words, and the text of its help."""
    yield [], build_app().help
    for name, target, _ in COMMANDS:
        module, _, function = target.partition(":")
        found = getattr(import_module(module), function)
        yield [name], found.help if isinstance(found, App) else found.__doc__
        if isinstance(found, App):
            yield from (([name, part], found[part].default_command.__doc__) for part in found if part[0] != "-")


@pytest.mark.parametrize(("words", "text"), [pytest.param(*each, id=" ".join(each[0])) for each in documented()])
def test_an_example_is_one_line(words, text, call, monkeypatch):
    """A command that is copied from two lines does not run."""
    examples = re.findall("`((?:dual-lora|accelerate|cat) [^`]+)`", text)
    assert examples
    monkeypatch.setenv("COLUMNS", "77")
    lines = call(*words, "--help")[1].splitlines()
    assert [example for example in examples if not any(example in line for line in lines)] == []


def test_the_usual_options_are_fields():
    for path in COMMON:
        part, _, name = path.partition(".")
        field = Recipe.model_fields[part]
        assert not name or name in field.annotation.model_fields


def test_folded_options_are_taken_all_the_same(call, tmp_path):
    code, _, err = call("train", "--model.path", "x", "--train.loraplus-ratio", "-1", "--out", tmp_path / "o")
    assert code == 1
    assert "train.loraplus_ratio is -1" in err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell, call):
    code, out, err = call("completion", shell)
    assert code == 0, err
    for word in ("check-data", "gradient-checkpointing", "predict"):
        assert word in out


def test_the_script_is_one(call, tmp_path):
    (tmp_path / "script").write_text(call("completion", "bash")[1])
    done = subprocess.run(["bash", "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


COMPLETE = """
. "$1"
for cur in run '"run' ~/run ./~; do
  COMP_WORDS=(dual-lora report "$cur") COMP_CWORD=2
  _dual_lora
  for reply in "${COMPREPLY[@]}"; do
    eval "printf '%s\\n' $reply"
    [[ $cur == '"'* ]] && eval "true \"$reply\""
  done
done
"""


@pytest.mark.parametrize("install", [False, True])
def test_bash_runs_nothing_of_a_name_that_it_completes(install, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "script").write_text(call("completion", "bash", *["--install"] * install)[1])
    script = next((tmp_path / ".local").rglob("dual-lora")) if install else tmp_path / "script"
    names = ["run", "run$(touch ran)", "run`touch ran`", "run;touch ran;", "run a blank", "run'", "./~$(touch ran)"]
    for name in [*names, "run\n$(touch ran)", "run\x1b$(touch ran)", "run\udcff$(touch ran)"]:
        (tmp_path / "here" / name).mkdir(parents=True)
    (tmp_path / "run at home").mkdir()
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE, "-", str(script)],
        cwd=tmp_path / "here", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert {*names, str(tmp_path / "run at home")} <= {*done.stdout.splitlines()}
    assert not list(tmp_path.rglob("ran"))


def test_it_is_installed_where_the_shell_looks(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = call("completion", "bash", "--install", "--json")
    assert code == 0, err
    assert list(tmp_path.rglob("*dual-lora*"))
    assert ".bashrc" in {path.name for path in tmp_path.iterdir()}


def test_help_parses_no_source(call, monkeypatch):
    """cyclopts does, for docstrings of fields: a third of the time of `train --help`."""
    from docstring_parser import attrdoc, parser

    def never(component):
        raise AssertionError(f"the source of {component} was read")

    monkeypatch.setattr(attrdoc.inspect, "getsource", never)
    former = parser.add_attribute_docstrings
    assert call("train", "--help")[0] == 0
    assert parser.add_attribute_docstrings is former, "other programs in the process keep it"
