"""A merged model as a GGUF file, by llama.cpp's published converter, which is not part of this package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.merge import merge

SCRIPT = "convert_hf_to_gguf.py"
ON_PATH = (SCRIPT, "convert-hf-to-gguf", "llama-convert-hf-to-gguf")
VARIABLE = "DUAL_LORA_GGUF_CONVERTER"


@dataclass
class GgufResult:
    """Where the file lies, its size in bytes, its number of tensors and the converter that wrote it."""

    file: str
    bytes: int
    tensors: int
    converter: str


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    outtype: str = "auto",
    converter: str | None = None,
) -> GgufResult:
    """Merge a run or adapter and convert the result to the GGUF file ``out``.

    outtype: the converter's --outtype (f32, f16, bf16, q8_0, auto). converter: its script, or llama.cpp's folder; left
    out: $DUAL_LORA_GGUF_CONVERTER, then the PATH. Raises UserError where there is none or it fails.
    """
    target = Path(out)
    if target.suffix != ".gguf":
        raise UserError(f"The output is {target}, expected a file name that ends in .gguf.")
    if target.exists():
        raise UserError(f"The file {target} exists already: give another one.")
    command = find_converter(converter)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as part:
        merged = merge(source, Path(part) / target.stem, base=base, dtype=dtype)
        written = Path(part) / target.name
        done = subprocess.run(
            [*command, merged.folder, "--outfile", str(written), "--outtype", outtype],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not written.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise UserError(f"{command[-1]} failed (exit code {done.returncode}): {last}")
        tensors = _tensors(written, command[-1])
        written.replace(target)
    return GgufResult(str(target), target.stat().st_size, tensors, command[-1])


def find_converter(given: str | None = None) -> list[str]:
    """The command that starts llama.cpp's converter. Raises UserError that says where it was sought and how to get it.

    A script that was named runs in this Python, which has what it needs; one on the PATH runs as it was installed.
    """
    for where, path in (("--converter", given), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if path:
            script = Path(path).expanduser()
            script = script / SCRIPT if script.is_dir() else script
            if not script.is_file():
                raise UserError(f"{where} is {path}, but there is no {script}.")
            return [sys.executable, str(script)] if script.suffix == ".py" else [str(script)]
    for name in ON_PATH:
        found = shutil.which(name)
        if found:
            return [found]
    raise UserError(
        f"llama.cpp's converter was not found: no --converter, no ${VARIABLE}, no {SCRIPT} on the PATH. Get it with "
        "`git clone --depth 1 https://github.com/ggml-org/llama.cpp` and give --converter llama.cpp, or write the "
        "merged folder (--to merged) and convert it where llama.cpp is."
    )


def _tensors(file: Path, converter: str) -> int:
    """Number of tensors of a GGUF file, from its header: magic, version, tensors (64 bits, little-endian)."""
    header = file.open("rb").read(16)
    if len(header) < 16 or header[:4] != b"GGUF":
        raise UserError(f"{converter} wrote no GGUF file (its first bytes are {header[:4]!r}).")
    return int.from_bytes(header[8:16], "little")
