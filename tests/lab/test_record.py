"""The record: a peak of its own, the code that ran, and nothing of the folder that it stands in is started."""

import shutil
import subprocess
import sys

import pytest

from dual_lora.lab.run import record
from dual_lora.lab.run.record import peak_memory, reset_peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak of the resident size")
def test_an_earlier_peak_is_forgotten():
    reset_peak()
    large = b"x" * 300_000_000  # written to: memory that is only asked for is none
    high = peak_memory()
    del large
    reset_peak()
    assert peak_memory() < high - 200_000_000


def test_no_program_of_a_stranger_s_repository_is_started(tmp_path, monkeypatch):
    """`git describe --dirty` runs what `core.fsmonitor` names."""
    shutil.which("git") or pytest.skip("git is not installed")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "monitor.sh").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    (tmp_path / "monitor.sh").chmod(0o755)
    subprocess.run(["git", "-C", tmp_path, "config", "core.fsmonitor", f"{tmp_path}/monitor.sh"], check=True)
    monkeypatch.chdir(tmp_path)
    record.surroundings()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_is_read_from_the_package_s_own_checkout(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "PACKAGE", tmp_path / "src" / "dual_lora")
    assert record._commit() is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    commit = "0123456789abcdef" * 2
    if packed:
        (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    else:
        (git / "refs" / "heads" / "main").write_text(f"{commit}\n")
    assert record._commit() == commit[:12]
    (git / "HEAD").write_text(f"{commit[::-1]}\n")
    assert record._commit() == commit[::-1][:12]


def test_the_source_names_the_code():
    assert record.surroundings()["source"] == record._source_hash()
    assert len(record._source_hash()) == 12
