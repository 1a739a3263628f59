"""A Dual LoRA adapter as LoRA: right up to the rank, and honest about what is lost."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import gpt2, llama
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.method.conversion import save_as_lora, to_lora

IDS = torch.arange(10).view(2, 5)


def adapted(base, targets):
    config = DualLoraConfig(target_modules=targets, init_weights=False, r=4)
    return get_peft_model(copy.deepcopy(base), config).eval()


@pytest.mark.parametrize(
    ("base", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])], ids=["llama", "gpt2"]
)
def test_full_rank_is_the_same_model(base, targets, tmp_path):
    base = base()
    model = adapted(base, targets)
    conversion = save_as_lora(tmp_path, model, 1.0)
    assert all(loss.error < 1e-2 for loss in conversion.losses)
    assert len(conversion.losses) == len([m for m in model.modules() if hasattr(m, "dual_lora_A")])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=5e-2, rtol=5e-2)


def test_the_reported_error_is_that_of_the_truncated_svd():
    model = adapted(llama(), ["q_proj"])
    with pytest.warns(UserWarning, match="ΔW is of high rank"):
        conversion = to_lora(model, 2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    singular = torch.linalg.svdvals(layer.get_delta_weight("default"))
    expected = (singular[2:].square().sum() / singular.square().sum()).sqrt()
    loss = conversion.losses[0]
    assert (loss.layer, loss.rank) == ("model.layers.0.self_attn.q_proj", 2)
    assert loss.error == pytest.approx(float(expected), rel=1e-3)
    assert "model.layers.0.self_attn.q_proj" in str(conversion)
    assert f"{loss.error:.1%}" in str(conversion)


def test_energy_sets_the_rank_of_each_layer():
    model = adapted(llama(), ["q_proj", "k_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conversion = to_lora(model, 0.9)
    assert all(loss.error <= 0.1**0.5 + 1e-4 for loss in conversion.losses)
    assert {loss.rank for loss in conversion.losses} == {
        v.shape[0] for k, v in conversion.state_dict.items() if "lora_A" in k
    }


def test_no_warning_where_nothing_is_lost():
    model = adapted(llama(), ["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_lora(model, 1.0)


def test_layers_that_are_not_linear_are_refused():
    model = get_peft_model(nn.Sequential(nn.Conv2d(2, 3, 2)), DualLoraConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        to_lora(model, 2)
