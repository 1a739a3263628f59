"""A whole model's small layers in one launch: merging and switching adapters, in Triton's interpreter or on a GPU."""

import pytest
import torch
from tiny import MODELS, TARGETS

pytest.importorskip("triton", minversion="3.3", reason="the Triton kernels need triton 3.3 or later")

from peft import get_peft_model

from dual_lora import DualLoraConfig, composed_weights
from dual_lora.core import composing, triton_group
from dual_lora.method.layer import Linear


@pytest.fixture
def launches(monkeypatch):
    """How many layers each launch had; the kernels are taken on the CPU as well."""
    seen, launch = [], triton_group._launch
    monkeypatch.setattr(composing, "_by_kernel", lambda weight, adapters, dtype: True)

    def count(alike, rows):
        seen.append(len(rows))
        launch(alike, rows)

    monkeypatch.setattr(triton_group, "_launch", count)
    return seen


def adapted(name="llama"):
    """Two adapters whose products are exact, so that the kernels and plain PyTorch agree on every bit."""
    model = get_peft_model(MODELS[name](), config(name))
    model.add_adapter("other", config(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "dual_lora_" in key:
                parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator) / 4)
    return model.eval()


def config(name):
    return DualLoraConfig(r=4, target_modules=TARGETS[name], warmup_steps=0)


def linears(model):
    return [m for m in model.modules() if type(m) is Linear]


def weights(model):
    return [layer.get_base_layer().weight.detach().clone() for layer in linears(model)]


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("names", [None, ["other"], ["default", "other"]], ids=str)
def test_a_model_is_merged_in_one_launch(names, launches, monkeypatch):
    model = adapted()
    before = weights(model)
    model.merge_adapter(names)
    assert launches == [len(linears(model))]
    merged = weights(model)
    model.unmerge_adapter()
    assert_equal(weights(model), before)
    monkeypatch.undo()
    model.merge_adapter(names)
    for got, want in zip(merged, weights(model), strict=True):
        # The blocks add one adapter after the other to W, the kernel the sum of them.
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if names and len(names) > 1 else 0)
    assert not torch.equal(merged[0], before[0])


def test_one_adapter_after_the_other_is_both_at_once(launches):
    model = adapted()
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    one_by_one = weights(model)
    model.unmerge_adapter()
    model.merge_adapter(["default", "other"])
    assert_equal(one_by_one, weights(model))
    assert len(launches) == 3


def test_a_refused_merge_leaves_nothing_behind(launches):
    model = adapted()
    before = weights(model)
    linears(model)[-1].factors("default").B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert launches
    assert_equal(weights(model), before)
    assert all(layer._ahead is None and not layer.merged for layer in linears(model))
    model.merge_adapter(["other"], safe_merge=True)
    assert all(layer.merged for layer in linears(model))


def test_weights_stored_the_other_way_round_have_launches_of_their_own(launches):
    model = adapted("gpt2")
    model.merge_adapter()
    assert launches == []
    for layer in linears(model):
        with torch.no_grad():
            delta = layer.get_delta_weight("default")
            assert torch.equal(layer.get_base_layer().weight, layer._original + delta)


def ask(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None]).logits


def test_switching_adapters_in_generation(launches, monkeypatch):
    model = adapted()
    ask(model)
    assert launches == []  # each layer makes its own when it is met first
    model.set_adapter("other")
    assert launches == [len(linears(model))]
    kept = {layer: composed_weights._entries[layer].weight for layer in linears(model)}
    answer = ask(model)
    assert all(composed_weights._entries[layer].weight is weight for layer, weight in kept.items())
    monkeypatch.undo()
    composed_weights.clear()
    torch.testing.assert_close(answer, ask(model), rtol=0, atol=0)
    model.set_adapter("default")
    assert not torch.allclose(answer, ask(model))


@pytest.mark.parametrize("why", ["training", "nothing was kept", "merged"])
def test_switching_without_use_for_the_weights_makes_none(why, launches):
    model = adapted()
    if why == "merged":
        model.merge_adapter()
    elif why == "training":
        ask(model)
        model.train()
    launches.clear()
    model.set_adapter("other")
    assert launches == []


def test_on_a_cpu_every_layer_is_left_to_itself():
    model = adapted()
    ask(model)
    if next(model.parameters()).device.type == "cpu":
        model.set_adapter("other")
        assert not any(layer in composed_weights._entries for layer in linears(model))
