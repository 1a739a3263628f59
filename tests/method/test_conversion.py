"""A Dual LoRA adapter as LoRA: the best of its rank, honest about what is lost, and read by what reads LoRA."""

import copy
import json
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny import bert, gpt2, layers, llama, logits, tokens
from torch import nn

from dual_lora import DualLoraConfig, convert_to_lora, save_as_lora
from forked import before_peft


def adapted(base, targets, **options):
    start = dict(init_weights="paper", init_std=0.3) if options.get("warmup_steps") else dict(init_weights=False)
    options = dict(r=4) | start | options
    config = DualLoraConfig(target_modules=targets, **options)
    return get_peft_model(copy.deepcopy(base), config).eval()


def quietly(*args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_to_lora(*args)


@pytest.mark.parametrize(
    ("base", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])], ids=["llama", "gpt2"]
)
def test_full_rank_is_the_same_model(base, targets, tmp_path):
    base = base()
    model = adapted(base, targets, task_type="CAUSAL_LM")
    conversion = save_as_lora(tmp_path, model, 1.0)
    assert all(loss.error < 1e-5 for loss in conversion.losses)
    assert [loss.layer for loss in conversion.losses] == [n.removeprefix("base_model.model.") for n in layers(model)]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base), logits(model), atol=1e-2)


def test_an_adapter_that_transformers_has_loaded_is_written_as_any_other(tmp_path):
    """Its model has names without PEFT's prefix, of which PEFT loaded nothing: the folder held the base model."""
    model = adapted(llama(), ["q_proj", "down_proj"], modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "dual")
    own = llama()
    own.load_adapter(tmp_path / "dual")
    torch.testing.assert_close(logits(own), logits(model))
    save_as_lora(tmp_path / "lora", own, 1.0)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    names = convert_to_lora(own, 1.0).state_dict.keys()
    for other in model, torch.compile(model, backend="eager"):
        assert convert_to_lora(other, 1.0).state_dict.keys() == names


def test_the_reported_error_is_that_of_the_truncated_svd():
    model = adapted(llama(), ["q_proj"])
    with pytest.warns(UserWarning, match="ΔW is of high rank"):
        conversion = convert_to_lora(model, 2)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    singular = torch.linalg.svdvals(layer.get_delta_weight("default"))
    expected = (singular[2:].square().sum() / singular.square().sum()).sqrt()
    loss = conversion.losses[0]
    assert (loss.layer, loss.rank) == ("model.layers.0.self_attn.q_proj", 2)
    assert loss.error == pytest.approx(float(expected), rel=1e-3)
    assert "model.layers.0.self_attn.q_proj" in str(conversion)
    assert f"{loss.error:.1%}" in str(conversion)


@pytest.mark.parametrize("rank", [3, 0.9], ids=["rank", "energy"])
def test_products_are_those_of_pefts_own_conversion(rank):
    """Which takes our layers as well, and differs in how it writes ranks down."""
    model = adapted(gpt2(), ["c_attn", "c_proj"], alpha=8.0)
    ours = quietly(model, rank).state_dict
    _, theirs = peft.convert_to_lora(model, rank=rank)
    for name in layers(model):
        if rank == 3:  # PEFT's own scales are 1 as well
            A, B = (theirs[f"{name}.lora_{x}.weight"] for x in "AB")
            product = ours[f"{name}.lora_B.weight"] @ ours[f"{name}.lora_A.weight"]
            torch.testing.assert_close(product, B @ A, atol=1e-5, rtol=1e-4)
        else:
            rows = ours[f"{name}.lora_A.weight"].any(1)
            assert int(rows.sum()) == theirs[f"{name}.lora_A.weight"].shape[0]


def test_energy_sets_the_rank_of_each_layer_and_no_more_than_it_takes():
    model = adapted(llama(), ["q_proj", "k_proj", "down_proj"])
    conversion = quietly(model, 0.9)
    for loss, layer in zip(conversion.losses, layers(model).values(), strict=True):
        energy = torch.linalg.svdvals(layer.get_delta_weight("default")).square()
        assert loss.error <= 0.1**0.5 + 1e-5
        assert energy[: loss.rank - 1].sum() < 0.9 * energy.sum()
    assert len({loss.rank for loss in conversion.losses}) > 1


def test_every_layer_has_one_shape_and_scale_one():
    """vLLM and llama.cpp divide one α by one rank; a smaller layer is filled up with zeros and gives the same."""
    base = llama()
    model = adapted(base, ["q_proj", "k_proj", "down_proj"])
    conversion = quietly(model, 24)  # k_proj has 16 rows
    assert {loss.rank for loss in conversion.losses} == {16, 24}
    assert {v.shape[0] for k, v in conversion.state_dict.items() if "lora_A" in k} == {24}
    assert {v.shape[1] for k, v in conversion.state_dict.items() if "lora_B" in k} == {24}
    config = conversion.config
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (24, 24, {}, {})
    assert config.target_modules == {"q_proj", "k_proj", "down_proj"}


def test_layers_that_were_left_out_stay_out(tmp_path):
    base = llama()
    model = adapted(base, ["q_proj", "v_proj"], exclude_modules=["model.layers.0.self_attn.v_proj"])
    conversion = save_as_lora(tmp_path, model, 1.0)
    assert len(conversion.losses) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of adapter weights that the file does not hold
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert sum(hasattr(m, "lora_A") for m in loaded.modules()) == 3
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_a_trained_head_goes_along(tmp_path):
    base = bert()
    model = adapted(base, ["query", "value"], task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.normal_()
    save_as_lora(tmp_path, model, 1.0)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_conversion_is_of_the_present_lambda():
    model = adapted(llama(), ["q_proj"], warmup_steps=4)
    for layer in layers(model).values():
        layer.set_left("default", 0)
    full = quietly(model, 1.0).state_dict
    for layer in layers(model).values():
        layer.set_left("default", 3)
    quarter = quietly(model, 1.0).state_dict
    name = next(iter(layers(model)))
    product = [s[f"{name}.lora_B.weight"] @ s[f"{name}.lora_A.weight"] for s in (full, quarter)]
    torch.testing.assert_close(product[1], product[0] / 4, atol=1e-5, rtol=1e-4)
    for layer in layers(model).values():
        layer.set_left("default", 4)
    assert all(loss.error == 0 for loss in quietly(model, 1).losses)  # λ = 0: nothing to lose


PLAIN = """
import sys, torch
sys.modules["dual_lora"] = None
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({folder!r}).eval()
print("logits", model(torch.tensor({tokens})).logits.tolist())
"""


@pytest.mark.slow
def test_plain_peft_reads_the_folder_without_this_package(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), ["q_proj", "up_proj"], task_type="CAUSAL_LM")
    save_as_lora(tmp_path / "lora", model, 1.0)
    said = before_peft(PLAIN.format(folder=str(tmp_path / "lora"), tokens=tokens().tolist()))
    found = torch.tensor(json.loads(said.rpartition("logits ")[2]))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)


def test_no_warning_where_nothing_is_lost():
    model = adapted(llama(), ["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert_to_lora(model, 1.0)


def test_layers_that_are_not_linear_are_refused():
    model = get_peft_model(nn.Sequential(nn.Conv2d(2, 3, 2)), DualLoraConfig(target_modules=["0"], init_weights=False))
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*Conv2d.*merge_and_unload"):
        convert_to_lora(model, 2)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, True, "16"])
def test_ranks_that_cannot_be(rank):
    with pytest.raises(ValueError, match=r"rank is .*whole number of at least 1"):
        convert_to_lora(adapted(llama(), ["q_proj"]), rank)


def test_biases_and_models_without_an_adapter_are_refused():
    with pytest.raises(ValueError, match=r"trains biases.*Merge it"):
        convert_to_lora(adapted(bert(), ["query"], bias="all"), 2)
    with pytest.raises(ValueError, match="no Dual LoRA adapter 'other'"):
        convert_to_lora(adapted(llama(), ["q_proj"]), 2, adapter_name="other")


@pytest.mark.parametrize("more", [{"trainable_token_indices": [3, 5]}, {"layer_replication": [[0, 2], [1, 2]]}])
def test_what_is_trained_besides_comes_along(more, tmp_path):
    base = llama()
    model = adapted(base, ["q_proj"], **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_as_lora(tmp_path, model, 1.0)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
