"""GRPO whose completions come from a real vLLM server, which gets factors and never full weights."""

import importlib.util

import pytest
import torch
from vllm_server import folder, logprobs, needs_vllm, served, verdict  # noqa: F401

from dual_lora.serving.client import AdapterServer, ServerError
from pages import ROOT

pytestmark = needs_vllm


def test_grpo_with_a_server(folder, tmp_path):  # noqa: F811
    pytest.importorskip("trl")
    spec = importlib.util.spec_from_file_location("trl_grpo", ROOT / "examples" / "trl_grpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with served(folder, None, tmp_path / "log") as url:
        before = logprobs(url)
        trainer = example.main(
            str(folder / "base"), tmp_path / "run", steps=3, learning_rate=3e-2, vllm=url, served="m"
        )
        assert logprobs(url) != before
        trainer.processing_class.save_pretrained(tmp_path / "run" / "adapter")
        assert verdict(tmp_path / "run" / "adapter", "", url) == "on"
        server = trainer.rollout_func.server
        merged = sum(p.numel() * p.element_size() for p in trainer.model.get_base_model().parameters())
        assert server.bytes_sent / 4 < merged / 5
        # What the server says of its tokens is what the trained model computes for them.
        [said] = server.complete([[5, 6, 7, 8]], 6, temperature=0)
        ids = torch.tensor([said.prompt + said.tokens])
        with torch.no_grad():
            own = trainer.model.eval()(ids).logits.float().log_softmax(-1)[0, 3:-1]
        own = own.gather(-1, torch.tensor(said.tokens)[:, None])[:, 0]
        torch.testing.assert_close(own, torch.tensor(said.logprobs), atol=0.1, rtol=0)  # the trainer's base may be bf16


def test_a_server_without_the_route_or_none_at_all(folder, tmp_path):  # noqa: F811
    with pytest.raises(ServerError, match="cannot be asked"):
        AdapterServer("http://127.0.0.1:9/v1", "m").complete([[1]], 1)
    with pytest.raises(ValueError, match="expected an address"):
        AdapterServer("localhost:8000", "m")
