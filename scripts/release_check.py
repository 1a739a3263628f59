"""Is what would be released good? `make release-check`; `--help` has more.

Builds wheel and sdist, has twine read them, and installs the wheel with its dependencies in an empty environment
for each Python: there the package is imported, trains for a step and merges, and the command line prints its help.
The sdist builds the same wheel. Needs a package registry; nothing but the standard library, build and twine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

SMOKE = """
import torch
from peft import PeftModel, get_peft_model
from dual_lora import DualLoraConfig, __version__
import dual_lora, importlib.metadata, pathlib

assert __version__ == importlib.metadata.version("dual-lora"), __version__
assert (pathlib.Path(dual_lora.__file__).parent / "py.typed").is_file()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
model = get_peft_model(net, DualLoraConfig(r=4, target_modules=["0"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(16, 8)
for _ in range(3):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
expected = model.eval()(x)
merged = model.merge_and_unload()
assert torch.allclose(merged(x), expected, atol=1e-6)
print(__version__, "trains and merges")
"""


def run(*command: str | Path, **more: object) -> str:
    """Its output; what it printed and a SystemExit where it fails."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_TARGET", "HF_"))}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=clean, **more)  # type: ignore[call-overload]
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def build(dist: Path) -> None:
    """Wheel and sdist, from a copy, so that nothing is left in the source folder; the sdist builds the same wheel."""
    with tempfile.TemporaryDirectory() as space:
        source = Path(space) / "source"
        left_out = shutil.ignore_patterns(
            ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", "site", "runs"
        )
        shutil.copytree(ROOT, source, ignore=left_out)
        run(sys.executable, "-m", "build", "--outdir", dist, cwd=source)
        run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
        again = Path(space) / "again"
        run(sys.executable, "-m", "build", "--wheel", "--outdir", again, next(dist.glob("*.tar.gz")))
        before, after = (sorted(zipfile.ZipFile(next(d.glob("*.whl"))).namelist()) for d in (dist, again))
        if before != after:
            raise SystemExit(f"The sdist builds another wheel: {set(before) ^ set(after)}")


def starts(python: str) -> bool:
    """Whether that Python is here and starts: a version manager may have its name alone."""
    if shutil.which(python) is None:
        return False
    return subprocess.run([python, "--version"], capture_output=True).returncode == 0


def tried(wheel: Path, python: str) -> str:
    """What a fresh environment of that Python says: the method alone first, then the laboratory."""
    with tempfile.TemporaryDirectory() as space:
        run(python, "-m", "venv", space)
        inside = Path(space) / ("Scripts" if os.name == "nt" else "bin") / "python"
        run(inside, "-m", "pip", "install", "--quiet", wheel)
        said = run(inside, "-c", SMOKE, cwd=space)
        run(inside, "-m", "pip", "install", "--quiet", f"{wheel}[lab]")
        run(inside.with_name("dual-lora"), "recipes", "list", cwd=space)
        return f"{run(inside, '--version').strip()}: {said.strip()}"


def main() -> int:
    """Check and report; returns 0."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--dist", type=Path, help="a folder of built files; left out: they are built")
    arguments.add_argument("--python", action="append", help=f"left out: those of {', '.join(PYTHONS)} that are here")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as space:
        dist = given.dist or Path(space) / "dist"
        if given.dist is None:
            build(dist)
        wheel = next(dist.resolve().glob("*.whl"))
        print(*sorted(file.name for file in dist.iterdir()), sep="\n")
        for python in given.python or PYTHONS:
            if not starts(python):
                print(f"{python}: not here")
            else:
                print(tried(wheel, python), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
