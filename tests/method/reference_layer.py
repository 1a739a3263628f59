"""The reference for every kind of layer: PyTorch's own module with W + ΔW of `core.reference` in the weight's place."""

import copy

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from dual_lora import DualLoraConfig
from dual_lora.core.reference import Factors, delta_weight


class Holder(nn.Module):
    """A model of one layer, called "it"."""

    def __init__(self, layer, call):
        super().__init__()
        self.it, self.call = layer, call

    def forward(self, x, **kwargs):
        return self.call(self.it, x, **kwargs)


def call_plainly(layer, x, **kwargs):
    return layer(x, **kwargs)


def adapted(base, call=call_plainly, adapter="default", **options):
    """(peft model, its adapted layer) over a copy of `base`, with visible random factors."""
    start = {"init_weights": "paper", "init_std": 0.3} if options.get("warmup_steps") else {"init_weights": False}
    options = {"target_modules": ["it"], "r": 4, **start, **options}
    model = get_peft_model(Holder(copy.deepcopy(base), call), DualLoraConfig(**options), adapter_name=adapter)
    return model, model.base_model.model.it


def leaves(layer, adapter="default"):
    """Detached copies of the factors that take gradients."""
    return Factors(*(f.detach().clone().requires_grad_() for f in layer.factors(adapter)))


def delta(layer, factors, adapter="default"):
    """ΔW of the reference as a matrix."""
    return delta_weight(factors, layer.dual_lora_scale[adapter], layer.states[adapter].form)


def expect(base, weights, x, call=call_plainly):
    """Output of the plain module with these weights in the places of its own."""
    holder = Holder(base, call)
    return functional_call(holder, {f"it.{name}": w for name, w in weights.items()}, (x,))


def first(output):
    return output[0] if isinstance(output, tuple) else output


def assert_matches_reference(base, x, weights_of, call=call_plainly, atol=2e-5, **options):
    """Value and every gradient of the adapted layer against the reference.

    weights_of(base, layer, factors) gives {parameter name: W + ΔW}, made from factors that take gradients.
    """
    model, layer = adapted(base, call, **options)
    model.train()
    x_ours, x_theirs = x, x
    if x.is_floating_point():
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = first(model(x_ours))
    factors = leaves(layer)
    expected = first(expect(base, weights_of(base, layer, factors), x_theirs, call))
    torch.testing.assert_close(y, expected, atol=atol, rtol=1e-4, msg=lambda m: f"output: {m}")
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    for name, ours, theirs in zip("ABCD", layer.factors("default"), factors, strict=True):
        assert theirs.grad.any(), f"the reference has no gradient of {name}"
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"gradient of {name}: {m}"
        )
    if x.is_floating_point():
        torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=atol, rtol=1e-4, msg=lambda m: f"dx: {m}")
    return model, layer


def assert_merges_exactly(base, x, call=call_plainly, atol=2e-5, **options):
    """merge = forward, in any order; unmerge brings every bit back; so do unloading and merging in one go."""
    model, _ = adapted(base, call, **options)
    config = DualLoraConfig(**{"target_modules": ["it"], "init_weights": False, "r": 6, **options, "r": 6})  # noqa: F601
    model.add_adapter("other", config)
    model.eval()
    model.base_model.set_adapter(["default", "other"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        unmerged = first(model(x))
        model.merge_adapter()
        merged = first(model(x))
        torch.testing.assert_close(merged, unmerged, atol=atol, rtol=1e-4)
        assert not torch.equal(merged, first(base_output(base, x, call)))
        batch = {k: v.clone() for k, v in model.state_dict().items()}
        model.unmerge_adapter()
        assert_same_bits(model.state_dict(), before)
        model.merge_adapter(["other"])
        model.merge_adapter(["default"])
        assert_same_bits(model.state_dict(), batch)
        model.unmerge_adapter()
        assert_same_bits(model.state_dict(), before)
        plain = copy.deepcopy(model).merge_and_unload()
        assert type(plain.it) is type(base)
        assert torch.equal(first(plain(x)), merged)
        unloaded = copy.deepcopy(model).unload()
        assert_same_bits(unloaded.it.state_dict(), base.state_dict())


def base_output(base, x, call):
    base = copy.deepcopy(base).eval()
    with torch.no_grad():
        return call(base, x)


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), f"{key} has changed"


def assert_survives_saving(base, x, folder, call=call_plainly, **options):
    """Saved and loaded, the adapter gives the same bits, and only its own tensors are in the file."""
    model, _ = adapted(base, call, **options)
    model.eval()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(Holder(copy.deepcopy(base), call), folder).eval()
    with torch.no_grad():
        assert torch.equal(first(loaded(x)), first(model(x)))
