"""docs/tutorials/serving.md from top to bottom: its Python, its commands in one shell, and what they print."""

import os
import subprocess
from itertools import pairwise

import pytest
from vllm_server import PYTHON, needs_vllm

from pages import ROOT, blocks, differs

PAGE = ROOT / "docs" / "tutorials" / "serving.md"


MARK = "=== line of the page: "


def as_shell(block):
    """A block of the page as a reader would run it, after a line that says which it is."""
    return f"echo; echo '{MARK}{block.line}'\n{code_of(block)}"


def code_of(block):
    if "output" in block.marks:
        return ""
    if block.language == "python":
        into = f"cat > {block.marks['file']}" if "file" in block.marks else "python -"
        return f"{into} <<'END'\n{block.code}END\n"
    return "" if "skip" in block.marks else block.code


@pytest.mark.long
@needs_vllm[1]
@pytest.mark.timeout(1800)
def test_the_page_runs(tmp_path):
    page = blocks(PAGE)
    script = "set -em\ntrap 'kill %1 2>/dev/null || true' EXIT\n" + "".join(map(as_shell, page))
    environment = {
        **os.environ,
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    done = subprocess.run(
        ["bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    check_outputs(page, done.stdout)


def check_outputs(page, said):
    """Each output of the page is in what was printed from the block above it to the block itself."""
    parts = dict(part.split("\n", 1) for part in said.split(MARK)[1:])
    checked = 0
    for before, block in pairwise(page):
        if "output" in block.marks:
            printed = parts[str(before.line)]
            missing = differs(block.code, printed, exact="exact" in block.marks["output"])
            assert not missing, f"line {block.line}: {missing!r} is not in\n{printed[-3000:]}"
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("other", ["on: it gives", "answer: RIVER"])
def test_another_output_is_found(other):
    page = blocks(PAGE)
    said = "".join(
        f"{MARK}{before.line}\n{block.code if 'output' in block.marks else ''}" for before, block in pairwise(page)
    )
    check_outputs(page, said)
    with pytest.raises(AssertionError, match="is not in"):
        check_outputs(page, said.replace(other, "something else"))
