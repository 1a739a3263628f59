"""docs/tutorials/serving.md from top to bottom: its Python, its commands in one shell, and the verdicts they give."""

import os
import subprocess

import pytest
from vllm_server import PYTHON, needs_vllm

from pages import ROOT, blocks

pytestmark = [*needs_vllm[:-1], pytest.mark.timeout(1800)]

PAGE = ROOT / "docs" / "tutorials" / "serving.md"


def as_shell(block):
    """A block of the page as a reader would run it."""
    if block.language == "python":
        into = f"cat > {block.marks['file']}" if "file" in block.marks else "python -"
        return f"{into} <<'END'\n{block.code}END\n"
    return "" if "skip" in block.marks else block.code


def test_the_page_runs(tmp_path):
    script = "set -em\ntrap 'kill %1 2>/dev/null || true' EXIT\n" + "".join(map(as_shell, blocks(PAGE)))
    environment = {
        **os.environ,
        "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    verdicts = [
        line.split("verdict")[1].split(":")[0].strip() for line in done.stdout.splitlines() if "verdict " in line
    ]
    assert verdicts[:3] == ["on", "on", "on"], done.stdout
    assert verdicts[3] not in ("on", "rounded"), done.stdout
    assert "capitals is no longer on" in done.stdout
    first, second = (line for line in done.stdout.splitlines() if line.startswith("answer: "))
    assert first == "answer: RIVER"
    assert second not in ("answer: ", first), "another adapter answers"
