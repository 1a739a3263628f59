"""Working memory that calls share: nothing that a caller gets lies in it, and no call sees another's."""

import threading

import pytest
import torch

from dual_lora.core import blocked, scratch, whole
from dual_lora.core.blocked import Needs
from dual_lora.core.reference import Adapter, Factors, Form

EVERYTHING = Needs(True, True, True)


@pytest.fixture(autouse=True)
def even_small_ones(monkeypatch):
    monkeypatch.setattr(scratch, "SMALLEST", 0)


def results(module, case):
    """Everything that the functions of a module return for a case."""
    x, dy, weight, adapters = case
    grads = module.backward(dy, x, weight, adapters, None, EVERYTHING)
    composed = [module.compose(weight, adapters, dtype) for dtype in (torch.float32, torch.bfloat16)]
    made = [module.forward(x, weight, adapters), module.forward(x, None, adapters), *composed, grads.x, grads.weight]
    alone = module.factor_gradients(grads.weight, adapters, None)
    return [*made, *(f for each in (*grads.factors, *alone) for f in each)]


def case(seed, O=33, I=47):
    generator = torch.Generator().manual_seed(seed)
    x, dy, weight = (torch.randn(*s, generator=generator) for s in ((9, I), (9, O), (O, I)))
    shapes = (3, I), (O, 3), (3, I), (O, 3)
    factors = [[torch.randn(*s, generator=generator) for s in shapes] for _ in range(2)]
    return x, dy, weight, [Adapter(Factors(*f), torch.tensor(0.5), Form(), None) for f in factors]


@pytest.mark.parametrize("module", [whole, blocked])
def test_nothing_that_is_returned_lies_in_the_buffers(module):
    found = results(module, case(0))
    kept = [t.clone() for t in found]
    results(module, case(1))
    for flat in scratch._buffers.buffers.values():
        flat.fill_(float("nan"))
    assert all(map(torch.equal, found, kept))


@pytest.mark.parametrize("module", [whole, blocked])
def test_results_do_not_depend_on_what_was_there(module):
    first = results(module, case(0))
    results(module, case(2, 60, 20))
    for flat in scratch._buffers.buffers.values():
        flat.fill_(float("nan"))
    assert all(map(torch.equal, results(module, case(0)), first))


def test_buffers_made_in_inference_mode_serve_training(monkeypatch):
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())
    with torch.inference_mode():
        results(whole, case(0))
    assert not any(flat.is_inference() for flat in scratch._buffers.buffers.values())
    results(whole, case(0))


def test_each_thread_has_its_own():
    expected, found = results(whole, case(0)), []

    def go():
        results(whole, case(0))  # by which PyTorch gives a new thread the number of threads that MKL's last bits go by
        for _ in range(50):
            found.append(all(map(torch.equal, results(whole, case(0)), expected)))

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def test_large_buffers_are_not_kept(monkeypatch):
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())
    monkeypatch.setattr(scratch, "LARGEST", 1000)
    results(blocked, case(0))
    assert not scratch._buffers.buffers
