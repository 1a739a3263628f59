"""A module called with other tensors in its parameters' places, by several threads."""

import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.method.replaced import replaced


def test_threads_take_turns_and_the_parameter_stays():
    """As two requests served at once by one model: without turns the first one's weight would stay for good."""
    linear = nn.Linear(3, 3, bias=False)
    parameter, x = linear.weight, torch.ones(1, 3)
    first_is_in, second_begins, results = threading.Event(), threading.Event(), {}

    def first():
        with replaced(linear, {"weight": torch.zeros(3, 3)}):
            first_is_in.set()
            second_begins.wait()
            second_ends.join(0.2)  # it waits for this block's end, or does not
            results["first"] = linear(x)

    def second():
        first_is_in.wait()
        second_begins.set()
        with replaced(linear, {"weight": torch.eye(3)}):
            first_ends.join(0.5)
            results["second"] = linear(x)

    first_ends, second_ends = threading.Thread(target=first), threading.Thread(target=second)
    for thread in (first_ends, second_ends):
        thread.start()
    for thread in (first_ends, second_ends):
        thread.join()
    assert linear.weight is parameter
    assert linear._parameters["weight"] is parameter
    assert torch.equal(results["first"], torch.zeros(1, 3))
    assert torch.equal(results["second"], x)


def test_one_thread_may_nest():
    linear = nn.Linear(3, 3)
    x, zeros = torch.ones(1, 3), torch.zeros(3)
    with replaced(linear, {"weight": torch.eye(3)}), replaced(linear, {"bias": zeros}):
        assert torch.equal(linear(x), x)
    assert isinstance(linear.weight, nn.Parameter)
    assert isinstance(linear.bias, nn.Parameter)


@pytest.mark.parametrize("kind", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_hook_that_writes_the_weight_in_every_call_is_an_error(kind):
    """Such a hook would put the base's weight in the place of W + ΔW, and the adapter would have no effect."""
    attention = nn.ModuleDict({"it": nn.MultiheadAttention(4, 2)})
    model = get_peft_model(attention, DualLoraConfig(target_modules=["it"], init_weights=False))
    layer, x = model.base_model.model["it"], torch.randn(3, 1, 4)
    layer(x, x, x)
    kind(layer.get_base_layer(), "in_proj_weight")
    with pytest.raises(RuntimeError, match="hook"):
        layer(x, x, x)


class Normed(nn.Linear):
    """A base with a forward of its own."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.weight


class Attention(nn.MultiheadAttention):
    """Called with one argument, as the other bases are."""

    def forward(self, x, *args, **kwargs):
        return super().forward(x, x, x)[0]


@pytest.mark.parametrize(
    ("base", "where", "call"),
    [
        (lambda: Normed(4, 4), dict(target_modules=["0"]), {}),
        (lambda: Normed(4, 4), dict(target_modules=["0"]), dict(adapter_names=["default"])),
        (lambda: Normed(4, 4), dict(target_modules=["0"]), dict(adapter_names=["__base__"])),
        (Matrix, dict(target_modules=[], target_parameters=["0.weight"]), {}),
        (lambda: Attention(4, 2, batch_first=True), dict(target_modules=["0"]), {}),
    ],
    ids=["own-forward", "mixed", "mixed-base", "parameter", "attention"],
)
def test_a_second_thread_reads_the_base_weight_and_not_the_first_ones(base, where, call):
    """Two threads that infer at once: the second one added its update to what the first one had composed."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(base()), DualLoraConfig(r=4, init_weights=False, **where)).eval()
    x, results = torch.randn(1, 3, 4), {}
    first_is_in, second_ends = threading.Event(), threading.Event()

    def infer(name):
        with torch.no_grad():
            results[name] = model(x, **(call if name != "first" else {}))

    def wait_inside(*_):
        if threading.current_thread() is first:
            first_is_in.set()
            second_ends.wait(0.3)  # it waits for this call's end, or does not

    def infer_inside():
        first_is_in.wait()
        infer("second")
        second_ends.set()

    infer("alone")
    first, second = threading.Thread(target=infer, args=("first",)), threading.Thread(target=infer_inside)
    model.base_model.model[0].get_base_layer().register_forward_pre_hook(wait_inside)
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join()
    torch.testing.assert_close(results["second"], results["alone"])
