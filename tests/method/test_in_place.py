"""Operations in place on what a layer returns (`nn.ReLU(inplace=True)` after a linear layer): value and gradients."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dual_lora import DualLoraConfig
from dual_lora.core import product


class Then(nn.Module):
    """A layer, and an operation on what it returns."""

    def __init__(self, it, inplace):
        super().__init__()
        self.it, self.inplace = it, inplace

    def forward(self, x):
        y = self.it(x)
        return nn.functional.relu(y.mul_(2), inplace=True) if self.inplace else nn.functional.relu(y * 2)


def four_bit():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 16, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(64, 16).state_dict())
    return layer.to("cpu")


def int8():
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(64, 16))
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer[0]


LAYERS = {
    "linear": lambda: nn.Linear(64, 16),
    "no bias": lambda: nn.Linear(64, 16, bias=False),
    "Conv1D": lambda: Conv1D(16, 64),
    "convolution": lambda: nn.Conv1d(5, 16, 3),
    "embedding": lambda: nn.Embedding(30, 16),
    "embedding, shortened": lambda: nn.Embedding(30, 16, max_norm=1.0),
    "4 bit": four_bit,
    "int8": int8,
}


def value_and_gradients(base, x, inplace, dropout=0.0):
    torch.manual_seed(1)
    config = DualLoraConfig(r=4, target_modules=["it"], init_weights=False, dropout=dropout)
    model = get_peft_model(Then(copy.deepcopy(base), inplace), config)
    y = model(x)
    y.sum().backward()
    return [y, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["fused", "dropout"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_in_place_is_as_out_of_place(kind, lead, dropout):
    if dropout and "embedding" in kind:
        pytest.skip("indices cannot be dropped out")
    if kind == "convolution" and len(lead) == 0:
        pytest.skip("a convolution takes a signal")
    base = LAYERS[kind]()
    x = torch.randint(0, 30, lead) if "embedding" in kind else torch.randn(*lead, 64)
    expected = value_and_gradients(base, x, False, dropout)
    for got, want in zip(value_and_gradients(base, x, True, dropout), expected, strict=True):
        assert want.any()
        assert torch.equal(got, want)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("O", [1, 16])
def test_with_the_other_library_of_products(O, monkeypatch):
    """Which returns memory of its own, and may return a transposed view of it."""
    base, x = nn.Linear(64, O), torch.randn(5, 64)
    monkeypatch.setattr(product, "onednn_is_faster", lambda: False)
    expected = value_and_gradients(base, x, False)
    monkeypatch.setattr(product, "onednn_is_faster", lambda: True)
    for got, want in zip(value_and_gradients(base, x, True), expected, strict=True):
        assert want.any()
        torch.testing.assert_close(got, want)
