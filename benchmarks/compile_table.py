"""Every kernel, compiled with every Triton that a torch brings, for every card: `python -m benchmarks.compile_table`.

No GPU is needed. Each Triton is a folder of its own that is put before the installed one (its wheel alone, without
dependencies; downloaded once into the temporary folder). Writes `compile-table.md`, and fails where a kernel does not
compile, spills in a loop of products, or needs more than the smallest card of its row has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE / "compile-table.md"
VERSIONS = {"3.4.0": "2.8", "3.5.1": "2.9", "3.6.0": "2.10, 2.11", "3.7.1": "2.12, 2.13", "3.9.0": "CPU builds of 2.13"}
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Bytes of shared memory of the smallest card in a row, registers of a thread.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
REGISTERS = 512
# Bytes that a thread may spill outside of loops: 480 are the largest tile's columns that wait for their turn.
SPILL = 512

INTRODUCTION = """# What the GPU kernels need

Written by `make compile-table`; nothing here was run on a card. Each cell: registers of a thread · bytes that a thread
spills · KiB of shared memory. Weights are 4096 × 4096, r1 = r2. On NVIDIA no other kernel spills within a
loop over matrix products; on gfx942 it is not looked at where a kernel spills.

Four cells are bad. The assembler that comes with Triton 3.7.1 gives the kernel of two adapters 32 registers on sm_100,
with a barrier between the adapters as well; with 3.9 it has 178 and spills nothing. Triton 3.4 spills 3.8 kB of the
largest gradient tile on gfx942, and in the loop over tokens on sm_90 where inputs are not aligned; later ones do not.
"""
KNOWN = {
    ("3.7.1", "sm_100", "compose, bf16, rank 16+8"),
    ("3.4.0", "sm_90", "gradient, bfloat16, misaligned, 64 × 64"),
    ("3.4.0", "gfx942", "gradient, bfloat16, 128 × 128"),
    ("3.4.0", "gfx942", "gradient, bfloat16, 128 × 128, deterministic"),
}


def compile_ahead(
    target: str, *wanted: str, version: str | None = None, cache: Path | None = None
) -> list[dict[str, Any]]:
    """What each kernel needs on a target, compiled with the installed Triton or one from `wheel`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton 3.4 brings no linker for AMD. Nothing is run, so that nothing has to be linked.
    environment.setdefault("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
    if version is not None:
        paths = [str(wheel(version)), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = str(cache or folder)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compile_ahead", target, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def wheel(version: str) -> Path:
    """The folder of a Triton, downloaded if it is not there."""
    folder = Path(tempfile.gettempdir()) / f"triton-{version}"
    if not (folder / "triton").is_dir():
        install = ["install", "--quiet", "--no-deps", "--target", str(folder), f"triton=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder


def fault(target: str, kernel: Mapping[str, Any]) -> str | None:
    """What is wrong with a kernel, in words."""
    if "error" in kernel:
        return f"does not compile: {kernel['error']}"
    limits = {"shared": SHARED_MEMORY[target], "registers": REGISTERS, "in_loops": 0, "spill": SPILL}
    over = [
        f"{name} is {kernel[name]}, more than {limit}" for name, limit in limits.items() if kernel.get(name, 0) > limit
    ]
    return "; ".join(over) or None


def name_of(kernel: Mapping[str, Any]) -> str:
    """A kernel in a few words."""
    if kernel["kernel"] == "compose":
        return f"compose, {kernel['base']}, rank {kernel['rank']}" + (", tf32x3" if "products" in kernel else "")
    rows, cols, *_ = kernel["tile"]
    name = f"{kernel['kernel']}, {kernel['inputs'].removeprefix('torch.')}, {rows} × {cols}"
    return name + (", deterministic" if kernel["deterministic"] else "") + (", every form" if "forms" in kernel else "")


def markdown(results: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> str:
    """One table a target; `results` by version and target."""
    parts = [INTRODUCTION]
    for target in TARGETS:
        cells = {v: {name_of(k): _cell(k) for k in results.get((v, target), ())} for v in VERSIONS}
        names = dict.fromkeys(name for version in VERSIONS for name in cells[version])
        head = " | ".join(f"{version} (torch {torch})" for version, torch in VERSIONS.items())
        parts.append(f"\n## {target}\n\n| | {head} |\n|---|{'---|' * len(VERSIONS)}\n")
        for name in names:
            row = [cells[version].get(name, "not compiled") for version in VERSIONS]
            parts.append(f"| {name} | {' | '.join(row)} |\n")
    return "".join(parts)


def _cell(kernel: Mapping[str, Any]) -> str:
    if "error" in kernel:
        return "does not compile"
    return f"{kernel['registers']} · {kernel['spill']} · {kernel['shared'] / 1024:.0f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every kernel compiles and stays within its limits."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_table", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    jobs = parser.parse_args(arguments).jobs
    for version in VERSIONS:
        wheel(version)
    pairs = [(version, target) for version in VERSIONS for target in TARGETS]
    results, faults = {}, 0
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda pair: compile_ahead(pair[1], version=pair[0]), pairs)
        for (version, target), kernels in zip(pairs, found, strict=True):
            results[version, target] = kernels
            wrong = {name_of(k): fault(target, k) for k in kernels if fault(target, k)}
            faults += sum((version, target, name) not in KNOWN for name in wrong)
            lines = [f"{name}: {words}" for name, words in wrong.items()]
            print(f"Triton {version}, {target}: {len(kernels)} kernels", *lines, sep="\n  ✗ ", flush=True)
            TABLE.write_text(markdown(results))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
