"""A process that has imported what takes seconds, and tries each piece of code in a fork of itself."""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = """
import json, os, sys, traceback
{first}
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        if torch := sys.modules.get("torch"):  # its pool of threads is made anew by the first who asks, and not safely
            torch.set_num_threads(torch.get_num_threads())
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
            try:
                server.stdin.write(json.dumps(code) + "\n")
                server.stdin.flush()
                return json.loads(server.stdout.readline())
            except BaseException:  # a test that took too long: nobody shall read its answer for another's
                server.kill()
                raise

        yield run
        server.stdin.close()


@functools.cache
def _without_peft():
    """`forking` after what PEFT imports, one server for all files that a worker tests."""
    rest = contextlib.ExitStack()
    atexit.register(rest.close)
    first = "import torch\nfrom transformers import BloomPreTrainedModel, LlamaForCausalLM\ntorch.set_num_threads(1)\n"
    return rest.enter_context(forking(f"{first}assert not {{'peft', 'dual_lora'}} & set(sys.modules)"))


def before_peft(code):
    """What the code prints in a process that has torch and transformers, but neither PEFT nor this package."""
    status, said = _without_peft()(code)
    assert status == 0, said[-6000:]
    return said


PAIR = """
import os, sys
os.environ.update(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost")
sys.path[:0] = {path!r}
other = os.fork()
if not other:
    os.environ.update(RANK="1", LOCAL_RANK="1")
import torch
torch.set_num_threads(1)  # as after every fork
import torch.distributed as dist
dist.init_process_group("gloo", init_method={meeting!r}, rank=int(os.environ["RANK"]), world_size=2)
{code}
dist.destroy_process_group()
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def two_processes(code, meeting):
    """(exit status, what they print) of code in two processes that are one group.

    meeting: a file that is not there yet, by which they find each other.
    """
    path = [str(Path(__file__).parent / folder) for folder in ("method", "")]
    return _without_peft()(PAIR.format(path=path, meeting=f"file://{meeting}", code=code))
