"""The surrogate gradient against autograd of atan, in fp64; its width is that of the whole Q, at any scale of it."""

import pytest
import torch
from numerics import assert_close, error

from dual_lora.core import blocked, dispatch
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, mean_square_of, product_gradients

SURROGATE = Form("surrogate")
O, I = 90, 70


def four(dtype=torch.float64, ranks=(3, 5), seed=0):
    gen = torch.Generator().manual_seed(seed)
    shapes = (ranks[0], I), (O, ranks[0]), (ranks[1], I), (O, ranks[1])
    return Factors(*(0.02 * torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes))


def adapter(factors, form=SURROGATE, **known):
    return Adapter(factors, torch.tensor(0.5, dtype=factors.A.dtype), form, **known)


def weight_gradient(dtype=torch.float64):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def by_autograd(factors, G):
    """Gradients of ⟨G, ½ ReLU(BA) ⊙ atan(4 Q / rms) rms / 4⟩ with Sign(Q) in the place of atan's value."""
    A, B, C, D = leaves = [f.double().detach().requires_grad_() for f in factors]
    P, Q = B @ A, D @ C
    rms = Q.detach().square().mean().sqrt()
    soft = torch.atan(4 * Q / rms) * rms / 4
    sign = torch.where(Q > 0, 1.0, -1.0).double() + (soft - soft.detach())
    (G.double() * 0.5 * P.relu() * sign).sum().backward()
    return named(f.grad for f in leaves)


def named(gradients):
    return dict(zip("ABCD", gradients, strict=True))


def by_blocks(adapters, G):
    return [named(g) for g in blocked.factor_gradients(G, adapters, None)]


@pytest.fixture(params=[None, 16 * I], ids=["one tile", "tiles"])
def tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(blocked, "CPU", blocked.Sizes(tile=request.param, block=16 * 8 * O * 2, narrow=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", [SURROGATE, Form("surrogate", live_zero=True)], ids=["paper", "live zero"])
def test_the_gradient_is_that_of_atan(form, dtype, tiles):
    factors, G = four(dtype), weight_gradient(dtype)
    assert (factors.D @ factors.C).abs().min() > 1e-9  # or a rounding decides on a sign
    want = by_autograd(factors, G)
    assert_close(by_blocks([adapter(factors, form)], G)[0], want, dtype)
    identity = by_blocks([adapter(factors, Form("identity"))], G)[0]
    assert error(identity["C"], want["C"]) > 0.1, "the estimator makes no difference here"


def test_the_operator_in_bf16_is_as_exact_as_its_inputs(tiles):
    x, dy = (torch.randn(40, n).bfloat16() for n in (I, O))
    leaves = Factors(*(f.requires_grad_() for f in four(torch.float32)))
    dual_lora_linear(x, torch.zeros(O, I, dtype=torch.bfloat16), None, [adapter(leaves)]).backward(dy)
    want = by_autograd(leaves, dy.double().T @ x.double())
    assert max(error(f.grad, want[n]) for n, f in zip("ABCD", leaves, strict=True)) < 1e-2


@pytest.mark.parametrize("scale", [10.0, 1e-6])
def test_the_scale_of_d_plays_no_part(scale):
    factors, G = four(), weight_gradient()
    plain, scaled = by_blocks([adapter(factors), adapter(factors._replace(D=scale * factors.D))], G)
    scaled["C"] = scaled["C"] / scale
    assert_close(scaled, plain, torch.float64)


@pytest.mark.parametrize("zero", ["C", "D"])
@pytest.mark.parametrize("form", [SURROGATE, Form("surrogate", live_zero=True)], ids=["paper", "live zero"])
def test_where_q_is_zero_it_is_the_identity(zero, form):
    factors, G = four(), weight_gradient()
    factors = factors._replace(**{zero: torch.zeros_like(getattr(factors, zero))})
    surrogate, identity = by_blocks([adapter(factors, f) for f in (form, form._replace(ste="identity"))], G)
    assert any(g.any() for n, g in surrogate.items() if n in "CD")
    assert_close(surrogate, identity, torch.float64)


def test_a_q_too_small_to_be_squared_is_the_identity_too():
    factors, G = four(torch.float32), weight_gradient(torch.float32)
    tiny = factors._replace(D=1e-20 * factors.D)
    surrogate, identity = by_blocks([adapter(tiny), adapter(tiny, Form("identity"))], G)
    assert_close(surrogate, identity, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_mean_square_survives_cancellation(dtype):
    """D's columns and C's rows nearly cancel: Q is a thousandth of its terms."""
    u, v, w = torch.randn(O, 1), torch.randn(O, 1), torch.randn(1, I)
    C, D = torch.cat([w, -w]).to(dtype), torch.cat([u, u + 1e-3 * v], 1).to(dtype)
    torch.testing.assert_close(
        mean_square_of(C, D).double(), (D.double() @ C.double()).square().mean(), rtol=1e-6, atol=0
    )


def test_the_mean_square_of_factors_in_bf16_is_not_rounded():
    C, D = torch.randn(3, I).bfloat16(), torch.randn(O, 3).bfloat16()
    torch.testing.assert_close(mean_square_of(C, D), mean_square_of(C.float(), D.float()), rtol=0, atol=0)


def test_mean_squares_of_experts_are_their_own():
    C, D = torch.randn(4, 3, I), torch.randn(4, O, 3) * torch.tensor([1.0, 10, 0, 1e-3]).view(4, 1, 1)
    want = torch.stack([(d @ c).square().mean() for c, d in zip(C, D, strict=True)])
    torch.testing.assert_close(mean_square_of(C, D), want)


def test_gradients_of_experts_have_a_width_each():
    G, P, Q = torch.randn(3, 4, O, I, dtype=torch.float64)
    Q *= torch.tensor([1.0, 10, 0.1, 1e-3]).view(4, 1, 1)
    alone = [product_gradients(*one, 0.5, Form("surrogate")) for one in zip(G, P, Q, strict=True)]
    for got, want in zip(product_gradients(G, P, Q, 0.5, Form("surrogate")), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


def test_a_part_of_the_weight_has_the_width_of_the_whole():
    """What a process of tensor parallelism computes: its rows, through the operator as it is called there."""
    factors, x, dy = four(), *(torch.randn(20, n, dtype=torch.float64) for n in (I, O))
    factors.D[:30] *= 10
    whole = by_autograd(factors, dy.T @ x)
    leaves = Factors(*(f.clone().requires_grad_() for f in factors))
    part = adapter(leaves).with_mean_square()
    dual_lora_linear(x, None, None, [part._replace(factors=leaves.rows(0, 30))]).backward(dy[:, :30])
    first = Factors(*(f.grad.clone() for f in leaves))
    for f in leaves:
        f.grad = None
    dual_lora_linear(x, None, None, [part._replace(factors=leaves.rows(30, O))]).backward(dy[:, 30:])
    assert_close(named(a + b.grad for a, b in zip(first, leaves, strict=True)), whole, torch.float64)


def test_an_embedding_has_the_width_of_all_its_rows():
    factors = four()
    factors.D[:30] *= 10
    leaves = Factors(*(f.clone().requires_grad_() for f in factors))
    indices, dy = torch.arange(30, 50), torch.randn(20, I, dtype=torch.float64)
    dual_lora_embedding(indices, None, [adapter(leaves)], dtype=torch.float64).backward(dy)
    G = torch.zeros(O, I, dtype=torch.float64)
    G[30:50] = dy
    assert_close(named(f.grad for f in leaves), by_autograd(factors, G), torch.float64)


def test_only_what_asks_for_it_has_a_mean_square():
    factors = four()
    for form in (Form(), Form("identity"), Form("hardtanh"), Form("surrogate", direction="identity")):
        assert adapter(factors, form).with_mean_square().mean_square is None
    known = adapter(factors).with_mean_square()
    assert known.with_mean_square() is known


def test_adapters_with_and_without_a_mean_square_survive_the_operators_lists():
    given = [adapter(four()), adapter(four(seed=1)).with_mean_square(), adapter(four(seed=2), Form())]
    back = dispatch.adapters_of(*dispatch.flat(given))
    assert [a.mean_square is None for a in back] == [True, False, True]
    assert back[1].mean_square == given[1].mean_square
    assert [a.scale for a in back] == [a.scale for a in given]


def test_old_codes_of_forms_mean_what_they_meant():
    assert [Form(s).code for s in ("clip", "identity", "hardtanh", "surrogate")] == [0, 1, 2, 3]
    assert (Form(magnitude="identity").code, Form(direction="identity").code) == (4, 8)
    assert Form(live_zero=True).code == 16
