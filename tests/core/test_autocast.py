"""Which precision a product has: the weight's, or autocast's, and what is shut out of it."""

from contextlib import nullcontext

import pytest
import torch
from formula import make_case, operator, run
from torch.autograd import forward_ad

from dual_lora.core.dispatch import autocast_dtype, in_dtype_of, without_autocast

CPU = torch.device("cpu")
BF16, FP32, FP64, FP8, UINT8 = torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8


@pytest.mark.parametrize(
    ("weight", "x", "autocast", "wanted"),
    [
        (FP32, BF16, False, FP32),
        (BF16, FP32, False, BF16),
        (FP64, FP32, False, FP64),
        (FP8, BF16, False, BF16),  # it is no precision to compute in
        (UINT8, FP32, False, FP32),  # four bits, packed
        (BF16, FP32, True, FP32),  # autocast will choose
        (FP32, FP64, True, FP32),  # which leaves fp64 alone
    ],
)
def test_an_input_takes_the_weights_precision(weight, x, autocast, wanted):
    with torch.autocast("cpu", BF16, enabled=autocast):
        assert in_dtype_of(torch.empty(2, dtype=weight), torch.empty(2, dtype=x)).dtype == wanted


def test_what_autocast_computes_in():
    meta = torch.device("meta")
    assert autocast_dtype(CPU) is autocast_dtype(meta) is None
    with torch.autocast("cpu", BF16):
        assert autocast_dtype(CPU) == autocast_dtype(CPU, FP32) == BF16
        assert autocast_dtype(CPU, FP64) is autocast_dtype(meta) is None
        with without_autocast(CPU):
            assert autocast_dtype(CPU) is None
        assert isinstance(without_autocast(meta), nullcontext)
    assert isinstance(without_autocast(CPU), nullcontext)  # nothing to enter, in every layer


def test_forward_mode_elsewhere_does_not_matter():
    case = make_case(T=8, O=6, I=5)
    with forward_ad.dual_level():
        assert run(operator, case)["y"].equal(run(operator, case)["y"])
