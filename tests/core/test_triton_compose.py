"""The compose kernel against the judge, in Triton's interpreter, or on the GPU where there is one.

P and Q of `make_case` are exact in fp32, zeros among them, so the kernel has to give the very bits of plain PyTorch.
"""

import pytest
import torch
from formula import make_case
from numerics import assert_relative_rule

pytest.importorskip("triton", minversion="3.3", reason="the Triton kernels need triton 3.3 or later")

from dual_lora.core.blocked import Adapter
from dual_lora.core.reference import Factors, Form, delta_weight
from dual_lora.core.triton_compose import Int8, Nf4, compose

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = [Form(magnitude=m, direction=d) for m in ("relu", "identity") for d in ("sign", "identity")]
# The interpreter's bf16 rounds wrongly; a GPU's does not.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


PAPER = Form()


def inputs(O=63, I=100, ranks=((3, 5),), forms=(PAPER,), low=torch.float32, seed=0):
    case = make_case(T=1, O=O, I=I, ranks=ranks, low=low, seed=seed)
    adapters = [
        Adapter(Factors(*(f.to(DEVICE) for f in four)), torch.tensor(s, device=DEVICE), form)
        for four, s, form in zip(case.factors, case.scales, forms, strict=True)
    ]
    return case.weight.to(DEVICE), adapters


def plain(weight, adapters, dtype):
    total = sum(delta_weight(a.factors, a.scale, a.form) for a in adapters)
    return (total if weight is None else weight.float() + total).to(dtype)


def assert_same(got, want):
    assert got.dtype == want.dtype
    assert torch.equal(got, want), f"{(got != want).sum()} of {got.numel()} entries differ"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(form, dtype):
    weight, adapters = inputs(forms=[form], low=dtype)
    assert_same(compose(weight, adapters), plain(weight, adapters, dtype))


@pytest.mark.parametrize("ranks", [(1, 1), (3, 16), (16, 40), (65, 2)], ids=str)
def test_ranks(ranks):
    weight, adapters = inputs(ranks=[ranks])
    assert_same(compose(weight, adapters), plain(weight, adapters, torch.float32))


@pytest.mark.parametrize(("O", "I"), [(1, 1), (1, 130), (130, 1), (64, 64), (65, 129)])
def test_shapes(O, I):
    weight, adapters = inputs(O, I)
    assert_same(compose(weight, adapters), plain(weight, adapters, torch.float32))


def test_real_numbers_by_the_relative_rule():
    weight, [adapter] = inputs(ranks=[(16, 40)])
    factors = adapter.factors._replace(
        A=torch.randn(16, 100, device=DEVICE), B=torch.randn(63, 16, device=DEVICE) / 4
    )  # Q stays exact, so the signs agree; ΔW is continuous in P
    adapter = adapter._replace(factors=factors)
    truth = weight.double() + delta_weight(Factors(*(f.double() for f in factors)), adapter.scale.double())
    named = {"W": compose(weight, [adapter])}, {"W": plain(weight, [adapter], torch.float32)}, {"W": truth}
    assert_relative_rule(*named)


def test_delta_alone_and_the_output_dtype():
    weight, adapters = inputs()
    assert_same(compose(None, adapters), plain(None, adapters, torch.float32))
    assert_same(compose(None, adapters, torch.float16), plain(None, adapters, torch.float16))
    assert_same(compose(weight, adapters, torch.float16), plain(weight, adapters, torch.float16))


def test_several_adapters_round_once():
    weight, adapters = inputs(ranks=[(3, 5), (16, 1), (2, 9)], forms=FORMS[:3], low=torch.float16)
    assert_same(compose(weight, adapters), plain(weight, adapters, torch.float16))


def test_in_place():
    weight, adapters = inputs()
    want = plain(weight, adapters, torch.float32)
    assert compose(weight, adapters, out=weight) is weight
    assert_same(weight, want)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(layout):
    weight, adapters = inputs()
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    else:
        weight = torch.stack([weight, weight], -1).flatten(1)[:, ::2]
    assert not weight.is_contiguous()
    want = plain(weight, adapters, torch.float32)
    assert_same(compose(weight, adapters), want)
    compose(weight, adapters, out=weight)
    assert_same(weight, want)


def test_factors_of_any_strides():
    weight, [adapter] = inputs()
    turned = adapter._replace(factors=Factors(*(f.t().contiguous().t() for f in adapter.factors)))
    assert_same(compose(weight, [turned]), plain(weight, [adapter], torch.float32))


def test_a_batch_of_experts():
    weights, stacks = zip(*(inputs(seed=seed) for seed in range(3)), strict=True)
    factors = Factors(*(torch.stack(f) for f in zip(*(s[0].factors for s in stacks), strict=True)))
    want = torch.stack([plain(w, s, torch.float32) for w, s in zip(weights, stacks, strict=True)])
    got = compose(torch.stack(weights), [stacks[0][0]._replace(factors=factors)])
    assert_same(got, want)


def test_nan_stays_nan():
    weight, [adapter] = inputs()
    adapter.factors.B[5] = float("nan")
    got = compose(weight, [adapter])
    assert got[5].isnan().all()
    assert not got[:5].isnan().any()


@pytest.mark.parametrize("blocksize", [32, 64])
@pytest.mark.parametrize(("O", "I"), [(63, 100), (8, 64)])
def test_nf4_base(O, I, blocksize):
    _, adapters = inputs(O, I)
    nibbles = torch.randint(0, 16, (O * I,), device=DEVICE)
    code = torch.linspace(-1, 1, 16, device=DEVICE)
    absmax = torch.rand(-(-O * I // blocksize), device=DEVICE)
    even = torch.nn.functional.pad(nibbles, (0, O * I % 2))
    packed = (even[::2] << 4 | even[1::2]).to(torch.uint8)[:, None]
    dense = (code[nibbles] * absmax.repeat_interleave(blocksize)[: O * I]).view(O, I)
    base = Nf4(packed, absmax, code, blocksize, torch.Size((O, I)))
    assert_same(compose(base, adapters, torch.float16), plain(dense, adapters, torch.float16))


def test_nf4_as_bitsandbytes_packs_it():
    functional = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes").functional
    weight, adapters = inputs(64, 128)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    dense = functional.dequantize_4bit(packed, state)
    base = Nf4(packed, state.absmax, state.code, state.blocksize, state.shape)
    assert_same(compose(base, adapters), plain(dense, adapters, torch.float32))


def test_int8_base():
    _, adapters = inputs()
    values = torch.randint(-127, 128, (63, 100), device=DEVICE).to(torch.int8)
    scale = torch.rand(63, device=DEVICE)
    want = plain(values.float() * scale[:, None], adapters, torch.float32)
    assert_same(compose(Int8(values, scale), adapters), want)


def test_what_does_not_fit_is_refused():
    weight, [adapter] = inputs()
    with pytest.raises(ValueError, match="no adapter"):
        compose(weight, [])
    with pytest.raises(ValueError, match=r"weight has shape \(62, 100\)"):
        compose(weight[1:], [adapter])
    with pytest.raises(ValueError, match="float16"):
        compose(weight, [adapter._replace(factors=Factors(*(f.half() for f in adapter.factors)))])
    with pytest.raises(ValueError, match="do not fit together"):
        compose(weight, [adapter._replace(factors=adapter.factors._replace(D=adapter.factors.D[:, 1:]))])
    with pytest.raises(ValueError, match="Unknown direction"):
        compose(weight, [adapter._replace(form=Form(direction="up"))])
    with pytest.raises(ValueError, match="bytes"):
        compose(Nf4(weight.byte(), weight[0], weight[0], 64, weight.shape), [adapter])
