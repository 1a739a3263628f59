"""Convolutions of one to three dimensions with every option of theirs; nothing of the weight's size is kept."""

import weakref

import pytest
import torch
from reference_layer import (
    adapted,
    assert_matches_reference,
    assert_merges_exactly,
    assert_survives_saving,
    delta,
    expect,
)
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.method import layer as layer_module

CASES = {
    "1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}),
    "1d circular": (nn.Conv1d, (4, 6, 3), {"padding": 2, "padding_mode": "circular", "dilation": 2}),
    "2d": (nn.Conv2d, (4, 6, (3, 2)), {"stride": (2, 1)}),
    "2d same": (nn.Conv2d, (4, 6, 3), {"padding": "same", "padding_mode": "reflect", "bias": False}),
    "2d groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2}),
    "2d depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4}),
    "3d": (nn.Conv3d, (4, 6, 2), {"padding": 1}),
}


def case(name):
    kind, sizes, options = CASES[name]
    torch.manual_seed(2)
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    return kind(*sizes, **options), torch.randn(2, 4, *([7] * dimensions))


def weights_of(base, layer, factors):
    return {"weight": base.weight.detach() + delta(layer, factors).view(base.weight.shape)}


def test_a_gradient_by_torch_func_of_the_input_alone():
    base, x = case("1d")
    model, layer = adapted(base)
    mine = torch.func.grad(lambda x: model(x).square().sum())(x)
    leaf, weights = x.clone().requires_grad_(), weights_of(base, layer, layer.factors("default"))
    expect(base, weights, leaf).square().sum().backward()
    torch.testing.assert_close(mine, leaf.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("ste", ["clip", "surrogate"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, ste):
    assert_matches_reference(*case(name), weights_of, ste=ste)


@pytest.mark.parametrize("name", CASES)
def test_merge(name):
    assert_merges_exactly(*case(name))


def test_saving(tmp_path):
    assert_survives_saving(*case("2d groups"), tmp_path)


def test_parameters_are_those_of_loras_convolution():
    from peft import LoraConfig, get_peft_model

    base, _ = case("2d")
    model, _ = adapted(base, r=4)
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = get_peft_model(nn.Sequential(case("2d")[0]), LoraConfig(r=4, target_modules=["0"]))
    assert ours == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_the_composed_weight_is_not_kept_for_backward(monkeypatch):
    base, x = case("2d")
    model, layer = adapted(base)
    made = []

    def spied(*args, **kwargs):
        W = dual_lora_weight(*args, **kwargs)
        made.append(weakref.ref(W))
        return W

    monkeypatch.setattr(layer_module, "dual_lora_weight", spied)
    y = model(x.requires_grad_())
    assert len(made) == 1
    assert made[0]() is None
    y.sum().backward()
    assert layer.factors("default").A.grad.any()
    assert x.grad.any()


def test_gradients_are_the_same_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    base, x = case("2d")
    grads = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(0)
        model, layer = adapted(base)
        model.train()
        run(model, x).square().sum().backward()
        grads.append([f.grad for f in layer.factors("default")])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_is_the_adapters_alone():
    base, x = case("2d")
    model, layer = adapted(base, dropout=0.5)
    model.train()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    expected = base(x) + base._conv_forward(dropped, layer.get_delta_weight("default"), None)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_hook_on_the_base_layer_is_still_called():
    base, x = case("2d")
    model, layer = adapted(base)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 100)
    plain, _ = adapted(base)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x) + 100, atol=1e-4, rtol=1e-4)


def test_mixed_batch_equals_separate_batches():
    base, x = case("2d")
    model, _ = adapted(base, adapter="a")
    model.add_adapter("b", DualLoraConfig(target_modules=["it"], init_weights=False))
    model.eval()
    with torch.no_grad():
        mixed = model(x, adapter_names=["b", "__base__"])
        model.set_adapter("b")
        torch.testing.assert_close(mixed[:1], model(x[:1]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mixed[1:], base(x[1:]), atol=1e-5, rtol=1e-4)
