"""A module called with other tensors in its parameters' places, by several threads."""

import threading

import torch
from torch import nn

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
