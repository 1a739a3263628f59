"""The append-only ledger: one JSON object a line, one line a ratio."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .measure import Measured

PATH = Path(__file__).parent / "ledger.jsonl"


def provenance() -> dict[str, Any]:
    """What a figure depends on besides the code measured."""
    from dual_lora.core.product import onednn_is_faster
    from dual_lora.lab.model.precision import fast_precision

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: _version(name) for name in ("torch", "peft", "transformers", "bitsandbytes")},
        "python": platform.python_version(),
        "device": _processor(),
        "fp32_products": "oneDNN" if onednn_is_faster() else "torch.mm",  # ours; the other methods' are torch.mm's
        "bf16_units": fast_precision("cpu").precision == "bf16",  # measured: a product is faster in it
    }


def row(
    source: dict[str, Any], kind: str, work: str, shape: dict[str, Any], measured: Measured, subject: str, against: str
) -> dict[str, Any]:
    """One ledger row: `subject` over `against` in one measurement."""
    ratio = measured.ratio(subject, against)
    return {
        **source,
        "kind": kind,
        "work": work,
        "shape": shape,
        "threads": measured.threads,
        "subject": subject,
        "against": against,
        "unit": measured.unit,
        "median": measured.median(subject),
        "spread": round(measured.spread(subject), 4),
        "median_against": measured.median(against),
        "ratio": round(ratio.median, 4),
        "interval": [round(ratio.low, 4), round(ratio.high, 4)],
        "rounds": ratio.rounds,
        "share_of_cores": round(measured.share, 3),
    }


def append(rows: list[dict[str, Any]], path: Path = PATH) -> None:
    """Add rows at the end; nothing is ever rewritten."""
    with path.open("a", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows)


def read(path: Path = PATH) -> Iterator[dict[str, Any]]:
    """All rows, oldest first; a broken line is named."""
    with path.open(encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not a JSON object: {error}.") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit's hash, with + where the measured files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "src/dual_lora/core", "src/dual_lora/method"],
                                 capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = said["model name"]
        if not any(figure.isdigit() for figure in name):  # virtual machines: the maker's name alone
            name += f" (family {said['cpu family']}, model {said['model']})"
    except (OSError, KeyError):
        name = platform.processor() or platform.machine()
    held = f", oneDNN held to {isa}" if (isa := os.environ.get("ONEDNN_MAX_CPU_ISA")) else ""
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}{held}"
