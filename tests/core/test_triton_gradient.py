"""The gradient kernel against the independent formula, in Triton's interpreter, or on the GPU where there is one."""

import pytest
import torch
from formula import FORMS, expected, make_case, name_of
from numerics import assert_close, assert_relative_rule

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from dual_lora.core.kernels.gradient import factor_gradients
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight, product_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])


def adapters_of(case):
    return [
        Adapter(Factors(*(f.to(DEVICE) for f in four)), torch.tensor(s, device=DEVICE), Form(**form))
        for four, s, form in zip(case.factors, case.scales, case.forms, strict=True)
    ]


def named(gradients):
    return {f"{n}{k}": g.cpu() for k, four in enumerate(gradients) for n, g in zip("ABCD", four, strict=True)}


def ours(case, **options):
    loss_scale = None if case.loss_scale is None else torch.tensor(case.loss_scale, device=DEVICE)
    dy, x = case.dy.to(DEVICE), case.x.to(DEVICE)
    return named(factor_gradients(dy, x, adapters_of(case), loss_scale, **options))


def truth(case):
    return {name: g for name, g in expected(case)[1].items() if name[0] in "ABCD"}


def plain(case):
    """Plain PyTorch in fp32 on the same inputs, for one adapter."""
    (A, B, C, D), scale, form = case.factors[0], case.scales[0], Form(**case.forms[0])
    dP, dQ = product_gradients(case.dy.float().T @ case.x.float(), B @ A, D @ C, scale, form, case.loss_scale)
    return named([Factors(B.T @ dP, dP @ A.T, D.T @ dQ, dQ @ C.T)])


@both_ways
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_every_form(form, deterministic):
    """In a part of one tile: several tiles, below, know no form."""
    case = make_case(T=33, O=20, I=40, forms=[form])
    assert_close(ours(case, deterministic=deterministic), truth(case), torch.float32, name_of(form))


@both_ways
@pytest.mark.parametrize("ranks", [(1, 3), (3, 16), (16, 40), (40, 1)], ids=str)
def test_ranks(ranks, deterministic):
    case = make_case(T=20, O=63, I=100, ranks=[ranks])
    got = ours(case, deterministic=deterministic)
    assert_relative_rule(got, plain(case), truth(case), f"ranks {ranks}")


@pytest.mark.slow
def test_rank_256():
    case = make_case(T=20, O=20, I=40, ranks=[(256, 200)])
    assert_relative_rule(ours(case), plain(case), truth(case))


@pytest.mark.parametrize(("T", "O", "I"), [(1, 63, 200), (100, 200, 63), (64, 1, 100), (31, 100, 1), (32, 64, 64)])
def test_shapes(T, O, I):
    case = make_case(T=T, O=O, I=I)
    assert_relative_rule(ours(case), plain(case), truth(case), f"T {T}, {O}x{I}")


@pytest.mark.parametrize("form", FORMS[::5], ids=name_of)
def test_half_precision_inputs(form):
    case = make_case(T=33, O=20, I=40, low=torch.float16, forms=[form])
    if DEVICE == "cpu":
        assert_relative_rule(ours(case), plain(case), truth(case), name_of(form))
    # On the matrix units ∂P, ∂Q and the factors have 11 bits, as the inputs do.
    lowered = {name: g.half() for name, g in plain(case).items()}
    assert_relative_rule(ours(case), lowered, truth(case), name_of(form))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's bf16 is wrong: this needs a GPU")
def test_bf16_inputs():
    case = make_case(T=2048, O=577, I=1000, ranks=[(16, 16)], low=torch.bfloat16)
    lowered = {name: g.bfloat16() for name, g in plain(case).items()}
    assert_relative_rule(ours(case), lowered, truth(case))


def test_real_factors_by_the_relative_rule():
    case = make_case(T=33, O=63, I=100, ranks=[(16, 40)])
    A, B, C, D = case.factors[0]
    A, B = torch.randn_like(A), torch.randn_like(B)  # Q stays exact
    P = B.double() @ A.double()
    assert P.abs().min() > 1e-5  # so that fp32 agrees on the mask
    case = case._replace(factors=[(A, B, C, D)], forms=[{"ste": "identity"}])
    assert_relative_rule(ours(case), plain(case), truth(case))


@pytest.mark.parametrize("layout", ["transposed", "strided", "broadcast"])
def test_any_strides(layout):
    case = make_case(T=33, O=63, I=100)
    if layout == "transposed":
        case = case._replace(dy=case.dy.T.contiguous().T, x=case.x.T.contiguous().T)
    elif layout == "strided":
        case = case._replace(dy=case.dy[::2], x=torch.stack([case.x, case.x], 1).flatten(0, 1)[::4])
    else:
        case = case._replace(dy=case.dy[:1].expand(33, 63))  # as the gradient of a sum over tokens is
    assert layout == "transposed" or not case.dy.is_contiguous()
    assert_close(ours(case), truth(case), torch.float32, layout)


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_clip_acts_on_the_unscaled_gradient(loss_scale):
    case = make_case(T=33, O=63, I=100)
    scaled = case._replace(dy=case.dy * loss_scale, loss_scale=loss_scale)
    assert_close(ours(scaled), truth(scaled), torch.float32)
    unscaled = {name: g / loss_scale for name, g in ours(scaled).items()}
    assert_close(unscaled, truth(case), torch.float32)


@both_ways
def test_several_adapters_share_one_pass(deterministic):
    forms = [{}, {"direction": "identity"}, {"ste": "hardtanh", "magnitude": "identity"}, {"ste": "surrogate"}]
    case = make_case(T=33, O=63, I=100, ranks=[(3, 5), (17, 1), (2, 9), (4, 4)], forms=forms)
    assert_close(ours(case, deterministic=deterministic), truth(case), torch.float32)


def from_G(case, adapters, routed=None, **options):
    """The same from a G that is there already, transposed in memory as a convolution's may be."""
    G = torch.stack([(c.dy.double().T @ c.x.double()).float() for c in case]).to(DEVICE)
    G = G.transpose(-1, -2).contiguous().transpose(-1, -2)
    options["routed"] = None if routed is None else torch.tensor(routed, device=DEVICE)
    return named(factor_gradients(None, G if len(case) > 1 else G[0], adapters, **options))


@both_ways
@pytest.mark.parametrize("form", FORMS[::5], ids=name_of)
def test_a_gradient_that_is_there_already(form, deterministic):
    case = make_case(T=33, O=20, I=40, forms=[form])
    got = from_G([case], adapters_of(case), deterministic=deterministic)
    assert_close(got, truth(case), torch.float32, name_of(form))


@both_ways
@pytest.mark.parametrize("routed", [None, [2, 0]], ids=["all", "routed"])
def test_experts(routed, deterministic):
    cases = [make_case(T=20, O=63, I=100, seed=seed) for seed in range(3)]
    adapters = [adapters_of(c)[0] for c in cases]
    factors = Factors(*(torch.stack(f) for f in zip(*(a.factors for a in adapters), strict=True)))
    truths = [{n: g * (routed is None or e in routed) for n, g in truth(c).items()} for e, c in enumerate(cases)]
    want = {n: torch.stack([t[n] for t in truths]) for n in truths[0]}
    got = from_G(cases, [adapters[0]._replace(factors=factors)], routed, deterministic=deterministic)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize(("T", "O", "I"), [(0, 63, 100), (5, 0, 100), (5, 63, 0)])
def test_nothing_in_gives_zeros(T, O, I):
    case = make_case(T=T, O=max(O, 1), I=max(I, 1))
    case = case._replace(
        dy=case.dy[:, :O], x=case.x[:, :I], factors=[(A[:, :I], B[:O], C[:, :I], D[:O]) for A, B, C, D in case.factors]
    )
    for gradients, (factors, *_) in zip(factor_gradients(case.dy.to(DEVICE), case.x.to(DEVICE), adapters_of(case)),
                                        adapters_of(case), strict=True):  # fmt: skip
        for g, f in zip(gradients, factors, strict=True):
            assert g.shape == f.shape
            assert not g.any()


BY_ATOMICS = pytest.param(False, marks=pytest.mark.skipif(DEVICE == "cuda", reason="atomic sums have no fixed order"))


@pytest.mark.parametrize("flag", [BY_ATOMICS, True])
def test_torch_s_flag_picks_the_variant(flag):
    """The variants add in different orders, so that their bits tell which one it was."""
    case = make_case(T=5, O=63, I=100)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(flag)
    try:
        got = ours(case)
    finally:
        torch.use_deterministic_algorithms(before)
    same, other = ours(case, deterministic=flag), ours(case, deterministic=not flag)
    assert all(torch.equal(got[name], same[name]) for name in got)
    assert DEVICE == "cuda" or not all(torch.equal(got[name], other[name]) for name in got)


def test_deterministic_gives_the_same_bits_twice():
    case = make_case(T=100, O=70, I=70)
    first, second = ours(case, deterministic=True), ours(case, deterministic=True)
    for name, g in first.items():
        assert torch.equal(g, second[name]), name


def test_agrees_with_autograd_of_the_reference():
    case = make_case(T=33, O=63, I=100)
    leaves = Factors(*(f.double().requires_grad_() for f in case.factors[0]))
    (delta_weight(leaves, case.scales[0]) * (case.dy.double().T @ case.x.double())).sum().backward()
    assert_close(ours(case), named([Factors(*(f.grad for f in leaves))]), torch.float32)


def test_what_does_not_fit_is_refused():
    case = make_case(T=5, O=63, I=100)
    adapters, dy, x = adapters_of(case), case.dy.to(DEVICE), case.x.to(DEVICE)
    with pytest.raises(ValueError, match=r"\(5, 62\)"):
        factor_gradients(dy[:, 1:], x, adapters)
    with pytest.raises(ValueError, match="cast them to the same"):
        factor_gradients(dy.half(), x, adapters)
    with pytest.raises(ValueError, match="cast them to the same"):
        factor_gradients(dy.double(), x.double(), adapters)
    with pytest.raises(ValueError, match=r"G of shape \[\(5, 100\)\]: expected \[\(63, 100\)\]"):
        factor_gradients(None, x, adapters)
    with pytest.raises(ValueError, match=r"G of \{torch\.float64\}"):
        factor_gradients(None, (dy.T @ x).double(), adapters)
