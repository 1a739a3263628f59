"""Experts beside the table, in whole models of Mixtral, Qwen3-MoE and GPT-OSS: only routed ones are composed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import EXPERTS, GROUPED, MIXTURES, mixture
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core import whole
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


@pytest.mark.parametrize("targets", [["q_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"])
def test_names_of_before_mean_the_experts_as_with_lora(targets, tmp_path):
    """transformers 5 has the experts' layers in one parameter. Under these names attention alone was adapted."""
    base = mixture("qwen3")
    found = []
    for kind in (LoraConfig, DualLoraConfig):
        model = get_peft_model(copy.deepcopy(base), kind(r=6, lora_alpha=12, target_modules=targets))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        found.append(
            (set(layers), model.get_nb_trainable_parameters()[0], {m.scaling["default"] for m in layers.values()})
        )
    assert found[0] == found[1]
    assert {"gate_up_proj", "down_proj"} <= set(wrappers(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_saved_adapter_keeps_the_layers_that_it_was_trained_with(tmp_path):
    base, names = mixture("qwen3"), {"q_proj", "gate_proj", "up_proj", "down_proj"}
    model = get_peft_model(copy.deepcopy(base), DualLoraConfig(r=6, target_modules=["q_proj"]))
    model.peft_config["default"].target_modules = names  # as versions before saved it
    model.save_pretrained(tmp_path)
    assert not wrappers(PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


@pytest.mark.parametrize("options", [{"r1": 3, "r2": 2}, {"r": 4, "direction_activation": "frozen", "lora_alpha": 8}])
def test_two_fused_matrices_have_twice_the_rank_at_the_same_strength(options):
    model = get_peft_model(mixture("qwen3"), DualLoraConfig(target_modules="all-linear", **options))
    fused, plain = wrappers(model)["gate_up_proj"], wrappers(model)["down_proj"]
    ours, theirs = fused.states["default"], plain.states["default"]
    assert (ours.r1, ours.r2) == (2 * theirs.r1, 2 * theirs.r2)
    assert fused.strength("default") == pytest.approx(plain.strength("default"))
