"""The record of a run: what ran, on what, how fast, with what memory."""

import contextlib
import functools
import hashlib
import os
import platform
import sys
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from dual_lora.lab.memory import container_limits, process_limits
from dual_lora.lab.read import lines_of, parse_json, regular

PACKAGE = Path(__file__).parents[2]
PACKAGES = ("dual-lora", "torch", "peft", "transformers", "accelerate", "trl", "datasets", "safetensors", "numpy")


@dataclass
class Record:
    """The content of a run's record.json."""

    method: Any  # PEFT's configuration in plain values, None for full fine-tuning
    seed: int
    classes: list[str]
    processes: int
    rows_at_once: int
    made_of: dict[str, Any]  # "rows" and "weights": digests of the training rows and of the base
    extended: list[int]  # the steps at which it was to end before it was made longer
    origin: dict[str, Any] | None  # who said each setting
    precision: dict[str, Any]
    total_steps: int
    trainable_parameters: int
    all_parameters: int
    examples: int
    left_out: int
    surroundings: dict[str, Any]
    state: str = "running"
    result: dict[str, Any] | None = None
    problems: list[str] | None = None

    def written(self) -> dict[str, Any]:
        """Return the record as written to the file, without empty fields."""
        values = {"state": self.state} | {field.name: getattr(self, field.name) for field in fields(self)}
        left_out = {name for name in ("origin", "result", "problems") if values[name] is None}
        left_out |= set() if self.extended else {"extended"}
        around = values.pop("surroundings")
        last = {name: values.pop(name) for name in ("result", "problems")}
        return {name: value for name, value in (values | around | last).items() if name not in left_out}


def surroundings() -> dict[str, Any]:
    """Versions, machine and commit: what somebody needs to know to repeat the run."""
    import torch

    return {
        "versions": {
            "python": platform.python_version(),
            **{p: v for p in PACKAGES if (v := version_of(p))},
            "torch": str(torch.__version__),  # names the build, CPU's or CUDA's, which the package's metadata may not
        },
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "commit": _commit(),
        "source": _source_hash(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def device_name() -> str:
    """The accelerator's or the processor's name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def reset_peak() -> None:
    """Start measuring the peak anew, so that a process that has run other things does not report theirs."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes since `reset_peak`: the accelerator's peak allocation, or the process's peak resident size on a CPU.

    Only Linux can forget an earlier peak of the resident size; elsewhere it is that of the whole process.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def total_memory() -> int:
    """Bytes of the accelerator's memory, or of the machine's; a container's or a process's limit where that is less.
    0: not known."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([*found, *container_limits(), *process_limits()], default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first one that makes no sense: a kill may have cut it off."""
    lines: list[dict[str, Any]] = []
    try:
        for line in lines_of(regular(path).read_text(encoding="utf-8", errors="replace")) if path.is_file() else []:
            value = parse_json(line)
            if not isinstance(value["step"], int | float):
                break
            lines.append(value)
    except (ValueError, TypeError, KeyError):
        pass
    return lines


def version_of(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this package's checkout, read as files; None where it was installed from a wheel.

    git itself is never started: in a folder that came from somebody else its configuration may run their programs.
    """
    git = PACKAGE.parents[1] / ".git"
    with contextlib.suppress(OSError, ValueError, StopIteration):
        if git.is_file():  # a work tree of its own, outside the repository
            git = (git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head[:12]
        name = head.removeprefix("ref:").strip()
        shared = git / "commondir"
        common = (git / shared.read_text(encoding="utf-8").strip()).resolve() if shared.is_file() else git
        if (common / name).is_file():
            return (common / name).read_text(encoding="utf-8").strip()[:12]
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next(line.split()[0][:12] for line in packed if line.endswith(f" {name}"))
    return None


# What decides a run's scores besides its recipe and its data; a change of a report or of a command does not.
_DECIDING = (
    "core/",
    "method/",
    *(f"lab/{part}" for part in ("data/", "files/", "model/", "recipe/", "run/")),
    *(f"lab/study/{name}.py" for name in ("perform", "interventions", "metrics")),
)


@functools.cache
def code_version() -> str:
    """The version of the code that decides a run's scores: a hash of ours, and the libraries that it trains with."""
    libraries = [f"{name} {(version_of(name) or '?').partition('+')[0]}" for name in ("torch", "transformers", "peft")]
    return ", ".join([_source_hash(_DECIDING), *libraries])


@functools.cache
def _source_hash(parts: tuple[str, ...] = ("",)) -> str:
    """A hash of this package's Python files: two runs with the same one ran the same code."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        if name.startswith(parts):
            found.update(name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:12]
