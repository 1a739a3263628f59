"""Experts beside the table, in whole models of Mixtral, Qwen3-MoE and GPT-OSS: only routed ones are composed."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tiny import EXPERTS, GROUPED, MIXTURES, mixture
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core import whole
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.method.layers import experts
from dual_lora.method.layers.experts import ParamWrapper

LAYOUT = pytest.mark.parametrize("layout", MIXTURES)
WITH_GROUPS = pytest.param("grouped_mm", marks=GROUPED)
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", WITH_GROUPS, "batched_mm"])
IDS = torch.arange(4).view(1, 4)


def adapted(base, parameters=EXPERTS, **options):
    options = {"target_modules": [], "target_parameters": parameters, "init_weights": False, "r": 4, **options}
    return get_peft_model(copy.deepcopy(base), DualLoraConfig(**options))


def wrappers(model):
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


@LAYOUT
@IMPLEMENTATION
def test_only_routed_experts_are_composed(layout, implementation, monkeypatch):
    model = adapted(mixture(layout, implementation))
    composed = []
    original = whole.compose
    monkeypatch.setattr(whole, "compose", lambda *args, **kwargs: composed.append(1) or original(*args, **kwargs))
    with torch.no_grad():
        model(IDS[:, :1])  # one token goes to two of six experts, in two tensors
    assert len(composed) == 4


class Masked(nn.Module):
    """Somebody's own experts, whose `selected_experts` is what the test gives: here no list of the parameter's ids."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x, selected_experts):
        every = torch.einsum("eoi,ti->teo", self.W, x)
        mask = selected_experts if selected_experts.shape[1] == 4 else (selected_experts % 4).eq(1)
        return (every * mask[:, :, None]).sum(1)


@pytest.mark.parametrize("kind", ["mask", "whole numbers", "ids of others"])
def test_a_router_s_argument_of_another_meaning_leaves_no_expert_out(kind):
    """A mask of 0 and 1 is no list of two experts."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("experts", Masked())
    model = get_peft_model(base, DualLoraConfig(target_modules=[], target_parameters=["experts.W"], init_weights=False))
    layer = model.base_model.model.experts
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    chosen = {"mask": mask.bool(), "whole numbers": mask, "ids of others": torch.tensor([[5], [9]])}[kind]
    x = torch.randn(2, 3)
    expected = Masked.forward(SimpleNamespace(W=layer.get_param() + layer.get_delta_weight("default")), x, chosen)
    torch.testing.assert_close(layer(x, chosen), expected)


@pytest.mark.parametrize("implementation", ["eager", WITH_GROUPS])
def test_composed_weights_are_not_kept_for_backward(implementation, monkeypatch):
    model = adapted(mixture("mixtral", implementation))
    made = []

    def spied(*args, **kwargs):
        W = dual_lora_weight(*args, **kwargs)
        made.append(weakref.ref(W))
        return W

    monkeypatch.setattr(experts, "dual_lora_weight", spied)
    y = model(IDS).logits
    assert made
    assert [ref() for ref in made] == [None] * len(made)
    y.sum().backward()


def test_other_parameters_for_a_further_adapter_are_refused():
    model = adapted(mixture("mixtral"))
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("other", DualLoraConfig(target_modules=[], target_parameters=EXPERTS[:1]))


@pytest.mark.parametrize("field", ["dropout", "fan_in_fan_out"])
def test_what_cannot_be_raises_a_clear_error(field):
    value = {"dropout": 0.1, "fan_in_fan_out": True}[field]
    with pytest.raises(ValueError, match=f"ParamWrapper does not work with {field}={value}"):
        adapted(mixture("mixtral"), **{field: value})


def test_wrong_type_of_target_parameters():
    with pytest.raises(TypeError, match=r"`target_parameters` must be a list of strings or None\."):
        DualLoraConfig(target_parameters="mlp.experts.down_proj")
