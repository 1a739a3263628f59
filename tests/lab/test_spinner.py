"""On a real terminal the spinner is one: none of its control characters is written out as text."""

import os
import pty
import select
import sys
import time

import pytest

CODE = """
import time
from dual_lora.lab.terminal import guarded
from dual_lora.lab.progress import Working, stage
with guarded():
    with stage("loading \\x1b[2J the model"):
        time.sleep(0.4)
    with Working("reading") as working:
        working.say("simulating")
        time.sleep(0.4)
    print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of POSIX")
def test_a_spinner_on_a_terminal():
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", CODE], os.environ | {"TERM": "xterm"})
    said, end = b"", time.time() + 60
    while b"done" not in said and time.time() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                said += os.read(terminal, 4096)
            except OSError:
                break
    os.waitpid(pid, 0)
    os.close(terminal)
    text = said.decode()
    assert "done" in text
    assert "simulating" in text
    assert "\\u000d" not in text
    assert text.count("\\u001b") == text.count("loading \\u001b[2J the model"), text  # what a name holds stays text
