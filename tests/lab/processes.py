"""A command in a process of its own: forked from this one, which has imported all that takes seconds, or a training on
several processes, started as the documentation says.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
ON_CPU = Path(__file__).with_name("fsdp2_on_cpu.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launched(strategy, processes, recipe, out, *more):
    """The documented command for ``processes`` of them on CPU. strategy: fsdp2-in-parts has checkpoints in parts."""
    environment = ENVIRONMENT
    if strategy == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "dual_lora.lab.cli"]
    else:
        config = CONFIGS / f"{strategy}.yaml"
        if strategy == "fsdp2-in-parts":
            text, config = (CONFIGS / "fsdp2.yaml").read_text(), Path(out).with_suffix(".yaml")
            config.write_text(text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
        started = [str(ON_CPU)]
        if strategy.startswith("zero"):  # DeepSpeed asks for the CPU by itself
            started, environment = ["-m", "dual_lora.lab.cli"], {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}
            config = Path(out).with_suffix(".yaml")
            config.write_text((CONFIGS / f"{strategy}.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes), "--main_process_port", "0", *started]
    command += ["train", str(recipe), "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def dying_worker(line, *_):
    """In place of a study's worker: it takes a job and dies, as it does when memory is full."""
    line.recv()
    os.kill(os.getpid(), signal.SIGKILL)


class Forked:
    """`dual-lora ARGUMENTS` in a fork of this process; what it prints goes into two files of `folder`."""

    def __init__(self, arguments, folder, environment=None):
        if not hasattr(os, "fork"):
            pytest.skip("this system has no fork")
        folder.mkdir(exist_ok=True)
        self._files = [folder / "stdout", folder / "stderr"]
        target = (list(map(str, arguments)), self._files, environment or {})
        self._process = multiprocessing.get_context("fork").Process(target=_command, args=target)
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    @property
    def returncode(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=120):
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            pytest.fail(f"the command has not ended in {timeout} s")
        return tuple(file.read_text() for file in self._files)


def _command(arguments, files, environment):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dual_lora.lab.cli import main

    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for state in (AcceleratorState, PartialState, GradientState):  # this process alone, as accelerate knows it
        state._shared_state.clear()
    main(arguments)


def forked_together(arguments, folder, count=2):
    """The command in so many processes that train together, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(arguments, folder / str(rank), together | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
