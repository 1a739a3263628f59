"""Named parameters and expert tensors: Mixtral, Qwen3-MoE and GPT-OSS layouts; only routed experts are composed."""

import copy
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from reference_layer import assert_same_bits
from tiny import EXPERTS, MIXTURES, mixture
from torch import nn
from torch.func import functional_call

from dual_lora import DualLoraConfig
from dual_lora.core import whole
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.reference import Factors, delta_weight
from dual_lora.method.layers import experts
from dual_lora.method.layers.experts import ParamWrapper

LAYOUT = pytest.mark.parametrize("layout", MIXTURES)
GROUPED = pytest.param(
    "grouped_mm",
    marks=pytest.mark.skipif(torch.__version__ < "2.9", reason="transformers wants torch 2.9 for grouped_mm"),
)
IMPLEMENTATION = pytest.mark.parametrize("implementation", ["eager", GROUPED, "batched_mm"])
IDS = torch.arange(4).view(1, 4)


def adapted(base, parameters=EXPERTS, **options):
    options = {"target_modules": [], "target_parameters": parameters, "init_weights": False, "r": 4, **options}
    return get_peft_model(copy.deepcopy(base), DualLoraConfig(**options))


def wrappers(model):
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def update(wrapper, factors, adapter="default"):
    """ΔW of the reference, expert by expert, in the parameter's layout."""
    each = [
        delta_weight(Factors(*(f[e] for f in factors)), wrapper.dual_lora_scale[adapter], wrapper.states[adapter].form)
        for e in range(wrapper.num_experts)
    ]
    return wrapper._from_matrix(torch.stack(each))


@LAYOUT
@IMPLEMENTATION
@pytest.mark.parametrize("ste", ["clip", "surrogate"])
def test_value_and_gradients(layout, implementation, ste):
    base = mixture(layout, implementation)
    model = adapted(base, ste=ste)
    layers = wrappers(model)
    assert set(layers) == {"gate_up_proj", "down_proj"}
    factors = {
        name: Factors(*(f.detach().clone().requires_grad_() for f in layer.factors("default")))
        for name, layer in layers.items()
    }
    weights = {
        f"model.layers.0.mlp.experts.{name}": base.model.layers[0].mlp.experts.get_parameter(name).detach()
        + update(layer, factors[name])
        for name, layer in layers.items()
    }
    expected = functional_call(base, weights, (IDS,)).logits
    y = model(IDS).logits
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-3)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for name, layer in layers.items():
        for letter, ours, theirs in zip("ABCD", layer.factors("default"), factors[name], strict=True):
            assert theirs.grad.any(), f"{name} {letter}"
            torch.testing.assert_close(
                ours.grad, theirs.grad, atol=2e-4, rtol=1e-3, msg=lambda m, what=f"{name} {letter}": f"{what}: {m}"
            )


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


@pytest.mark.parametrize("implementation", ["eager", GROUPED])
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


@LAYOUT
def test_merge_unmerge_unload(layout):
    base = mixture(layout)
    model = adapted(base)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        unmerged = model(IDS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, unmerged, atol=1e-5, rtol=1e-4)
        model.unmerge_adapter()
        assert_same_bits(model.state_dict(), before)
        plain = copy.deepcopy(model).merge_and_unload()
        assert not any(isinstance(m, ParamWrapper) for m in plain.modules())
        torch.testing.assert_close(plain(IDS).logits, unmerged, atol=1e-5, rtol=1e-4)
    assert_same_bits(copy.deepcopy(model).unload().state_dict(), base.state_dict())


@LAYOUT
def test_saving(layout, tmp_path):
    base = mixture(layout)
    model = adapted(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_two_adapters_add_up_and_share_the_wrappers():
    base = mixture("mixtral")
    model = adapted(base)
    options = dict(target_modules=[], target_parameters=EXPERTS, init_weights=False, r=6)
    model.add_adapter("other", DualLoraConfig(**options))
    assert len(wrappers(model)) == 2
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        both = model(IDS).logits
        plain = copy.deepcopy(base)
        for name, layer in wrappers(model).items():
            parameter = plain.model.layers[0].mlp.experts.get_parameter(name)
            parameter += layer.get_delta_weight("default") + layer.get_delta_weight("other")
        torch.testing.assert_close(both, plain(IDS).logits, atol=1e-4, rtol=1e-3)


def test_other_parameters_for_a_further_adapter_are_refused():
    model = adapted(mixture("mixtral"))
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("other", DualLoraConfig(target_modules=[], target_parameters=EXPERTS[:1]))


@pytest.mark.parametrize("field", ["dropout", "fan_in_fan_out"])
def test_what_cannot_be_raises_a_clear_error(field):
    value = {"dropout": 0.1, "fan_in_fan_out": True}[field]
    with pytest.raises(ValueError, match=f"ParamWrapper does not work with {field}={value}"):
        adapted(mixture("mixtral"), **{field: value})


def test_a_mixed_batch_raises_a_clear_error():
    model = adapted(mixture("mixtral")).eval()
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(IDS, adapter_names=["default"])


def test_wrong_type_of_target_parameters():
    with pytest.raises(TypeError, match=r"`target_parameters` must be a list of strings or None\."):
        DualLoraConfig(target_parameters="mlp.experts.down_proj")


def test_a_matrix_parameter_is_adapted_like_a_linear_layer():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5))
    by_name = get_peft_model(
        copy.deepcopy(base), DualLoraConfig(target_modules=[], target_parameters=["0.weight"], init_weights=False)
    )
    layer = get_peft_model(copy.deepcopy(base), DualLoraConfig(target_modules=["0"], init_weights=False))
    for ours, theirs in zip(
        by_name.base_model.model[0].factors("default"), layer.base_model.model[0].factors("default"), strict=True
    ):
        ours.data.copy_(theirs.data)
    x = torch.randn(3, 6)
    torch.testing.assert_close(by_name(x), layer(x))


def test_gradient_checkpointing():
    model = adapted(mixture("mixtral")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(IDS).logits.square().sum().backward()
    with_checkpoints = [layer.factors("default").A.grad.clone() for layer in wrappers(model).values()]
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model(IDS).logits.square().sum().backward()
    for ours, layer in zip(with_checkpoints, wrappers(model).values(), strict=True):
        torch.testing.assert_close(ours, layer.factors("default").A.grad, atol=1e-4, rtol=1e-3)
