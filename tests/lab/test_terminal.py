"""Escape codes in a file's fields, a library's log or a model's answer are shown, not obeyed; commands are quoted."""

import io
import json
import logging
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from rich.text import Text

from dual_lora.lab.commands.card import facts_card, figures_table, finish
from dual_lora.lab.errors import UserError
from dual_lora.lab.files import folder
from dual_lora.lab.model.location import locate
from dual_lora.lab.module_command import run_module
from dual_lora.lab.progress import Bar
from dual_lora.lab.terminal import Console, guarded, shown

CODES = [
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\x9b31m",
    "\x1b]52;c;ZWNobw==\x07",
    "\r",
    "\b",
    "\x00",
    "\x7f",
    "\x1bc",
    "\x0b",
]
HOSTILE = "a" + "".join(CODES) + "b"


def obeyed(text):
    """Control characters that a terminal would act upon."""
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def test_what_is_shown():
    assert shown("tab\t, line\n, é, 漢, →") == "tab\t, line\n, é, 漢, →"
    assert shown("\x1b[2J\x9b") == "\\u001b[2J\\u009b"
    assert not obeyed(shown(HOSTILE))
    assert shown("a\u202egpj.exe\u202c \u2066b\u2069") == "a\\u202egpj.exe\\u202c \\u2066b\\u2069"
    assert shown("half a pair: \ud800").encode() == b"half a pair: \\ud800"
    assert shown("שלום \u200fעולם, می\u200cروم") == "שלום \u200fעולם, می\u200cروم"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_letter_that_the_terminal_has_not_ends_no_command(encoding, monkeypatch):
    said = "é − 漢 \U0001f600 \ud800"
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with guarded():
        print(json.dumps({"said": said}, ensure_ascii=False))
        Console().print(said)
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding).splitlines()
    assert json.loads(written[0]) == {"said": said}
    assert len(written) == 2


@pytest.mark.parametrize("colours", [False, True], ids=["file", "terminal"])
def test_every_part_of_a_card(colours):
    screen = Console(
        file=io.StringIO(), force_terminal=colours, color_system="truecolor" if colours else None, width=300
    )
    screen.print(facts_card(HOSTILE, {HOSTILE: HOSTILE, "link": "[link=http://evil]x[/link]"}))
    screen.print(figures_table(HOSTILE, [HOSTILE, "y"], [[HOSTILE, HOSTILE]]))
    screen.print(HOSTILE, Text(HOSTILE, style="bold"))
    text = screen.file.getvalue()
    assert not obeyed(re.sub(r"\x1b\[[\d;]*m", "", text)), (
        text
    )  # but for colours, which are rich's: none is in the codes
    assert "\\u001b]0;title" in text
    assert "[link=http://evil]x[/link]" in text


def test_a_bar_shows_its_name(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=300)
    monkeypatch.setattr("dual_lora.lab.progress.console", screen)
    with Bar(HOSTILE, 2) as bar:
        bar.to(1, HOSTILE)
    assert "\x1b]0" not in screen.file.getvalue()
    assert "\x9b" not in screen.file.getvalue()


def test_whatever_prints(capsys):
    with guarded():
        print(HOSTILE)
        sys.stderr.writelines([HOSTILE])
        handler = logging.StreamHandler()
        handler.emit(logging.LogRecord("x", 40, "", 0, HOSTILE, None, None))
        finish({"name": HOSTILE}, None, True)
    out = capsys.readouterr()
    assert not obeyed(out.out + out.err)
    assert json.loads(out.out.splitlines()[-1]) == {"name": HOSTILE}
    print("\x1b[0m")
    assert capsys.readouterr().out == "\x1b[0m\n", "given back"


def test_commands_with_hostile_files(tmp_path, call, lm_values):
    """Errors name fields, files and values of the file; `recipes show` prints it."""
    recipe = tmp_path / "recipe.yaml"
    hostile = {**lm_values, "about": HOSTILE}
    cases = [
        (hostile, ["recipes", "show", "RECIPE"]),
        (hostile, ["recipes", "show", "RECIPE", "--full"]),
        ({**lm_values, "model": {"path": HOSTILE}}, ["train", "RECIPE", "--out", str(tmp_path / "out")]),
        ({**lm_values, HOSTILE: 1}, ["train", "RECIPE", "--out", str(tmp_path / "out")]),
        ({**lm_values, "method": {"name": HOSTILE}}, ["train", "RECIPE", "--out", str(tmp_path / "out")]),
        ({**lm_values, "data": {"train": HOSTILE}}, ["train", "RECIPE", "--out", str(tmp_path / "out"), "--json"]),
        ({"name": "s", "tasks": [HOSTILE], "methods": [HOSTILE, "lora"]}, ["compare", "RECIPE", "--dry-run"]),
    ]
    for values, arguments in cases:
        for raw in (False, True):  # YAML's own escapes, and the characters themselves where YAML lets them through
            text = yaml.safe_dump(values, allow_unicode=raw)
            recipe.write_text(text.replace("\\x9B", "\x9b") if raw else text)
            _, out, err = call(*(recipe if a == "RECIPE" else a for a in arguments))
            assert not obeyed(out + err), arguments


def test_a_model_s_answer(monkeypatch, call, tmp_path):
    from dual_lora.lab.model import generate, opened

    monkeypatch.setattr(opened, "open_tuned", lambda *_, **__: None)
    monkeypatch.setattr(generate, "generate", lambda *_, **__: iter(HOSTILE))
    (tmp_path / "adapter_config.json").touch()
    assert not obeyed(call("generate", tmp_path, "hello")[1])
    assert json.loads(call("generate", tmp_path, "hello", "--json")[1])["answer"] == HOSTILE


def test_a_line_to_be_typed_is_quoted():
    name = "x; rm -rf ~"
    with pytest.raises(UserError) as caught:
        locate(f"package:{name}")
    line = str(caught.value).partition("`")[2].partition("`")[0]
    assert shlex.split(line) == ["pip", "install", "--no-deps", name]


def test_a_run_s_next_command_is_quoted(call, monkeypatch):
    from dual_lora.lab.recipe import read
    from dual_lora.lab.run import hub_card

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(folder, "run_at", lambda run: run)
    monkeypatch.setattr(read, "read_recipe", lambda run: run)
    monkeypatch.setattr(hub_card, "write_card", lambda run, *_, **__: run)
    [line] = [line for line in call("card", "a $(b)")[1].splitlines() if "push" in line]
    assert shlex.split(line.strip("│ "))[1:4] == ["dual-lora", "push", "a $(b)"]


def test_a_traceback_shows_codes_too():
    """`--debug` had Python print it when the terminal was no longer guarded."""
    command = [sys.executable, "-m", "dual_lora.lab.cli", "report", "no\x1b[31msuch\x07", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert not obeyed(done.stderr)
    assert "no\\u001b[31msuch\\u0007" in done.stderr


@pytest.mark.parametrize("module", ["judge.packed", "judge.metamath", "study.pooled", "study.rejudge"])
def test_a_module_that_is_run_shows_what_a_file_says(module, tmp_path):
    """Each of them is a command as well (`python -m`), outside of `dual-lora` with its guarded terminal."""
    (tmp_path / "results.json").write_text(json.dumps({"study": {"name": HOSTILE}, "methods": [{"metric": HOSTILE}]}))
    (tmp_path / "q.yaml").write_text(json.dumps({HOSTILE: {"asked": ["../x"]}}))
    given = {
        "judge.packed": [tmp_path / HOSTILE.replace("\0", ""), tmp_path],
        "judge.metamath": ["--train", HOSTILE.replace("\0", "")],
        "study.pooled": [tmp_path / "q.yaml"],
        "study.rejudge": [tmp_path / "results.json"],
    }
    command = [sys.executable, "-m", f"dual_lora.lab.{module}", *map(str, given[module])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode
    assert not obeyed(done.stdout + done.stderr)


def test_a_module_s_own_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", HOSTILE])

    def wrong(arguments):
        print(arguments[0])
        raise UserError(arguments[0])

    with pytest.raises(SystemExit) as stop:
        run_module(wrong)
    told = capsys.readouterr()
    assert (stop.value.code, told.err.count("error: "), "Traceback" in told.err) == (1, 1, False)
    assert shown(HOSTILE) in told.out
    assert not obeyed(told.out + told.err)
