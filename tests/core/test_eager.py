"""Eager mode takes a plain autograd function; whoever wants to see the operator sees it."""

from functools import partial

import pytest
import torch
from formula import make_case, operator, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dual_lora.core import whole
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form

OPS = torch.ops.dual_lora


def inputs(T=7, I=20, O=30, r=3):
    factors = Factors(*(torch.randn(s).requires_grad_() for s in ((r, I), (O, r), (r, I), (O, r))))
    x = torch.randn(T, I).requires_grad_()
    return x, torch.randn(O, I), factors, [Adapter(factors, torch.tensor(0.5), Form())]


class Seen(TorchDispatchMode):
    """Notes the operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dual_lora":
            self.names.append(str(function))
        return function(*args, **kwargs or {})


def is_plain(y):
    return type(y.grad_fn).__name__ == "_LinearBackward"


def test_eager_mode_does_not_pass_the_dispatcher():
    x, W, _, adapters = inputs()
    assert is_plain(dual_lora_linear(x, W, None, adapters))


def test_the_operator_and_the_plain_function_give_the_same_bits():
    case = make_case(T=20, O=143, ranks=((3, 5), (2, 2)))
    plain = run(operator, case)
    with Seen() as seen:
        watched = run(operator, case)
    assert seen.names == ["dual_lora.linear.default", "dual_lora.linear_backward.default"]
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("forward", [True, False])
def test_each_pass_asks_for_itself_who_watches(forward):
    x, W, factors, adapters = inputs()
    seen = Seen()
    if forward:
        with seen:
            y = dual_lora_linear(x, W, None, adapters)
        y.sum().backward()
    else:
        y = dual_lora_linear(x, W, None, adapters)
        with seen:
            y.sum().backward()
    assert seen.names == ["dual_lora.linear.default" if forward else "dual_lora.linear_backward.default"]
    assert factors.A.grad.any()


def test_a_tensor_that_sees_operators_gets_the_operator():
    class Watching(torch.Tensor):
        pass

    x, W, _, adapters = inputs()
    assert not is_plain(dual_lora_linear(x.detach().as_subclass(Watching), W, None, adapters))


def test_tracing_records_the_operator():
    x, W, factors, _ = inputs()
    adapters = [Adapter(Factors(*(f.detach() for f in factors)), torch.tensor(0.5), Form())]
    traced = torch.jit.trace(lambda x: dual_lora_linear(x, W, None, adapters), x.detach(), check_trace=False)
    assert "dual_lora::linear" in str(traced.graph)


@pytest.mark.parametrize("kept", [True, False])
def test_selective_checkpointing_keeps_the_operator_that_it_names(kept, monkeypatch):
    x, W, factors, adapters = inputs()
    calls, forward = [], whole.forward
    monkeypatch.setattr(whole, "forward", lambda *a: (calls.append(1), forward(*a))[1])
    block = lambda x: dual_lora_linear(x, W, None, adapters).tanh()  # noqa: E731
    want = torch.autograd.grad(block(x).sum(), (x, *factors))
    calls.clear()
    names = [OPS.linear.default] if kept else []
    contexts = partial(create_selective_checkpoint_contexts, names)
    y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    got = torch.autograd.grad(y.sum(), (x, *factors))
    assert len(calls) == (1 if kept else 2)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("first", [True, False])
def test_checkpointing_with_a_mode_in_one_of_the_two_passes(first):
    """What is saved has the same order in both ways, so that the second pass finds the place of each."""
    x, W, factors, adapters = inputs()
    block = lambda x: dual_lora_linear(x, W, None, adapters).tanh()  # noqa: E731
    want = torch.autograd.grad(block(x).sum(), (x, *factors))
    if first:
        with Seen():
            y = checkpoint(block, x, use_reentrant=False)
        got = torch.autograd.grad(y.sum(), (x, *factors))
    else:
        y = checkpoint(block, x, use_reentrant=False)
        with Seen():
            got = torch.autograd.grad(y.sum(), (x, *factors))
    assert all(map(torch.equal, got, want))


def test_saved_tensors_may_be_moved_away():
    x, W, factors, adapters = inputs()
    want = torch.autograd.grad(dual_lora_linear(x, W, None, adapters).sum(), (x, *factors))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone().numpy(force=True), torch.from_numpy):
        y = dual_lora_linear(x, W, None, adapters)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), (x, *factors)), want))


def test_a_factor_written_to_before_backward_is_noticed():
    x, W, factors, adapters = inputs()
    y = dual_lora_linear(x, W, None, adapters)
    with torch.no_grad():
        factors.B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_gradients_nothing_is_recorded():
    x, W, _, adapters = inputs()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert dual_lora_linear(x, W, None, adapters).grad_fn is None
