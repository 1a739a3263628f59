"""What changes between forward and backward: the gradient is that of the forward pass, or an error; never of neither.

Only dx is asked for, as nothing else makes autograd look at the factors.
"""

import pytest
import torch
from peft import get_peft_model_state_dict
from reference_layer import adapted
from torch import nn

from dual_lora.method.hotswap import hotswap_from_state_dict

KINDS = {
    "linear": (nn.Linear(9, 12), lambda: torch.randn(2, 8, 9)),
    "convolution": (nn.Conv1d(8, 12, 3), lambda: torch.randn(2, 8, 9)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), lambda: torch.randn(2, 5, 8)),
}


def swap_in(rank, model, layer):
    base = next(base for base, _ in KINDS.values() if type(base) is type(layer.base_layer))
    other, _ = adapted(base, call, r=rank)
    hotswap_from_state_dict(model, get_peft_model_state_dict(other), "default", other.peft_config["default"])


CHANGES = {
    "a swap": lambda model, layer: swap_in(4, model, layer),
    "a larger swap": lambda model, layer: swap_in(6, model, layer),
    "a factor": lambda model, layer: layer.dual_lora_B["default"].mul_(-3),
    "the base": lambda model, layer: next(p for p in layer.base_layer.parameters() if p.ndim > 1).mul_(-3),
    "another state": lambda model, layer: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}),
    "a merge": lambda model, layer: model.merge_adapter(),
}


def call(layer, x):
    return layer(x, x, x)[0] if isinstance(layer.base_layer, nn.MultiheadAttention) else layer(x)


def gradient(kind, between=None, frozen=False, merged=False):
    torch.manual_seed(0)
    base, points = KINDS[kind]
    model, layer = adapted(base, call, warmup_steps=0 if merged else 4)
    layer.set_left("default", 0 if merged else 2)
    model.requires_grad_(not frozen)
    if merged:
        model.merge_adapter()
    x = points().requires_grad_()
    loss = model(x).square().sum()
    if between is not None:
        with torch.no_grad():
            between(model, layer)
    return torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_an_error(change, kind, frozen):
    assert gradient(kind, frozen=frozen).any()
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        gradient(kind, CHANGES[change], frozen)


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_is_an_error_too(kind):
    assert gradient(kind, merged=True).any()
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        gradient(kind, lambda model, layer: model.unmerge_adapter(), merged=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_set_by_hand_comes_after_both(kind):
    want = gradient(kind)
    assert torch.equal(gradient(kind, lambda model, layer: layer.set_scale("default", 5.0)), want)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_written_to_gives_an_error_or_the_right_gradient(kind):
    """`x += layer(x)`. Where the composed weight is made again in backward, autograd itself does not look at x."""
    torch.manual_seed(0)
    base, points = KINDS[kind]
    model, layer = adapted(base, call)
    x = points().requires_grad_()

    def gradients(is_written_to):
        inner = x * 1
        loss = model(inner).square().sum()
        if is_written_to:
            with torch.no_grad():
                inner += 1
        return torch.autograd.grad(loss, [x, *layer.trainable_factors("default")])

    right = gradients(is_written_to=False)
    try:
        got = gradients(is_written_to=True)
    except RuntimeError as error:
        got, message = right, str(error)
    else:
        message = "modified by an in-place operation"
    torch.testing.assert_close(got, right)
    assert "modified by an in" in message
