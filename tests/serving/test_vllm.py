"""A real vLLM server on the CPU: serve an adapter, ask, swap, go back. `verify` judges what is served.

vLLM lives in an environment of its own: `make serving` builds it and runs this file.
"""

import peft
import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_server import METHODS, as_form, ask, folder, logprobs, needs_vllm, served, verdict  # noqa: F401

pytestmark = needs_vllm


def test_serve_ask_swap_and_back(folder, tmp_path):  # noqa: F811
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


def test_two_processes_share_the_model(folder, tmp_path):  # noqa: F811
    options = ["--tensor-parallel-size", 2]
    with served(folder, "one", tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="0|1") as url:
        assert verdict(folder, "one", url) == "on"
        assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": str(folder / "other")})[0] == 200
        assert verdict(folder, "other", url) == "on"


def test_an_adapter_of_another_base_does_not_start(folder, tmp_path):  # noqa: F811
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    peft.get_peft_model(LlamaForCausalLM(config), METHODS["one"]()).save_pretrained(tmp_path / "strange")
    server = served(folder, tmp_path / "strange", tmp_path / "log")
    with pytest.raises(AssertionError, match="does not fit the base model"):
        server.__enter__()
