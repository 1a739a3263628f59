"""docs/tutorials/serving.md from top to bottom: its Python, its commands in one shell, and the verdicts they give."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_server import PYTHON, needs_vllm

from pages import ROOT, blocks

pytestmark = [*needs_vllm[:-1], pytest.mark.timeout(1800)]

PAGE = ROOT / "docs" / "tutorials" / "serving.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "dual-lora").symlink_to(Path(sys.executable).with_name("dual-lora"))
    if shutil.which("vllm", path=str(PYTHON.parent)):
        # The command of a CPU build asks for the version of a package of another name.
        start = f'#!/bin/sh\nshift; exec {PYTHON} -m vllm.entrypoints.openai.api_server --model "$@"\n'
        (programs / "vllm").write_text(start)
        (programs / "vllm").chmod(0o755)
    some = blocks(PAGE)
    for block in some:
        if block.language == "python":
            exec(compile(block.code, str(PAGE), "exec"), {"__name__": "page"})
    script = "set -em\ntrap 'kill %1 2>/dev/null || true' EXIT\n" + "".join(
        b.code for b in some if b.language == "bash"
    )
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=1700)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    verdicts = [
        line.split("verdict")[1].split(":")[0].strip() for line in done.stdout.splitlines() if "verdict " in line
    ]
    assert verdicts[:3] == ["on", "on", "on"], done.stdout
    assert verdicts[3] not in ("on", "rounded"), done.stdout
    assert "capitals is no longer on" in done.stdout
