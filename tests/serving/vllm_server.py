"""A real vLLM server for tests, in a Python environment of its own, and a model and adapters for it."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import peft
import pytest
import torch
from adapters import base_with_words, verified
from transformers import AutoTokenizer, LlamaForCausalLM

from dual_lora import DualLoraConfig

PYTHON = Path(os.environ.get("DUAL_LORA_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")).absolute()
needs_vllm = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment with vLLM: make serving"),
    pytest.mark.timeout(1800),  # a start takes minutes beside other programs
]
TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
METHODS = {
    "one": lambda: DualLoraConfig.paper(r=8, target_modules=TARGETS, warmup_steps=0),
    "other": lambda: DualLoraConfig.paper(r=4, target_modules="all-linear", warmup_steps=0),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with SmolLM2's tokenizer, and adapters of three kinds that change its answers."""
    folder = tmp_path_factory.mktemp("served")
    base_with_words(folder / "base", layers=3)
    for name, method in METHODS.items():
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), method())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
    return folder


def served(folder, adapter, log, *options, extra=None, **environment):
    port = free_port()
    extra = json.dumps({**({"adapter": str(folder / adapter)} if adapter else {}), **(extra or {})})
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "base", "--served-model-name", "m"),
        *("--load-format", "dual_lora", "--model-loader-extra-config", extra, "--port", port, "--dtype", "float32"),
        *("--max-model-len", 256, "--max-num-seqs", 2, "--enforce-eager", *options),
    ]
    environment = {"VLLM_PLUGINS": "dual_lora", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **environment}
    return running(command, log, port, **environment)


def ask(url, method="GET", body=None, kind="application/json", key=None):
    """(status, answer) of a request."""
    data = json.dumps(body).encode() if kind == "application/json" and body is not None else body
    headers = {"Content-Type": kind, **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def logprobs(url, model="m"):
    asked = {"model": model, "prompt": "The sky is", "max_tokens": 8, "temperature": 0, "logprobs": 3}
    status, answer = ask(f"{url}/completions", "POST", asked)
    assert (status, answer.get("model")) == (200, model), answer
    return answer["choices"][0]["logprobs"]


def verdict(folder, adapter, url, model="m"):
    return verified(folder / adapter, url, model)[1]["verdict"]


def as_form(folder):
    """The adapter's two files as a browser or curl would send them."""
    parts = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), (folder / name).read_bytes(), b"\r\n"]
    return b"".join([*parts, b"--edge--\r\n"])


@contextmanager
def running(command, log, port, seconds=900, **environment):
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
            except (urllib.error.URLError, OSError) as error:
                if getattr(error, "code", None) == 401:  # it asks for a key
                    break
                last = log.read_text(errors="replace")
                assert process.poll() is None, f"the server has ended: {last}"
                assert time.monotonic() < until, f"the server does not answer: {last}"
                time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
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
