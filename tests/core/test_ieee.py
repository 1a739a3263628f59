"""The factor products stay in true fp32 in whichever of PyTorch's two ways TF32 was chosen, and the choice stays."""

import threading

import pytest
import torch

from dual_lora import Adapter, Factors, Form, dual_lora_linear
from dual_lora.core import ieee
from dual_lora.core.ieee import ieee_fp32, wants_tf32

CUDA, CPU = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
new_way = pytest.mark.skipif(not hasattr(CUDA, "fp32_precision"), reason="torch before 2.9 knows one way")


@pytest.fixture(autouse=True)
def untouched():
    """Nothing chosen before, nothing left afterwards."""

    def nothing_chosen():
        torch.set_float32_matmul_precision("highest")
        if hasattr(CUDA, "fp32_precision"):
            torch.backends.fp32_precision = CUDA.fp32_precision = CPU.fp32_precision = "none"

    nothing_chosen()
    yield
    nothing_chosen()


def test_the_older_way():
    torch.set_float32_matmul_precision("high")
    assert wants_tf32()
    with ieee_fp32():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"


@new_way
def test_the_newer_way_for_all():
    torch.backends.fp32_precision = "tf32"  # transformers' TrainingArguments(tf32=True)
    assert wants_tf32()
    with ieee_fp32():
        assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee")
    assert (CUDA.fp32_precision, CPU.fp32_precision) == ("tf32", "tf32")
    torch.backends.fp32_precision = "ieee"
    assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee"), "they follow the choice for all no more"
    assert not wants_tf32()


@new_way
@pytest.mark.parametrize(("backend", "choice"), [(CUDA, "tf32"), (CPU, "tf32"), (CPU, "bf16")])
def test_the_newer_way_for_one(backend, choice):
    backend.fp32_precision = choice
    before = CUDA.fp32_precision, CPU.fp32_precision
    with ieee_fp32():
        assert (CUDA.fp32_precision, CPU.fp32_precision) == ("ieee", "ieee")
    assert (CUDA.fp32_precision, CPU.fp32_precision) == before


@new_way
def test_a_layer_trains_after_the_newer_way():
    torch.backends.fp32_precision = "tf32"
    factors = Factors(*(torch.randn(s, requires_grad=True) for s in [(2, 5), (6, 2), (2, 5), (6, 2)]))
    y = dual_lora_linear(torch.randn(3, 5), torch.randn(6, 5), None, [Adapter(factors, torch.tensor(1.0), Form())])
    y.sum().backward()
    assert all(f.grad is not None for f in factors)


def test_the_choice_is_put_back_by_the_last_thread():
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ieee_fp32():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    entered.wait()
    with ieee_fp32():
        leave.set()
        thread.join()
        assert torch.get_float32_matmul_precision() == "highest", "the other thread took it away"
    assert torch.get_float32_matmul_precision() == "high"


def test_a_thread_that_comes_while_another_one_switches_does_not_take_its_choice_for_the_users(monkeypatch):
    """It would compute without a block of its own, and the other thread would put the user's choice back meanwhile."""
    torch.set_float32_matmul_precision("high")
    switch, seen = ieee._switch, []

    def comes():
        seen.append((torch.get_float32_matmul_precision(), ieee.ieee_fp32() is ieee._NOTHING))

    def switches():
        undo = switch()
        comes()
        return lambda: (comes(), undo(), comes())

    monkeypatch.setattr(ieee, "_switch", switches)
    with ieee.ieee_fp32():
        comes()
    comes()
    assert seen == [("highest", False)] * 3 + [("high", False)] * 2
