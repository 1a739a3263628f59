"""nn.MultiheadAttention beside the table: what is composed, encoder layers, an adapter of its projection alone."""

import pytest
import torch
from peft import get_peft_model
from reference_layer import (
    Holder,
    adapted,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dual_lora import DualLoraConfig
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.method import layer as layer_module
from dual_lora.method.factors import FactorsLayer


def multihead(**options):
    torch.manual_seed(1)
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def call(layer, x):
    """Self-attention, or with keys and values of other widths."""
    key, value = x[..., : layer.kdim], torch.cat([x, -x], -1)[..., : layer.vdim]
    return layer(x, key, value)


def inputs():
    return torch.randn(3, 5, 8)


def test_the_base_parameters_stay_registered_during_and_after_a_failing_forward():
    model, layer = adapted(multihead(), call)
    names = list(layer.base_layer._parameters)
    weight = layer.base_layer.in_proj_weight
    with pytest.raises(AssertionError):
        model(torch.randn(3, 5, 7))
    assert list(layer.base_layer._parameters) == names
    assert layer.base_layer.in_proj_weight is weight


def test_decoding_composes_once(monkeypatch):
    model, layer = adapted(multihead(), call)
    model.eval()
    x = inputs()
    made = []
    monkeypatch.setattr(
        layer_module, "dual_lora_weight", lambda *args, **kwargs: made.append(1) or dual_lora_weight(*args, **kwargs)
    )
    layer.shared.decoding = True  # as a layer with sequences finds
    with torch.no_grad():
        once, twice = model(x)[0], model(x)[0]
    assert torch.equal(once, twice)
    assert len(made) == 2


def test_encoder_layer():
    """PyTorch's own encoder layer reads attributes off its attention and takes a fast path in inference."""
    torch.manual_seed(1)
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = inputs()
    model = get_peft_model(
        nn.Sequential(base), DualLoraConfig(target_modules=["0.self_attn"], init_weights=False, r=4)
    ).eval()
    with torch.no_grad():
        fast = model(x)
        slow = model(x.requires_grad_())
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
        merged = model.merge_and_unload()(x)
    torch.testing.assert_close(merged, fast, atol=1e-5, rtol=1e-4)


def test_an_output_projection_that_is_named_as_well_is_adapted_once():
    """`target_modules` of a regular expression often name both: the second one would train nothing, and be saved."""
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    targets = ["self_attn", "out_proj"]
    model = get_peft_model(base, DualLoraConfig(target_modules=targets, init_weights=False, r=4))
    model(inputs()).square().sum().backward()
    factors = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(factors) == 8
    assert all(grad.any() for grad in factors.values())


def test_an_adapter_of_the_output_projection_alone_stays_beside_one_of_the_attention():
    model, _ = adapted(multihead(), call, target_modules=["out_proj"])
    x = inputs()
    alone = model(x)[0]
    model.add_adapter("whole", DualLoraConfig(target_modules=["it"], init_weights=False, r=4))
    torch.testing.assert_close(model(x)[0], alone)
    for names in (["default"], ["whole"], ["default", "whole"]):
        model.base_model.set_adapter(names)
        want = model(x)[0]
        model.merge_adapter()
        torch.testing.assert_close(model(x)[0], want, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x)[0], want)
    assert not torch.allclose(want, alone, atol=1e-2)


def test_factors_go_where_the_attention_is(monkeypatch):
    """A card that is not there: fake tensors know their device alone, and cannot be read."""
    monkeypatch.setattr(FactorsLayer, "steps_left", lambda self, adapter: self._read[adapter][2])
    base = multihead()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in base.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(p, device="cuda")))
        model = get_peft_model(Holder(base, call), DualLoraConfig(target_modules=["it"]))
    assert {p.device.type for p in model.parameters()} == {"cuda"}
