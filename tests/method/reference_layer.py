"""The reference for every kind of layer: PyTorch's own module with W + ΔW of `core.reference` in the weight's place."""

import copy

import torch
from peft import get_peft_model
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


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), f"{key} has changed"
