"""The memory of a command is limited by the kernel: what would fill the machine ends in one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dual_lora.lab import memory
from dual_lora.lab.files.write import write_atomically, write_folder_atomically

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone keeps such a limit")
GB = 1 << 30


def machine(root: Path, files: dict[str, object]) -> str:
    """A tree with /proc, /sys and /dev of a machine of 16 GiB, with 4 of swap, of which 8 are free."""
    kilobytes = {"MemTotal": 16 << 20, "MemAvailable": 8 << 20, "SwapTotal": 4 << 20}
    told = "".join(f"{name}:  {value} kB\n" for name, value in kilobytes.items())
    for name, text in {"proc/meminfo": told, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return str(root)


@pytest.fixture
def limits(monkeypatch):
    """The soft and the hard limit of this process, in place of the kernel's."""
    import resource

    held = {resource.RLIMIT_DATA: (-1, -1)}
    monkeypatch.setattr(resource, "getrlimit", held.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", held.__setitem__)
    monkeypatch.setattr(memory, "_mapped", {})

    class Limits:
        def give(self, soft, hard=-1):
            held[resource.RLIMIT_DATA] = (soft, hard)

        @property
        def now(self):
            return held[resource.RLIMIT_DATA]

    return Limits()


@pytest.mark.parametrize(
    ("command", "files", "gigabytes"),
    [
        (["train", "x.yaml"], {}, 20),
        (["--debug", "report", "runs"], {}, 8),  # it only reads: what is free
        (["report"], {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: 0 kB\n"}, 2),  # a full machine
        (["train"], {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": 4 * GB}, 4),
        (["train"], {"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/memory.max": 3 * GB}, 3),
        (["train"], {"sys/fs/cgroup/memory.max": "max"}, 20),
        (
            ["train"],
            {
                "proc/self/cgroup": "4:cpu,memory2:/a\n5:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": 5 * GB,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            },
            5,
        ),
        (["train"], {"dev/nvidiactl": ""}, None),  # what the driver maps is not known
        (["report"], {"dev/nvidiactl": ""}, 8),  # and here is not used
        (["train"], {"proc/meminfo": "nothing"}, None),
    ],
)
def test_the_limit_of_a_command(command, files, gigabytes, limits, tmp_path):
    memory.limit_memory(command, machine(tmp_path, files))
    assert limits.now == (-1 if gigabytes is None else int(0.95 * gigabytes * GB), -1)
    limits.give(GB, 2 * GB)  # a person's own
    memory.limit_memory(command, str(tmp_path))
    assert limits.now == (GB, 2 * GB)


def test_weights_that_are_mapped_count_in_addition(limits, tmp_path, monkeypatch):
    """By what they take on the disk: a sparse file is as long as its maker likes."""
    root = machine(tmp_path, {})
    monkeypatch.setattr(memory.most_memory, "__defaults__", (False, root))
    full, sparse = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    full.write_bytes(os.urandom(1 << 20))
    with sparse.open("wb") as file:
        file.truncate(100 * GB)
    memory.allow_mapped([full])
    assert limits.now == (-1, -1)  # a Python program has no limit
    limits.give(10 * GB)
    memory.allow_mapped([full])
    assert limits.now == (10 * GB, -1)  # a person's own is not raised
    own = memory.most_memory()
    limits.give(own, own + (1 << 19))
    memory.allow_mapped([full])
    assert limits.now[0] == own + (1 << 19)  # nor can the hard one be
    limits.give(own)
    for _ in range(2):
        memory.allow_mapped([full, sparse, tmp_path / "missing"])
        assert 1 << 20 <= limits.now[0] - own < 2 << 20


@pytest.mark.parametrize("write", [write_atomically, write_folder_atomically])
def test_a_save_without_memory_leaves_what_was_there(write, tmp_path):
    """A string that is too long for its bytes, and a folder of which one file was written."""

    def fill(folder):
        (folder / "half").write_text("x")
        raise MemoryError

    class Long(str):
        def encode(self, *_):
            raise MemoryError

    target = tmp_path / "result"
    write(target, "an earlier one") if write is write_atomically else write(target, lambda f: (f / "whole").touch())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MemoryError):
        write(target, Long("x") if write is write_atomically else fill)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_fills_the_memory_ends_in_one_sentence(tmp_path):
    """With the real kernel: the command says it, and what it was reading."""
    import resource

    with (tmp_path / "mine.jsonl").open("wb") as file:  # no bytes on the disk, and 4 for each of its letters
        file.truncate(90_000_000)
        file.write("😀".encode())
    done = subprocess.run(
        [sys.executable, "-c", "from dual_lora.lab.entry import main; main()", "check-data", "mine.jsonl"],
        cwd=tmp_path,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # each takes 33 MB when scipy is imported
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, -1)),
    )
    assert done.returncode == 1
    assert "The machine's memory is full (a command may take 314.6 MB of it)" in done.stderr
    assert "mine.jsonl was being read." in done.stderr
    assert "Traceback" not in done.stderr
