"""Real inference servers for tests, each in a Python environment of its own, as processes that end with the test."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager


@contextmanager
def running(command, log, port, seconds=180, **environment):
    """Start a server and wait until it lists its models; yields the URL that clients use."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        until = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                last = log.read_text(errors="replace")
                assert process.poll() is None, f"the server has ended: {last}"
                assert time.monotonic() < until, f"the server does not answer: {last}"
                time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
