"""Layers by the Triton kernels, in Triton's interpreter: what they compute, and that nothing is left to the blocks.

Forward and merge have to find the same signs, so both have to come from the kernels.
"""

import pytest
import torch
from peft import get_peft_model
from reference_layer import Holder, adapted, first
from torch import nn
from torch.func import functional_call

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from dual_lora import DualLoraConfig
from dual_lora.core import blocked, dispatch
from dual_lora.core.kernels import linear as triton_linear
from dual_lora.core.reference import Factors, delta_weight


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels compute on the CPU as well, and the blocks nothing."""
    monkeypatch.setattr(dispatch, "implementation", lambda *args: triton_linear)
    for name in ("forward", "backward", "compose", "factor_gradients"):
        monkeypatch.delattr(blocked, name)


def attend(layer, x):
    return layer(x, x, x, need_weights=False)[0]


def weights_of(base, layer, doubles):
    """{parameter: W + ΔW} in fp64 of the adapted layers below `layer`; doubles: their factors, by layer."""
    if isinstance(base, nn.MultiheadAttention):
        names = {"in_proj_weight": layer, "out_proj.weight": layer.get_base_layer().out_proj}
    else:
        names = {"weight": layer}
    return {
        name: base.get_parameter(name).double()
        + delta_weight(
            doubles[adapted], adapted.dual_lora_scale["default"].double(), adapted.states["default"].form
        ).view(base.get_parameter(name).shape)
        for name, adapted in names.items()
    }


CASES = {
    "linear": (lambda: nn.Linear(20, 30), (3, 20), lambda layer, x: layer(x)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5), lambda layer, x: layer(x)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (2, 3, 16), attend),
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradients_and_merge(name):
    make, shape, call = CASES[name]
    base = make()
    model, layer = adapted(base, call, ste="identity", alpha=8.0)
    layers = [m for m in model.modules() if hasattr(m, "dual_lora_scale")]
    doubles = {m: Factors(*(f.detach().double().requires_grad_() for f in m.factors("default"))) for m in layers}
    x = torch.randn(shape)
    weights = {f"it.{n}": w for n, w in weights_of(base, layer, doubles).items()}
    want = functional_call(Holder(base.double(), call), weights, (x.double(),))
    base.float()
    got = first(model.train()(x))
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)
    g = torch.randn_like(got)
    got.backward(g)
    want.backward(g.double())
    for m in layers:
        for letter, ours, theirs in zip("ABCD", m.factors("default"), doubles[m], strict=True):
            assert theirs.grad.any()
            torch.testing.assert_close(
                ours.grad.double(), theirs.grad, atol=2e-5, rtol=1e-4, msg=lambda t, letter=letter: f"{letter}: {t}"
            )
    model.eval()
    with torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(first(model(x)).double(), want.detach(), atol=2e-5, rtol=1e-4)


def four_bit():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128) / 10, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def hqq():
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return quantize.HQQLinear(nn.Linear(128, 64), config, compute_dtype=torch.float32, device="cpu")


def torchao():
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model := nn.Sequential(nn.Linear(128, 64)), quantization.Int8WeightOnlyConfig())
    return model[0]


@pytest.mark.parametrize("make", [four_bit, hqq, torchao], ids=["bitsandbytes", "HQQ", "torchao"])
def test_quantised_bases(make):
    config = DualLoraConfig(target_modules=["1"], init_weights=False, r=4, ste="identity")
    model = get_peft_model(nn.Sequential(nn.Identity(), make().requires_grad_(False)), config)
    layer = model.base_model.model[1]
    x = torch.randn(5, 128, requires_grad=True)
    y = model.train()(x)
    g = torch.randn_like(y)
    y.backward(g)
    W = layer.quantization_backend.get_base_weight(layer.get_base_layer()).detach().double()
    doubles = Factors(*(f.detach().double().requires_grad_() for f in layer.factors("default")))
    x64 = x.detach().double().requires_grad_()
    delta = delta_weight(doubles, layer.dual_lora_scale["default"].double(), layer.states["default"].form)
    bias = layer.get_base_layer().bias
    want = nn.functional.linear(x64, W + delta, None if bias is None else bias.detach().double())
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip((x, *layer.factors("default")), (x64, *doubles), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x[:1]).double(), want[:1].detach(), atol=1e-4, rtol=1e-4)  # kept weight
