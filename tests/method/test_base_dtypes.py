"""Weights and inputs of dtypes that a sum with ΔW cannot be taken in: right all the same, or an error."""

import pytest
import torch
from peft import get_peft_model
from reference_layer import adapted
from torch import nn
from torch.nn.functional import linear

from dual_lora import DualLoraConfig

BITS8 = torch.float8_e4m3fn
LAYERS = {"linear": nn.Linear(9, 4), "convolution": nn.Conv1d(9, 4, 3)}


class ScaledLinear(nn.Linear):
    """An fp8 weight with a scale of its own, as transformers' FP8Linear has."""

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype) * 0.01, self.bias)


def in_eight_bits(kind):
    torch.manual_seed(0)
    base = kind(16, 12)
    base.weight.requires_grad_(False)
    base.weight.data = (base.weight * 100).to(BITS8)
    return base


@pytest.mark.parametrize("kind", [nn.Linear, ScaledLinear])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_eight_bit_weight_does_not_round_the_input(kind, mode):
    base = in_eight_bits(kind)
    model, layer = adapted(base)
    x = torch.randn(5, 16)
    scale = 0.01 if kind is ScaledLinear else 1.0
    want = linear(x, base.weight.float() * scale + layer.get_delta_weight("default"), base.bias)
    with mode():
        got = model.eval()(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


def test_nothing_is_merged_into_eight_bits():
    model, layer = adapted(in_eight_bits(ScaledLinear))
    with pytest.raises(ValueError, match="too coarse"):
        model.merge_adapter()
    assert not layer.merged


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("kind", LAYERS)
def test_complex_inputs_are_refused(kind, mode):
    model, _ = adapted(LAYERS[kind])
    with mode(), pytest.raises(ValueError, match="real inputs"):
        model.eval()(torch.randn(2, 9, 9, dtype=torch.complex64))


@pytest.mark.parametrize("base", [nn.Linear(9, 4, dtype=torch.complex64), nn.Conv1d(9, 4, 3, dtype=torch.complex64)])
def test_complex_weights_are_refused(base):
    with pytest.raises(ValueError, match="real weights"):
        adapted(base)


@pytest.mark.parametrize("dtype", [BITS8, torch.uint8, torch.complex64])
def test_parameters_in_a_code_of_their_own_are_refused(dtype):
    base = nn.Module()
    base.experts = nn.Module()
    base.experts.weight = nn.Parameter(torch.zeros(2, 4, 3).to(dtype), requires_grad=False)
    config = DualLoraConfig(target_parameters=["experts.weight"], target_modules=[])
    with pytest.raises(ValueError, match="stores encoded numbers"):
        get_peft_model(base, config)


def test_an_embedding_in_eight_bits_is_refused():
    base = nn.Embedding(6, 4)
    base.weight = nn.Parameter(base.weight.detach().to(BITS8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised embedding"):
        adapted(base)
