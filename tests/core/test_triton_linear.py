"""The operator's Triton path against `blocked`, in Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch
from operands import Rows

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from dual_lora.core import blocked, dispatch
from dual_lora.core.blocked import Needs
from dual_lora.core.frozen import keys
from dual_lora.core.kernels import check as triton_check
from dual_lora.core.kernels import linear as triton_linear
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import PLAIN, Adapter, Factors, Form
from dual_lora.lab.gpu_trials import all_launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


HIRA = Form(magnitude="identity", direction="weight")


@pytest.mark.parametrize("kind", [Form(), Form(direction="frozen"), HIRA, PLAIN], ids=lambda form: form.direction)
@pytest.mark.parametrize("form", [lambda weight: weight, Rows], ids=["tensor", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_forward_and_backward_agree_with_the_blocks(dtype, form, kind):
    """P and Q are integers, so that no sign depends on a rounding. A weight may be a tensor, or be read by its rows."""
    T, O, I, r = 48, 100, 72, 8
    r2 = r if kind.trains_direction else 0
    factors = Factors(*(torch.randint(-2, 3, s, device=DEVICE).float() for s in ((r, I), (O, r), (r2, I), (O, r2))))
    if kind.direction == "frozen":
        C, D = keys(torch.tensor(-(2**40) + 11, device=DEVICE), O, I)
        factors = factors._replace(C=C, D=D)
    adapters = [Adapter(factors, torch.tensor(0.01, device=DEVICE), kind)]
    x, dy, weight = (torch.randn(s, device=DEVICE).to(dtype) for s in ((T, I), (T, O), (O, I)))
    needs = Needs(True, False, True)
    ours, theirs = (
        [f.forward(x, W, adapters), *(g for g in (b.x, *b.factors[0]))]
        for f, W in ((triton_linear, form(weight)), (blocked, weight))
        for b in [f.backward(dy, x, W, adapters, None, needs)]
    )
    for got, want in zip(ours, theirs, strict=True):
        limit = 1e-5 if dtype == torch.float32 else 4e-2
        assert got.shape == want.shape
        assert not got.numel() or (got.float() - want.float()).abs().max() <= limit * want.float().abs().max()


def test_backward_computes_only_what_is_needed():
    factors = Factors(torch.randn(2, 20), torch.randn(30, 2), torch.randn(2, 20), torch.randn(30, 2))
    adapters = [Adapter(Factors(*(f.to(DEVICE) for f in factors)), torch.tensor(1.0, device=DEVICE), Form())]
    x, dy = torch.randn(5, 20, device=DEVICE), torch.randn(5, 30, device=DEVICE)
    weight = torch.randn(30, 20, device=DEVICE)
    got = triton_linear.backward(dy, x, weight, adapters, None, Needs(False, True, False))
    assert got.x is None
    assert got.factors is None
    want = blocked.backward(dy, x, weight, adapters, None, Needs(False, True, False))
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-5, atol=1e-4)


def test_tensors_on_the_cpu_are_left_to_the_blocks(monkeypatch):
    def never(*args):
        raise AssertionError("the kernels were asked to compute on the CPU")

    monkeypatch.setattr(triton_linear, "forward", never)
    factors = Factors(torch.randn(2, 20), torch.randn(30, 2), torch.randn(2, 20), torch.randn(30, 2))
    dual_lora_linear(torch.randn(5, 20), torch.randn(30, 20), None, [Adapter(factors, torch.tensor(1.0), Form())])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", dispatch.DTYPES, ids=str)
def test_this_card_may_use_the_kernels(dtype):
    assert all(map(triton_check.is_correct, all_launches(DEVICE, dtype, [(16, 16, Form())])))
