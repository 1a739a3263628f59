"""The README is executed: its example runs as printed, its commands and targets exist, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def in_shell_blocks(pattern):
    return {m for kind, text in BLOCKS if kind == "bash" for m in re.findall(pattern, text, flags=re.MULTILINE)}


def test_the_example_runs_as_printed(tmp_path):
    (example,) = re.findall(r"<!-- test: example -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "trainable params" in done.stdout
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "my-merged-model" / "model.safetensors").exists()


def test_every_command_of_the_readme_exists():
    pytest.importorskip("cyclopts")
    from dual_lora.lab.cli import COMMANDS

    used = in_shell_blocks(r"^dual-lora ([\w-]+)")
    assert used
    assert used <= {name for name, *_ in COMMANDS}


def test_every_make_target_of_the_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = in_shell_blocks(r"^make (\S+)")
    assert {"demo", "test"} <= used <= targets


def test_every_local_link_of_the_readme_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_its_figures_are_those_of_the_ledger():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import figures, ledger
    finally:
        sys.path.pop(0)
    assert figures.written(README, ledger.read()) == README, "run `python -m benchmarks.figures`"
    other = [{**row, "ratio": row["ratio"] + 1} for row in ledger.read()]
    assert figures.written(README, other) != README
