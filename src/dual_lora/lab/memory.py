"""A limit on the memory of a command, kept by the kernel: a file that asks for more ends in an error, not in a machine
without memory.

Linux counts what a process may write for itself (RLIMIT_DATA: its heap, and files that it maps to write into a copy, as
PyTorch maps weights). A request beyond the limit fails: Python raises MemoryError, torch and others their own kinds.
Processes that a command starts inherit the limit, each the whole of it.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

SHARE = 0.95  # of what there is: the rest is the system's
LEAST = 2 << 30  # bytes for a command that only reads, however full the machine is
# They read records, results and settings: no weights, and nothing on a device.
READERS = ("card", "check-data", "completion", "judge", "push", "recipes", "report", "schema")
# Where a GPU's driver is. What its closed part maps is not known, so no command that may use it has a limit.
DRIVERS = ("dev/nvidiactl", "dev/kfd", "dev/dxg")

_mapped: dict[str, int] = {}  # files of weights, each with its bytes on the disk


def limit_memory(arguments: Sequence[str], root: str = "/") -> None:
    """Give this process, on Linux, the limit of the command; one of the person's own that is lower stays.

    arguments: the command and its options. root: where /proc, /sys and /dev are.
    """
    if sys.platform != "linux":
        return
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    reads = command in READERS
    if not reads and any(Path(root, driver).exists() for driver in DRIVERS):
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = most_memory(reads, root)
    if wanted > 0 and (soft == resource.RLIM_INFINITY or wanted < soft):
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def allow_mapped(weights: Iterable[Path]) -> None:
    """Raise this program's own limit by files of weights that will be mapped, each once: they fill no memory.

    A file counts with what it takes on the disk: a small one cannot be long.
    """
    if sys.platform != "linux":
        return
    import resource

    for file in weights:
        with contextlib.suppress(OSError):
            _mapped[os.path.realpath(file)] = file.stat().st_blocks * 512
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    own = most_memory()
    if soft == resource.RLIM_INFINITY or soft < own:  # there is none, or it is the person's
        return
    wanted = own + sum(_mapped.values())
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (max(soft, wanted), hard))


def memory_limit() -> int:
    """Bytes that this process may take, of its own limit or of the person's; 0: as many as it likes."""
    if sys.platform != "linux":
        return 0
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return max(0, soft)  # infinity is -1


def process_limits() -> list[int]:
    """Bytes that this process may take by its limits, of what it writes and of all that it maps; empty: no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


def most_memory(reads: bool = False, root: str = "/") -> int:
    """Bytes that a command may take of this machine, or of its container where that has less; 0: not known.

    reads: of a command that only reads, what is free now counts; training may begin before another program ends.
    """
    known = {}
    with contextlib.suppress(OSError, ValueError):
        text = Path(root, "proc/meminfo").read_text()
        known = {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+): *(\d+) kB", text, re.M)}
    if "MemTotal" not in known:
        return 0
    has = known["MemTotal"] + known.get("SwapTotal", 0)
    free = max(known.get("MemAvailable", has), LEAST)
    return int(SHARE * min(free if reads else has, *container_limits(root), has))


def container_limits(root: str = "/") -> list[int]:
    """Bytes that control groups allow this process, its own group and those that it lies in (cgroup v2 and v1)."""
    found, lines = [], []
    with contextlib.suppress(OSError):
        lines = Path(root, "proc/self/cgroup").read_text().splitlines()
    for line in [*lines, "0::/", "1:memory:/"]:  # in a container the path may be the host's: the root is always asked
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds not in ("", "memory"):
            continue
        top = Path(root, "sys/fs/cgroup", kinds)
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):  # "max" is no number
                found.append(int((folder / name).read_text()))
    return found
