"""Base layers of a subclass with a forward of its own, beside the table: arguments, caches, weights that are away."""

import contextlib
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from reference_layer import adapted, delta, expect, leaves
from torch import nn
from torch.ao.nn import qat
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.bitnet import AutoBitLinear

from dual_lora import composed_weights
from dual_lora.method import layer as layer_module


class ScaledHead(nn.Linear):
    """As language models with a learned scale of each logit have it."""

    def forward(self, x):
        return super().forward(x).float() * torch.arange(1, self.out_features + 1) / 4


class Positions(nn.Embedding):
    """As OPT's: it is called with a mask, and looks up positions."""

    def forward(self, mask, start=0):
        return super().forward((mask.cumsum(1) * mask).long()[:, start:] + 2)


CASES = {
    "scaled": lambda: (ScaledHead(12, 5), torch.randn(4, 12)),
    "positions": lambda: (Positions(9, 6), torch.ones(2, 4)),
}


def case(name):
    torch.manual_seed(4)
    return CASES[name]()


def weights_of(base, layer, factors):
    return {"weight": base.weight.detach() + delta(layer, factors)}


def test_further_arguments_are_the_bases():
    base, x = case("positions")
    model, layer = adapted(base, call=lambda it, x: it(x, start=1))
    expected = expect(base, weights_of(base, layer, leaves(layer)), x, lambda it, x: it(x, start=1))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_its_composed_weight_is_kept_while_a_model_decodes():
    base, x = case("scaled")
    model, _ = adapted(base)
    composed_weights.clear()
    with torch.no_grad():
        model.eval()(x)
        assert composed_weights.bytes_held == 0
        model.base_model.model.it.shared.decoding = True  # as a layer with sequences finds
        model(x)
    assert composed_weights.bytes_held == base.weight.nbytes


def zero3(model):
    """As DeepSpeed's ZeRO-3: the base's weight is empty but for the time of the base's own forward."""
    base = model.base_model.model.it.base_layer
    weight, whole, empty = base.weight, base.weight.data, torch.empty(0)
    weight.ds_id, weight.ds_shape, weight.data = 0, whole.shape, empty
    base.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole))
    base.register_forward_hook(lambda *_: setattr(weight, "data", empty))


def offloaded(model):
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("away", [zero3, offloaded])
def test_a_weight_that_is_there_in_the_bases_forward_alone_stays_its_own(away):
    """No weight can be composed from it: the adapter's product is added, as LoRA's is."""
    base, x = case("scaled")
    model, layer = adapted(base)
    expected = base(x) + x @ delta(layer, leaves(layer)).t()
    away(model)
    weight = layer.base_layer.weight
    assert weight.is_meta or not weight.numel()
    torch.testing.assert_close(model(x), expected)


def test_codes_of_a_library_keep_their_own_product():
    """As GGUF's: bytes that are no matrix [O, I]."""

    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(12, 5)
            self.real = self.weight.detach()
            self.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return functional.linear(x, self.real, self.bias)

    base, x = Packed(), torch.randn(4, 12)
    model, layer = adapted(base)
    torch.testing.assert_close(model(x), functional.linear(x, base.real + delta(layer, leaves(layer)), base.bias))
    with pytest.raises(ValueError, match="too coarse"):
        model.merge_adapter()


def test_a_forward_that_was_exchanged_for_all_layers_is_called(monkeypatch):
    """As programs do that patch `nn.Linear.forward` itself."""
    base = nn.Linear(12, 5)
    model, layer = adapted(base)
    x, W = torch.randn(4, 12), (base.weight + delta(layer, leaves(layer))).detach()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * functional.linear(x, self.weight, self.bias))
    torch.testing.assert_close(model(x), 2 * functional.linear(x, W, base.bias))
    assert nn.Linear.forward not in layer_module.Linear.forwards


class Coarse(torch.overrides.TorchFunctionMode):
    """As a simulated quantisation acts: on every product and every row that is looked up."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result.round(decimals=1) if function in (functional.linear, functional.embedding) else result


@contextlib.contextmanager
def replaced_functions():
    real = {name: getattr(functional, name) for name in ("linear", "embedding")}
    for name, function in real.items():
        setattr(functional, name, lambda *a, _f=function, **k: _f(*a, **k).round(decimals=1))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(functional, name, function)


@pytest.mark.parametrize("coarse", [replaced_functions, Coarse])
@pytest.mark.parametrize("base", [nn.Linear(12, 5), nn.Embedding(9, 6)])
def test_a_replaced_function_is_not_passed_by(base, coarse):
    """What somebody calls instead of `F.linear` acts on W + ΔW, in training and in evaluation."""
    model, layer = adapted(base)
    x = torch.arange(4) if isinstance(base, nn.Embedding) else torch.randn(4, 12)
    fine, weight = model(x), base.weight.detach() + layer.get_delta_weight("default")
    function = functional.embedding if isinstance(base, nn.Embedding) else functional.linear
    expected = function(x, weight) if isinstance(base, nn.Embedding) else function(x, weight, base.bias)
    for mode in (True, False):
        with coarse(), torch.set_grad_enabled(mode):
            y = model.train(mode)(x)
        torch.testing.assert_close(y, expected.round(decimals=1))
        assert not torch.equal(y, fine)
    with torch.device("cpu"):  # PyTorch's own mode changes no result
        torch.testing.assert_close(model(x), fine)


def test_a_forward_that_was_replaced_before_the_import_is_not_passed_by():
    code = """
import torch
from torch import nn
plain = nn.Linear.forward
nn.Linear.forward = lambda self, x: plain(self, x) * 3
from peft import get_peft_model
from dual_lora import DualLoraConfig
base, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
expected = base(x)
print(torch.equal(get_peft_model(base, DualLoraConfig(r=2, target_modules=["0"]))(x), expected))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"


class Codes(torch.Tensor):
    """A library's own kind of tensor. What is computed with it is of torch's kind."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo):
        return self.as_subclass(torch.Tensor).clone().as_subclass(Codes)


class Rounded(nn.Linear):
    """As optimum-quanto's layer: it rounds each weight that is not its own kind of tensor, and W + ΔW is not."""

    def forward(self, x):
        weight = self.weight if isinstance(self.weight, Codes) else self.weight.round(decimals=1)
        return functional.linear(x, weight.as_subclass(torch.Tensor), self.bias)


def test_a_quantised_weight_is_not_quantised_again_with_its_update():
    torch.manual_seed(0)
    base, x = Rounded(12, 5), torch.randn(4, 12)
    values = base.weight.detach().round(decimals=1)
    base._parameters["weight"] = values.as_subclass(Codes)
    model, layer = adapted(base)
    with torch.no_grad():
        expected = functional.linear(x, values + delta(layer, leaves(layer)), base.bias)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_bitnet_s_own_scale_and_rounding_leave_the_update_alone(mode):
    """In the weight's place ΔW was multiplied by the base's scale, or rounded to three values with W."""
    torch.manual_seed(0)
    base, x = AutoBitLinear(12, 5, online_quant=mode == "online"), torch.randn(4, 12)
    if mode == "offline":
        base.weight.data, base.weight_scale.data = (
            base.weight.detach().mul(4).round().clamp(-1, 1),
            torch.tensor([0.02]),
        )
    model, layer = adapted(base)
    with torch.no_grad():
        expected = layer.base_layer(x) + x @ delta(layer, leaves(layer)).T
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="Cannot merge Dual LoRA into a BitNet layer"):
        layer.merge()


QCONFIG = torch.ao.quantization.get_default_qat_qconfig("fbgemm")


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_simulated_quantisation_rounds_the_base_alone(kind):
    """Quantisation-aware training: LoRA's update is added to what the rounded weight gives. With W it was rounded."""
    torch.manual_seed(0)
    base = qat.Linear(12, 5, qconfig=QCONFIG) if kind == "linear" else qat.Conv1d(12, 5, 1, qconfig=QCONFIG)
    x = torch.randn(4, 12) if kind == "linear" else torch.randn(4, 12, 3)
    base(x)
    base.apply(torch.ao.quantization.disable_observer)
    model, layer = adapted(base)
    with torch.no_grad():
        update = layer.get_delta_weight("default")
        added = functional.linear(x, update) if kind == "linear" else functional.conv1d(x, update)
        torch.testing.assert_close(model(x), layer.base_layer(x) + added, atol=1e-5, rtol=1e-5)
    model(x).sum().backward()
    assert layer.dual_lora_B["default"].grad.abs().sum() > 0


class NoProducts(TorchDispatchMode):
    """Products give zero, as a fault that is planted, or another precision that is simulated."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return result * 0 if "mm" in str(function) else result


def test_a_mode_sees_the_product_of_an_adapted_layer():
    torch.manual_seed(0)
    model, _ = adapted(nn.Linear(12, 5, bias=False))
    x = torch.randn(4, 12)
    with torch.no_grad(), NoProducts():
        assert not model(x).any()
    assert model(x).any()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(12, 5), lambda: nn.Conv1d(12, 5, 1), lambda: nn.Embedding(9, 5)])
def test_the_update_of_a_base_that_computes_in_more_bits_than_it_stores_is_not_rounded(kind, stored):
    """As in diffusers' layerwise casting, where hooks cast the weight for the call: the update's product was rounded
    to bf16 or fp16 with its input."""
    base = kind()
    inputs = {nn.Linear: torch.randn(4, 12), nn.Conv1d: torch.randn(2, 12, 4), nn.Embedding: torch.arange(9)}
    x = inputs[type(base)]
    model, layer = adapted(base)
    layer.base_layer.to(stored)
    layer.base_layer.register_forward_pre_hook(lambda module, _: module.to(torch.float32) and None)
    layer.base_layer.register_forward_hook(lambda module, *_: module.to(stored) and None)
    whole = kind().requires_grad_(False).double()
    whole.weight.copy_(layer.base_layer.weight.double() + layer.get_delta_weight("default").detach().double())
    if (bias := getattr(layer.base_layer, "bias", None)) is not None:
        whole.bias.copy_(bias.double())
    expected = whole(x.double() if x.is_floating_point() else x)
    for mode in (model.train(), model.eval()):
        y = mode(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
