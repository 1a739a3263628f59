"""Models that accelerate offloads to a CPU or a disk give the same numbers, or an error: never uninitialised memory."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel
from reference_layer import adapted as adapted_layer
from tiny import adapted, llama, logits
from torch import nn
from transformers import AutoModelForCausalLM

from dual_lora import Adapter, Form, dual_lora_linear
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.reference import Factors

CPU = torch.device("cpu")
TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "cpu with buffers": lambda model, folder: cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
}


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_gives_what_it_gave(offload, tmp_path):
    model = adapted(llama(), target_modules=TARGETS, init_weights=False).eval()
    before = logits(model)
    OFFLOADS[offload](model, tmp_path)
    assert all(p.is_meta for n, p in model.named_parameters() if "dual_lora_" in n)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    if offload == "cpu":
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_map", [True, False])
def test_an_adapter_loaded_on_a_base_on_the_disk(with_map, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PEFT drops the leading slash of the folder that it writes to
    base = llama()
    base.save_pretrained(tmp_path / "model--base")  # PEFT's own way to write beside it looks for such a name
    model = adapted(copy.deepcopy(base), target_modules=["q_proj", "down_proj", "lm_head"], init_weights=False).eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    options = {"offload_dir": tmp_path / "offloaded"}
    if with_map:
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model--base", device_map=places, offload_folder=tmp_path / "offloaded"
        )
        options["device_map"] = {f"base_model.model.{name}": place for name, place in places.items()}
    else:
        base = dispatch_model(base, places, main_device="cpu", **options)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", **options).eval()
    assert with_map == any(p.is_meta for n, p in loaded.named_parameters() if "dual_lora_" in n)
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)


LAYERS = {
    "convolution": (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8), lambda layer, x: layer(x)),
    "embedding": (nn.Embedding(9, 6), torch.arange(5), lambda layer, x: layer(x)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 3, 8), lambda a, x: a(x, x, x)[0]),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers(kind):
    """An attention is called with composed weights in the places of its own, which an offload takes away."""
    base, x, call = LAYERS[kind]
    model, _ = adapted_layer(base, call)
    model.eval()
    with torch.no_grad():
        before = model(x)
        cpu_offload(model, execution_device=CPU)
        if kind == "attention":
            with pytest.raises(RuntimeError, match="on the meta device, which hold no numbers"):
                model(x)
        else:
            torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def factors(device):
    return [Adapter(Factors(*(torch.randn(s, device=device) for s in SHAPES)), torch.tensor(1.0), Form())]


SHAPES = [(2, 6), (5, 2), (2, 6), (5, 2)]
CALLS = {
    "linear": lambda weight, adapters: dual_lora_linear(torch.randn(3, 6), weight, None, adapters),
    "weight": lambda weight, adapters: dual_lora_weight(weight, adapters),
    "embedding": lambda weight, adapters: dual_lora_embedding(torch.arange(3), weight, adapters),
}


@pytest.mark.parametrize("where", [("meta", "cpu"), ("cpu", "meta")])
@pytest.mark.parametrize("call", CALLS)
def test_an_operator_never_gives_numbers_from_operands_without(call, where):
    weight, adapters = torch.randn(5, 6, device=where[0]), factors(where[1])
    if call == "weight" and where[0] == "meta":
        assert CALLS[call](weight, adapters).is_meta
        return
    with pytest.raises(RuntimeError, match=r"hold no numbers, together with others on cpu.*device_map"):
        CALLS[call](weight, adapters)


def test_all_on_meta_is_a_model_without_numbers():
    y = dual_lora_linear(torch.randn(3, 6, device="meta"), torch.randn(5, 6, device="meta"), None, factors("meta"))
    assert y.is_meta
    assert y.shape == (3, 5)
