"""The README and every page of the documentation: each block of code runs or is parsed, each link leads somewhere."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from forked import forking
from pages import PAGES, ROOT, blocks, commands, differs, name_of, only_looks

pytest.importorskip("cyclopts")
KNOWN = {"hidden", "skip", "needs", "from", "file", "run", "recipe", "study", "output"}
KEYWORDS = {"for", "done", "until", "kill"}
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
WHOLE = os.environ.get("WHOLE_TUTORIAL") == "1"
SCREEN = {"COLUMNS": "100"}
RUNS = [page for page in PAGES if any("run" in block.marks for block in blocks(page))]


def with_blocks(*languages, pages=PAGES, outputs=False):
    """Each page that has blocks in these languages, with them. outputs: with what they print, too."""
    found = [(page, [*_chosen(blocks(page), languages, outputs)]) for page in pages]
    return [pytest.param(page, those, id=name_of(page)) for page, those in found if those]


def _chosen(some, languages, outputs):
    before = ""  # the language of what printed an output
    for block in some:
        if "output" not in block.marks:
            before = block.language
        if block.language in languages or (outputs and "output" in block.marks and before in languages):
            yield block


def execute(page, some, names):
    """Run a page's Python, and the commands that are marked so, in the working folder; compare what they print."""
    printed = ""
    for block in some:
        where = f"{name_of(page)}:{block.line}"
        if "skip" in block.marks or "from" in block.marks:
            continue
        if "needs" in block.marks:
            pytest.importorskip(block.marks["needs"])
        if "output" in block.marks:
            if "whole" not in block.marks["output"] or WHOLE:
                missing = differs(block.code, printed, exact="exact" in block.marks["output"])
                assert not missing, f"{where}: {missing!r} is not in what was printed, or not in this order:\n{printed}"
        elif "file" in block.marks:
            Path(block.marks["file"]).write_text(block.code)
        elif block.language in ("python", "hidden"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
            printed = printed if block.language == "hidden" else out.getvalue()
        elif "run" in block.marks:
            printed = ""
            for line in commands(block.code):
                program, *arguments = shlex.split(line, comments=True)
                assert program == "dual-lora", where
                command = [sys.executable, "-m", "dual_lora.lab.cli", *arguments]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **SCREEN}
                )
                assert done.returncode == 0, f"{where}: {line}\n{done.stdout}"
                printed += done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "some"), with_blocks("python", "hidden", pages=[page for page in PAGES if page not in RUNS], outputs=True)
)
def test_python_runs_as_printed(page, some, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(page, some, {"__name__": "page", "ROOT": str(ROOT)})


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUNS, ids=name_of)
def test_a_tutorial_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    """With the real model, as a reader does it (`make tutorial`); else three steps and four test records, no score."""
    for package in re.findall(r"package:([\w-]+)", TEXT[page]):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            pytest.skip(f"{package} comes by `make models`")
    monkeypatch.chdir(tmp_path)
    some = blocks(page)
    if not WHOLE:
        shorter = {"days[240:272]": "days[240:244]", "--train.learning-rate": "--train.steps 3 --train.learning-rate"}
        some = [block for block in some if block.language != "hidden"]
        for old, new in shorter.items():
            assert any(old in block.code for block in some), old
            some = [replace(block, code=block.code.replace(old, new)) for block in some]
    execute(page, some, {"__name__": "page", "ROOT": str(ROOT)})


@pytest.mark.parametrize(
    ("shown", "printed", "exact", "missing"),
    [
        ("│ steps  30 in 4 min 2 s, 61 tokens/s │", "╭──╮\n│ steps      3 in 950 ms, 7 tokens/s │", False, ""),
        ("memory 2.2 GB", "memory  812 MB at the peak", False, ""),
        ("loss …\nsaving … weights", "loss 0.1\n\nmore\nsaving dates: weights", False, ""),
        ("loss 0.1", "loss 0.2", False, ""),
        ("loss 0.1", "loss 0.2", True, "loss 0.1"),
        ("saved", "loss 0.2", False, "saved"),
        ("second\nfirst", "first\nsecond", False, "first"),
        ("verdict on", "verdict off", False, "verdict on"),
    ],
)
def test_an_output_may_differ_in_numbers_alone(shown, printed, exact, missing):
    assert differs(shown, printed, exact) == missing


@pytest.mark.parametrize(("page", "some"), with_blocks("python", "hidden"))
def test_python_is_python(page, some):
    for block in some:
        compile("\n" * (block.line - 1) + block.code, str(page), "exec")


@pytest.mark.parametrize(("page", "some"), with_blocks("python"))
def test_an_excerpt_is_in_its_file(page, some):
    for block in some:
        if "from" in block.marks:
            lines = iter(plain(line) for line in (ROOT / block.marks["from"]).read_text().splitlines())
            for line in map(plain, block.code.splitlines()):
                where = f"{name_of(page)}:{block.line}: {line!r} is not in {block.marks['from']}, or not in this order"
                assert line in ("", "...") or line in lines, where


def plain(line):
    return line.partition("  #")[0].strip().rstrip(",").replace("(...)", "(")


@pytest.mark.parametrize(("page", "some"), with_blocks("bash", "console"))
def test_shell_commands_exist_and_take_these_arguments(page, some):
    if name_of(page) == "docs/reference/cli.md":
        return  # usage lines, made from the commands themselves
    written = {block.marks["file"] for block in blocks(page) if "file" in block.marks}
    for block in some:
        if "skip" in block.marks:
            continue
        assert subprocess.run(["bash", "-n"], input=block.code, text=True).returncode == 0
        for line in commands(block.code):
            check_command(line, f"{name_of(page)}:{block.line}: {line}", written)


def looking():
    pages = [page for page in PAGES if name_of(page) != "docs/reference/cli.md"]
    lines = [(page, line) for page in pages for b in blocks(page) if b.language == "bash" for line in commands(b.code)]
    for page, line in dict.fromkeys(lines):
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "dual-lora" and only_looks(words):
            # Many seconds of simulated steps, which test_estimate_command and test_paper have with smaller models.
            simulates = words[0] == "estimate" or "--on" in words or words[:2] == ["recipes", "check"]
            long = [pytest.mark.long] if simulates else []
            yield pytest.param(words, id=f"{name_of(page)}: {' '.join(words)}", marks=long)


@pytest.fixture(scope="module")
def command_line():
    with forking("from dual_lora.lab.cli import main\nimport peft, transformers") as run:
        yield run


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("words", looking())
def test_a_command_that_only_looks_ends_well(words, command_line, tmp_path):
    from dual_lora.lab.data.records import data_folder

    data = data_folder().resolve()
    status, said = command_line(
        "import os\nfrom dual_lora.lab.cli import main\n"
        f"os.environ['DUAL_LORA_DATA'] = {str(data)!r}\nos.chdir({str(tmp_path)!r})\nmain({words!r})"
    )
    if "DUAL_LORA_DATA" in said and not data.is_dir():
        pytest.skip(f"the data folder {data} is not there (DUAL_LORA_DATA)")
    assert (status, bool(said.strip())) == (0, True), said
    assert not list(tmp_path.iterdir()), "it left something behind"


def check_command(line, where, written=()):
    """written: files that the page itself has its reader write."""
    line = re.sub(r"\$\(\([^)]*\)\)|\$\{?\w+\}?", "1", line)
    words = shlex.split(line.replace("; do", ""), comments=True)
    while words and (words[0] == "do" or re.fullmatch(r"\w+=\S*", words[0])):
        words = words[1:]
    if not words or words[0] in KEYWORDS or line.startswith("head="):
        return
    if "dual_lora.lab.cli" in words:  # accelerate, torchrun, srun
        words = ["dual-lora", *words[words.index("dual_lora.lab.cli") + 1 :]]
    program = words[0].rpartition("/")[2]
    if program == "dual-lora":
        parse(words[1:], where)
    elif program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        assert set(words[1:]) <= targets, where
    elif program == "pip":
        import tomllib

        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"(?:dual-lora|\.)\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(known), where
    elif program == "python":
        sys.path.insert(0, str(ROOT))
        try:
            there = (
                importlib.util.find_spec(words[2])
                if words[1] == "-m"
                else words[1] in written or (ROOT / words[1]).is_file()
            )
        finally:
            sys.path.pop(0)
        assert there, where
    else:
        assert program in {"axolotl", "cat", "cd", "curl", "export", "git", "pytest", "vllm"}, where


def parse(words, where):
    """By the command's own parser, which knows every flag and the kind of its value."""
    from cyclopts import CycloptsError

    from dual_lora.lab.cli import COMMANDS, _split_allowed_modules, build_app

    words, _ = _split_allowed_modules(words)
    assert words[0] in {name for name, *_ in COMMANDS}, where
    words = words[: min((words.index(sign) for sign in (">", "|", "||") if sign in words), default=len(words))]
    try:
        build_app(words[0]).parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise AssertionError(f"{where}\n{error}") from None


@pytest.mark.parametrize(
    "line",
    [
        "dual-lora trian boolq-smollm2",
        "dual-lora train boolq-smollm2 --train.stepz 3",
        "dual-lora train boolq-smollm2 --train.steps many",
        "accelerate launch -m dual_lora.lab.cli train RECIPE --no-such-flag 1",
        "make no-such-target",
        "pip install '.[friends]'",
        "python -m benchmarks.no_such_module",
        "python examples/no_such_file.py",
        "unknown-program x",
    ],
)
def test_a_wrong_command_is_found(line):
    with pytest.raises(AssertionError):
        check_command(line, line)


@pytest.mark.parametrize(("page", "some"), with_blocks("yaml"))
def test_yaml_has_the_fields_that_exist(page, some, tmp_path):
    from dual_lora.lab.model.methods import method_config
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.study.read import read_study

    for block in some:
        if "skip" in block.marks:
            continue
        values = yaml.safe_load(block.code)
        if "study" in block.marks or "methods" in values:
            (tmp_path / "study.yaml").write_text(block.code)
            assert read_study(tmp_path / "study.yaml")
        else:
            recipe = build_recipe(values)
            method_config(recipe.method, recipe.model.head, steps=100, fresh=[])  # raises for a field that it has not


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_left_out_says_why(page):
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert set(block.marks) <= KNOWN, f"{where}: a mark has another word than {sorted(KNOWN)}"
        assert len(block.marks.get("skip", "long enough")) > 10, where
        assert block.language != "", f"{where}: the block has no language"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md", *sorted((ROOT / "results").rglob("*.md"))], ids=name_of)
def test_every_row_is_in_a_table(page):
    """An empty line ends a table: what follows is shown as text."""
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    assert not [token.content for token in tokens if token.type == "inline" and token.content.startswith("|")]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md", *sorted((ROOT / "results").rglob("*.md"))], ids=name_of)
def test_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        target = page if not path else (page.parent / path)
        if target.suffix == ".md" and not target.exists() and target.with_suffix(".ipynb").exists():
            continue  # the site shows a notebook as a page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name_of(page)}: {link}"


def anchors(text):
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def test_the_readme_names_the_two_commands():
    used = {
        m for b in blocks(ROOT / "README.md") if b.language == "bash" for m in re.findall(r"(?m)^make (\S+)", b.code)
    }
    assert {"demo", "test"} <= used


def test_the_figures_are_those_of_the_ledger():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import figures, ledger
    finally:
        sys.path.pop(0)
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.written(page, ledger.read()) == page, "run `python -m benchmarks.figures`"
    other = [{**row, "ratio": row["ratio"] + 1} for row in ledger.read()]
    assert figures.written(page, other) != page


def test_generated_pages_are_current():
    import reference

    for name, text in reference.pages().items():
        assert (reference.REFERENCE / name).read_text(encoding="utf-8") == text, "run `python -m scripts.reference`"


def test_drawn_pictures_are_current():
    import pictures

    assert (pictures.PICTURES / "matrices.svg").read_text(encoding="utf-8") == pictures.matrices(), (
        "run `make pictures`"
    )
    results = json.loads(pictures.POOLED.read_text(encoding="utf-8"))
    drawn = pictures.forest(results)
    assert (pictures.PICTURES / "forest.svg").read_text(encoding="utf-8") == drawn, "run `make pictures`"
    results["questions"][0]["low"] -= 0.01
    assert pictures.forest(results) != drawn


def test_charts_are_current():
    import charts
    import pictures

    made = {"rates.svg": charts.rates(), **charts.calibration()}
    assert len(made) == 9
    for name, text in made.items():
        drawn = (pictures.PICTURES / name).read_text(encoding="utf-8")
        assert drawn == text, f"run `python -m scripts.pictures rates calibration`: {name}"
    assert ">9 of 48<" in made["rates.svg"], "LoRA at 1e-3 on CoLA"
    with pytest.raises(ValueError, match="the search gave lora the rate"):
        charts._scores("confirm-cola", "lora", 3e-4)


def test_the_chart_of_rates_has_every_searched_study_of_lora_on_cola():
    import charts

    searched = set()
    for file in (ROOT / "results" / "studies").glob("*/results.json"):
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["study"]["overrides"].get("train", {}).get("steps") == 600:  # methods-cola ends before LoRA learns
            searched |= {
                (file.parent.name, f"{method['settings']['train.learning_rate']:g}")
                for method in results["methods"]
                if method["task"] == "cola" and method["method"] == "lora" and method["settings"]
            }
    drawn = {(study, rate) for study, method, _, rate in charts.COLA if method == "lora"}
    assert ("sampled-gradient-cola", "0.001") in searched
    assert searched <= drawn, (
        "add the new study to COLA in scripts/charts.py, and to the pages that count its failed runs"
    )


def test_the_log_has_its_months():
    index = (ROOT / "LOG.md").read_text(encoding="utf-8")
    months = sorted((ROOT / "results" / "log").glob("*.md"))
    assert months
    for month in months:
        assert re.fullmatch(r"20\d\d-\d\d", month.stem)
        assert f"(results/log/{month.name})" in index
        dated = re.findall(r"^## (\S+)", month.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert {date[:7] for date in dated} == {month.stem}
        assert dated == sorted(dated, reverse=True), "newest first"


def test_badges_are_current():
    import pictures

    for name, text in pictures.badges().items():
        assert (pictures.PICTURES / name).read_text(encoding="utf-8") == text, "run `make pictures`"
    assert "3.11 – 3.14" in pictures.badges()["badge-python.svg"]


def test_pictures_load_nothing_and_name_no_machine():
    for picture in (ROOT / "docs" / "pictures").glob("*.svg"):
        text = picture.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        for word in ("http", "<script", "/tmp/", "/home/", "/bin/"):
            assert word not in text, f"{picture.name}: {word}"


def test_a_recording_loses_its_paths_and_keeps_its_columns():
    from recording import without_paths

    drawn = '<text x="8">│ merged  /tmp/x/out │</text><text x="9">/tmp/</text>'
    assert without_paths(drawn, "/tmp/x/") == '<text x="8">│ merged  out │       </text><text x="9">/tmp/</text>'


@pytest.mark.parametrize("kind", ["recipe", "study"])
def test_editors_accept_what_is_shipped_and_nothing_else(kind):
    from dual_lora.lab.commands.recipes import json_schema
    from dual_lora.lab.recipe.read import FAMILIES, shipped_recipes
    from dual_lora.lab.study.read import shipped_studies

    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(json_schema(kind))
    files = shipped_studies().values() if kind == "study" else shipped_recipes().values()
    files = {file for file in files if file.parent.name != FAMILIES}
    assert files
    for file in files:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert not list(check.iter_errors(values)), file.name
        assert list(check.iter_errors({**values, "nmae": "a typing mistake"}))


@pytest.mark.slow
def test_the_site_is_built_without_a_network(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    # A hosted runner's variable: pages of notebooks then lead to hosted ones.
    env = {**os.environ, "GITHUB_REPOSITORY": "owner/name"}
    env |= {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}  # nobody answers there
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "explanation" / "method.html").read_text().count("<math") >= 2
    home = (tmp_path / "site" / "index.html").read_text()
    assert 'href="https://github.com/owner/name"' in home
    assert 'href="how-to/studies.html"' in home, "a page that was opened from disk finds the next one"
    assert "95\u00a0% interval" in home, "no line breaks before %"
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()
    settings = (tmp_path / "site" / "how-to" / "settings.html").read_text()
    assert [settings.count(f'<label for="__tabbed_1_{n}">') for n in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert "<!-- tabs -->" not in settings
    assert '<span class="together">--help-all</span>' in (tmp_path / "site" / "reference" / "cli.html").read_text()
    api = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert "<li><code>rank</code>: " in api, "parameters are a list"
    assert "<strong>Raises</strong> ValueError" in api
    assert "doctest" not in api
    assert 'class="admonition note"' in (tmp_path / "site" / "install.html").read_text()
    evidence = (tmp_path / "site" / "explanation" / "evidence.html").read_text()
    assert 'href="../results/pages/settings.html#the-default-start"' in evidence
    own = (tmp_path / "site" / "results" / "pages" / "questions.html").read_text()
    for link in ("../../reference/training.html#the-papers-start", "update-and-cost.html#what-it-costs"):
        assert f'href="{link}"' in own
    for name in ("quickstart", "results"):
        notebook = f"https://colab.research.google.com/github/owner/name/blob/main/docs/tutorials/{name}.ipynb"
        assert f'href="{notebook}"' in (tmp_path / "site" / "tutorials" / f"{name}.html").read_text()


@pytest.mark.parametrize("name", ["quickstart", "results"])
def test_a_notebook_shows_what_its_cells_give(name):
    import notebooks

    (file,) = [file for file in notebooks.NOTEBOOKS if file.stem == name]
    book = json.loads(file.read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"]), "what its format demands"
    assert sum(bool(cell.get("outputs")) for cell in book["cells"]) >= 6
    assert notebooks.executed(book) == book, "run `python -m scripts.notebooks`"


def said_by_the_code():
    """Every text in the source, what an f-string computes as `…`."""
    import ast

    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_messages_that_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    quoted = [message for row in rows for message in re.findall(r"`([^`]+ [^`]+)`", row)]
    assert len(quoted) > 20
    said = "\n".join(said_by_the_code())
    foreign = {  # PEFT's, Python's and torch's own
        "KeyError: 'DUAL_LORA'",
        "No module named 'peft.utils…'",
        "size mismatch for …dual_lora_A…",
        "optimizer got an empty parameter list",
        "does not require grad",
    }
    assert [message for message in quoted if message not in said and message not in foreign] == []
