"""A stranger's pattern is tried in a process that nobody has to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dual_lora import _trial as trial

FOR_EVER = "import json, os, sys\nopen(json.load(sys.stdin), 'w').write(f'{os.getpid()}\\n')\nwhile True: pass"


def test_what_it_prints_comes_back():
    assert trial.tried("import json, sys\nprint(len(json.load(sys.stdin)))", "für", 30.0).stdout == "3\n"


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="Windows has no alarm")
def test_it_ends_though_who_waited_was_killed(tmp_path):
    """It computed for ever, for nobody."""
    file = tmp_path / "pid"
    waits = f"{Path(trial.__file__).read_text()}\nLONGER = 0\ntried({FOR_EVER!r}, {str(file)!r}, 3.0)"
    waiting = subprocess.Popen([sys.executable, "-c", waits])
    ends = time.monotonic() + 120
    while not (file.exists() and file.read_text().endswith("\n")) and time.monotonic() < ends:
        time.sleep(0.02)
    waiting.kill()
    waiting.wait()
    process = int(file.read_text())
    while time.monotonic() < ends:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    pytest.fail("the trial went on")
