"""A LoRA adapter as the start of Dual LoRA: all signs, as much of the magnitude as the rank holds, and it trains."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import gpt2, layers, llama, logits, tokens, trainable

pytest.importorskip("cyclopts", reason="the examples' command lines need pip install '.[lab]'")


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
def test_rank_one_is_exact(base, targets, example, tmp_path):
    """|b aᵀ| = |b| |a|ᵀ is of rank 1, and the signs are kept at any rank."""
    base = base()
    model = lora(base, targets, r=1, lora_alpha=7)
    start, kept = example("from_lora").near_lora(model)
    assert all(layer.cosine > 1 - 1e-5 for layer in kept)
    start.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(base), logits(model), atol=1e-2)


def test_signs_are_kept_and_the_figures_are_those_of_the_adapter(example):
    model = lora(llama(), ["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.v_proj": 2})
    start, kept = example("from_lora").near_lora(model)
    found = {name.removeprefix("base_model.model."): layer for name, layer in layers(start).items()}
    assert {layer.layer for layer in kept} == found.keys()
    for row in kept:
        layer, before = found[row.layer], model.get_base_model().get_submodule(row.layer)
        delta, update = layer.get_delta_weight("default"), before.get_delta_weight("default")
        cosine = torch.nn.functional.cosine_similarity(delta.flatten(), update.flatten(), dim=0)
        assert row.cosine == pytest.approx(float(cosine), abs=1e-4)
        assert row.cosine > 0.8  # a constant magnitude gives √(2/π)
        _, _, C, D = (f.detach() for f in layer.factors("default"))
        assert float(((D @ C > 0) == (update > 0)).float().mean()) == row.signs > 0.999
        assert C.shape[0] == before.r["default"]


def test_more_magnitude_rank_keeps_more_and_training_goes_on(example):
    model = lora(llama(), ["q_proj"])
    results = [example("from_lora").near_lora(model, r1) for r1 in (1, 4, 32)]
    least = [min(layer.cosine for layer in kept) for _, kept in results]
    assert least == sorted(least)
    assert least[0] < 0.9 < 0.9999 < least[-1]
    start = results[1][0]
    optimizer = torch.optim.SGD(trainable(start), lr=0.1)
    losses = []
    for _ in range(5):
        loss = start(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(use_dora=True), TypeError, "no plain LoRA of a linear layer"),
        (dict(target_modules=["embed_tokens"]), TypeError, "no plain LoRA of a linear layer"),
        (dict(), ValueError, "is zero, so that it has no signs"),
        (dict(init_lora_weights="pissa"), ValueError, "began by changing its base"),
    ],
    ids=["dora", "embedding", "untrained", "pissa"],
)
def test_what_has_no_place_is_refused(example, options, error, message):
    model = get_peft_model(llama(), LoraConfig(r=4, **(dict(target_modules=["q_proj"]) | options)))
    with pytest.raises(error, match=message):
        example("from_lora").near_lora(model)
