"""The compose kernel against the reference implementation, in Triton's interpreter, or on the GPU where there is one.

P and Q of `make_case` are exact in fp32, zeros among them, so the kernel has to give the very bits of plain PyTorch.
"""

import pytest
import torch
from formula import make_case
from numerics import assert_relative_rule

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from dual_lora.core.frozen import keys
from dual_lora.core.kernels.compose import compose
from dual_lora.core.reference import PLAIN, Adapter, Factors, Form, delta_weight

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


FROZEN, OF_WEIGHT = Form(direction="frozen"), Form(magnitude="identity", direction="weight")


def without_a_direction(adapter, form, seed=1):
    """The same with no direction that trains: frozen signs, the weight's entries, or none."""
    A, B, *_ = adapter.factors
    O, I = B.shape[-2], A.shape[-1]
    C, D = A.new_empty(*A.shape[:-2], 0, I), B.new_empty(*B.shape[:-1], 0)
    if form.direction == "frozen":
        seeds = torch.full(B.shape[:-2], seed, dtype=torch.int64, device=B.device)
        C, D = keys(seeds if seeds.ndim else seeds.reshape(()), O, I)
    return adapter._replace(factors=Factors(A, B, C, D), form=form)


@pytest.mark.parametrize("form", [FROZEN, OF_WEIGHT, PLAIN], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forms_without_a_direction_of_their_own(form, dtype):
    weight, adapters = inputs(ranks=[(3, 5), (4, 2)], forms=[PAPER, PAPER], low=dtype)
    both = [without_a_direction(adapters[0], form), adapters[1]]
    assert_same(compose(weight, both), plain(weight, both, dtype))
    turned = weight.t().contiguous().t()
    assert_same(compose(turned, both), plain(weight, both, dtype))
    assert_same(compose(turned, both, out=turned), plain(weight, both, dtype))


def test_frozen_signs_of_experts():
    weights, stacks = zip(*(inputs(seed=seed) for seed in range(3)), strict=True)
    A, B, *_ = (torch.stack(f) for f in zip(*(s[0].factors for s in stacks), strict=True))
    C, D = keys(torch.tensor([5, -6, 7], device=DEVICE), 63, 100)
    adapter = stacks[0][0]._replace(factors=Factors(A, B, C, D), form=FROZEN)
    each = [adapter._replace(factors=Factors(A[e], B[e], C[e], D[e])) for e in range(3)]
    want = torch.stack([plain(w, [a], torch.float32) for w, a in zip(weights, each, strict=True)])
    assert_same(compose(torch.stack(weights), [adapter]), want)


def test_an_update_that_multiplies_the_weight_needs_it():
    _, [adapter] = inputs()
    with pytest.raises(ValueError, match='direction "weight" needs the weight'):
        compose(None, [without_a_direction(adapter, OF_WEIGHT)])


def plain(weight, adapters, dtype):
    wide = None if weight is None else weight.float()
    total = sum(delta_weight(a.factors, a.scale, a.form, weight=wide) for a in adapters)
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


@pytest.mark.parametrize("routed", [None, [2, 0], []], ids=["all", "routed", "none"])
def test_experts(routed):
    weights, stacks = zip(*(inputs(seed=seed) for seed in range(3)), strict=True)
    factors = Factors(*(torch.stack(f) for f in zip(*(s[0].factors for s in stacks), strict=True)))
    batch, adapter = torch.stack(weights), stacks[0][0]._replace(factors=factors)
    want = torch.stack([plain(w, s, torch.float32) for w, s in zip(weights, stacks, strict=True)])
    if routed is None:
        assert_same(compose(batch, [adapter]), want)
    else:
        want[[e for e in range(3) if e not in routed]] = 7  # nobody asked for them
        chosen = torch.tensor(routed, dtype=torch.int64, device=DEVICE)
        assert_same(compose(batch, [adapter], out=torch.full_like(batch, 7), routed=chosen), want)


def test_nan_stays_nan():
    weight, [adapter] = inputs()
    adapter.factors.B[5] = float("nan")
    got = compose(weight, [adapter])
    assert got[5].isnan().all()
    assert not got[:5].isnan().any()


def test_what_does_not_fit_is_refused():
    weight, [adapter] = inputs()
    with pytest.raises(ValueError, match="no adapter"):
        compose(weight, [])
    with pytest.raises(ValueError, match=r"weight has shape \(62, 100\)"):
        compose(weight[1:], [adapter])
    with pytest.raises(ValueError, match="float16"):
        compose(weight, [adapter._replace(factors=Factors(*(f.half() for f in adapter.factors)))])
    with pytest.raises(ValueError, match="do not fit a weight"):
        compose(weight, [adapter._replace(factors=adapter.factors._replace(D=adapter.factors.D[:, 1:]))])
    with pytest.raises(ValueError, match="Unknown direction"):
        compose(weight, [adapter._replace(form=Form(direction="up"))])
