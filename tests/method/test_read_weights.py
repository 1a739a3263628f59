"""Layers whose parent reads their weight: what is read is W + ΔW, in training and in inference."""

import copy

import pytest
import torch
from tiny import adapted, layers, train, trainable
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from dual_lora.method.parallel.fast_paths import ReadConv1d, ReadLinear


class Reads(nn.Module):
    """Calls `called`, reads `read` and `filter`, and looks at the rest alone."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.looked_at = (nn.Linear(6, 6) for _ in range(3))
        self.filter = nn.Conv1d(3, 3, 2)

    def forward(self, x):
        x = self.called(x).to(self.looked_at.weight.dtype)
        if isinstance(self.looked_at.weight, torch.Tensor):
            x = self.looked_at(x)
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return nn.functional.conv1d(x.view(2, 3, 6), self.filter.weight, self.filter.bias)


def batch():
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def test_what_is_read_is_composed_and_the_rest_is_called():
    torch.manual_seed(0)
    names = ["called", "read", "looked_at", "filter"]
    model = adapted(Reads(), target_modules=names, init_weights=False, r=4)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in layers(model).items()}
    assert (kinds["read"], kinds["filter"]) == (ReadLinear, ReadConv1d)
    assert ReadLinear not in (kinds["called"], kinds["looked_at"])
    before = model(batch())
    before.square().sum().backward()
    assert all(p.grad.any() for p in trainable(model))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(batch()), before, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(batch()), before, atol=1e-2)


MODELS = {
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"], conv_L_cache=3,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_real_models_compute_merged_as_unmerged(name):
    torch.manual_seed(0)
    targets = {"mamba": ["dt_proj", "x_proj"], "lfm2": ["conv.conv", "q_proj"]}[name]
    model = adapted(MODELS[name](), target_modules=targets, init_weights=True, r=4)
    ids = torch.arange(12).view(1, 12)
    start = model(input_ids=ids).logits
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, 5, optimizer=optimizer, loss=lambda: model(input_ids=ids, labels=ids).loss)
    model.eval()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        assert (unmerged - start).abs().max() > 1e-3
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(unmerged, merged, rtol=1e-3, atol=1e-4)
