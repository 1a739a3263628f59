"""The wheel installs alone in an empty environment, imports there without torch, and says what its command needs."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy, so that nothing is left in the source folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*pip, str(source)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def empty(wheel, tmp_path_factory):
    """An environment that holds the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder)
    pip = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return folder / ("Scripts" if os.name == "nt" else "bin")


def run(*command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, cwd="/")


def test_the_version_stands_in_one_place(wheel):
    import dual_lora

    version = dual_lora.__version__
    assert wheel.name == f"dual_lora-{version}-py3-none-any.whl"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    about = zipfile.ZipFile(wheel).read(f"dual_lora-{version}.dist-info/METADATA").decode()
    assert "Classifier: Typing :: Typed" in about


def test_it_imports_where_nothing_else_is(empty):
    code = "import sys, dual_lora; print(dual_lora.__version__, 'torch' in sys.modules, dual_lora.__file__)"
    done = run(empty / "python", "-c", code)
    assert done.returncode == 0, done.stderr
    version, torch, file = done.stdout.split()
    assert version
    assert torch == "False"
    assert str(ROOT) not in file  # the installed package, not the source folder


def test_a_name_that_needs_torch_says_so(empty):
    done = run(empty / "python", "-c", "from dual_lora import DualLoraConfig")
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_the_command_says_what_to_install(empty):
    done = run(empty / "dual-lora", "--help")
    assert done.returncode == 1
    assert "[lab]" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_carries_what_the_laboratory_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    data = [f for f in source.rglob("*") if f.suffix in {".yaml", ".css", ".js", ".typed", ".jsonl", ".json"}]
    assert data
    missing = {f.relative_to(source).as_posix() for f in data} - names
    assert not missing
    modules = {f.relative_to(source).as_posix() for f in source.rglob("*.py")}
    assert not modules - names
