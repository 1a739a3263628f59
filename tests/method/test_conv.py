"""Convolutions beside the table: nothing of the weight's size is kept, hooks, the number of parameters."""

import torch
from reference_layer import (
    adapted,
    delta,
    expect,
)
from torch import nn

CASES = {
    "1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "padding": 1}),
    "2d": (nn.Conv2d, (4, 6, (3, 2)), {"stride": (2, 1)}),
}


def case(name):
    kind, sizes, options = CASES[name]
    torch.manual_seed(2)
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2}[kind]
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


def test_parameters_are_those_of_loras_convolution():
    from peft import LoraConfig, get_peft_model

    base, _ = case("2d")
    model, _ = adapted(base, r=4)
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = get_peft_model(nn.Sequential(case("2d")[0]), LoraConfig(r=4, target_modules=["0"]))
    assert ours == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_hook_on_the_base_layer_is_still_called():
    base, x = case("2d")
    model, layer = adapted(base)
    layer.base_layer.register_forward_hook(lambda module, args, output: output + 100)
    plain, _ = adapted(base)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x) + 100, atol=1e-4, rtol=1e-4)


def test_its_geometry_is_read_from_the_layer():
    """Models whose blocks compute the convolution by themselves read it (LFM2 does)."""
    base, _ = case("1d")
    _, layer = adapted(base)
    assert [getattr(layer, name) for name in base.__constants__] == [getattr(base, name) for name in base.__constants__]
    assert not hasattr(layer, "kernel")
