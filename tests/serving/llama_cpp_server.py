"""llama.cpp's server and converters for tests, in an environment of their own; `llama_server.py` runs there."""

import os
from pathlib import Path

import pytest
from vllm_server import free_port, running

HOME = Path(os.environ.get("DUAL_LORA_LLAMA_CPP", Path(__file__).parents[2] / ".venv-llama-cpp")).absolute()
# The converters run in this Python, and need a package that it has not.
CONVERTED = {"PYTHONPATH": os.pathsep.join([str(HOME / "converter"), os.environ.get("PYTHONPATH", "")])}
needs_llama_cpp = [
    pytest.mark.long,
    pytest.mark.skipif(not (HOME / "llama.cpp").is_dir(), reason="no environment with llama.cpp: make serving"),
    pytest.mark.timeout(1800),
]


def served(tmp_path, *files):
    """A server of a model file and, after it, a LoRA file; its log lies in `tmp_path`."""
    port = free_port()
    program = Path(__file__).with_name("llama_server.py")
    return running([HOME / "bin" / "python", program, port, *files], tmp_path / "log", port)
