"""A LoRA adapter as the start of Dual LoRA: all signs, as much of the magnitude as the rank holds, and it trains."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tiny import bert, gpt2, layers, llama, logits, tokens, trainable
from torch import nn

from dual_lora import convert_to_dual_lora, convert_to_lora, save_as_dual_lora


def lora(base, targets, r=4, **options):
    """A LoRA adapter as if trained: B is not zero any more."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=r, target_modules=targets, **options)).eval()
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.1)
    return model


@pytest.mark.parametrize(
    ("base", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"])], ids=["llama", "gpt2"]
)
def test_rank_one_is_exact(base, targets, tmp_path):
    """|b aᵀ| = |b| |a|ᵀ is of rank 1, and the signs are kept at any rank."""
    base = base()
    model = lora(base, targets, r=1, lora_alpha=7)
    start = save_as_dual_lora(tmp_path, model)
    assert all(kept.cosine > 1 - 1e-5 for kept in start.kept)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base), logits(model), atol=1e-2)


def test_an_adapter_that_transformers_has_loaded_is_written_as_any_other(tmp_path):
    """Its model has names without PEFT's prefix, of which PEFT loaded nothing: the factors kept a random start."""
    model = lora(llama(), ["q_proj", "down_proj"], r=1)
    model.save_pretrained(tmp_path / "lora")
    own = llama()
    own.load_adapter(tmp_path / "lora")
    names = save_as_dual_lora(tmp_path / "dual", own).state_dict.keys()
    for other in model, torch.compile(model, backend="eager"):
        assert convert_to_dual_lora(other).state_dict.keys() == names
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "dual").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


def test_signs_are_kept_and_the_figures_are_those_of_the_loaded_adapter(tmp_path):
    base = llama()
    model = lora(base, ["q_proj", "k_proj"], use_rslora=True)
    updates = {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "lora_A")}
    start = save_as_dual_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert layers(loaded).keys() == updates.keys()
    for kept, (name, layer) in zip(start.kept, layers(loaded).items(), strict=True):
        found, update = layer.get_delta_weight("default"), updates[name]
        assert float(layer.warmup_factor("default")) == 1
        cosine = torch.nn.functional.cosine_similarity(found.flatten(), update.flatten(), dim=0)
        assert kept.cosine == pytest.approx(float(cosine), abs=1e-4)
        assert kept.cosine > 0.8  # a constant magnitude gives √(2/π)
        error = (found - update).norm() / update.norm()
        assert float(error) == pytest.approx((1 - kept.cosine**2) ** 0.5, abs=1e-3)
        _, _, C, D = (f.detach() for f in layer.factors("default"))
        assert float(((D @ C > 0) == (update > 0)).float().mean()) == kept.signs > 0.999
        for factor in (C, D):
            assert float(factor.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-3)
        assert (kept.r1, kept.r2) == (4, 4)
        assert kept.layer in str(start)


def test_more_magnitude_rank_keeps_more():
    model = lora(llama(), ["q_proj"])
    medians = [convert_to_dual_lora(model, r1).median for r1 in (1, 4, 16, 32)]
    assert medians == sorted(medians)
    assert medians[0] < 0.9 < 0.9999 < medians[-1]


def test_layers_of_other_ranks_keep_theirs(tmp_path):
    base = llama()
    model = lora(base, ["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.v_proj": 2})
    save_as_dual_lora(tmp_path, model)
    loaded = layers(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    ranks = {
        n.removeprefix("base_model.model.model."): (m.states["default"].r1, m.states["default"].r2)
        for n, m in loaded.items()
    }
    assert ranks.pop("layers.1.self_attn.v_proj") == (2, 2)
    assert set(ranks.values()) == {(4, 4)}


@pytest.mark.parametrize("names", [["0"], ["0", "1.1"], ["0", "1.0"]])
def test_a_layer_whose_name_ends_anothers_takes_it_not_along(names, tmp_path):
    """PEFT takes every module whose name ends with "0": both "0" and "1.0"."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    model = lora(base, "|".join(names), rank_pattern={f"^{names[-1]}": 1} if len(names) > 1 else {})
    start = save_as_dual_lora(tmp_path, model)
    assert {kept.layer for kept in start.kept} == set(names)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ranks = {n.removeprefix("base_model.model."): m.states["default"].r2 for n, m in layers(loaded).items()}
    assert ranks == {name: 1 if len(names) > 1 and name == names[-1] else 4 for name in names}
    as_lora = convert_to_lora(loaded, 1.0)
    again = get_peft_model(copy.deepcopy(base), as_lora.config)
    missing = set_peft_model_state_dict(again, as_lora.state_dict).unexpected_keys
    assert not missing
    x = torch.randn(3, 6)
    torch.testing.assert_close(again(x), loaded(x), atol=1e-4, rtol=1e-4)


def test_a_trained_head_goes_along_and_training_goes_on(tmp_path):
    base = bert()
    model = lora(base, ["query", "value"], task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        head.weight.normal_()
    save_as_dual_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head.weight)
    optimizer = torch.optim.SGD(trainable(loaded), lr=0.1)
    before = {n: p.detach().clone() for n, p in loaded.named_parameters() if p.requires_grad}
    first = None
    for _ in range(5):
        loss = loaded(input_ids=tokens(), labels=torch.tensor([0, 1, 2])).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first
    still = [n for n, p in loaded.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(use_dora=True), TypeError, r"more than its two factors.*merge_and_unload"),
        (dict(target_modules=["embed_tokens"]), TypeError, r"Embedding.* is not linear.*merge_and_unload"),
        (dict(init_lora_weights=True), ValueError, "is zero .*no signs to keep"),
    ],
    ids=["dora", "embedding", "untrained"],
)
def test_what_has_no_place_is_refused(options, error, message):
    options = dict(target_modules=["q_proj"]) | options
    model = get_peft_model(llama(), LoraConfig(r=4, **options))
    with pytest.raises(error, match=message):
        convert_to_dual_lora(model)


def test_a_model_without_lora_and_a_rank_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"r1 is 0: give a whole number"):
        convert_to_dual_lora(lora(llama(), ["q_proj"]), 0)
    with pytest.raises(ValueError, match="no LoRA adapter 'default'"):
        convert_to_dual_lora(llama())


@pytest.mark.parametrize("more", [{"trainable_token_indices": [3, 5]}, {"layer_replication": [[0, 2], [1, 2]]}])
def test_what_is_trained_besides_comes_along(more, tmp_path):
    base = llama()
    model = lora(base, ["q_proj"], r=1, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_as_dual_lora(tmp_path, model)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changed_the_base_is_refused(start):
    """B A is no update of the base then: the converted adapter would be put on another one."""
    with pytest.raises(ValueError, match="began by changing its base"):
        convert_to_dual_lora(lora(llama(), ["q_proj"], init_lora_weights=start))


def test_trained_biases_are_refused():
    with pytest.raises(ValueError, match="trains biases"):
        convert_to_dual_lora(lora(gpt2(), ["c_attn"], bias="all"))
