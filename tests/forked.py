"""A process that has imported what takes seconds, and tries each piece of code in a fork of itself."""

import contextlib
import json
import os
import subprocess
import sys

import pytest

SERVER = """
import json, os, sys, traceback
{first}
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        try:
            exec(json.loads(line), {{"__name__": "__main__"}})
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        os._exit(status)
    os.close(write)
    said = os.fdopen(read, errors="replace").read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)
"""


@contextlib.contextmanager
def forking(first):
    """Function: code -> (exit status, what it printed), in a process that began with the code `first`."""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    command = [sys.executable, "-W", "ignore", "-c", SERVER.format(first=first)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(code):
            server.stdin.write(json.dumps(code) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()
