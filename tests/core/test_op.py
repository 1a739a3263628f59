"""The operator against the independent formula: value and every gradient, in every form, layout and precision."""

import pytest
import torch
from formula import FORMS, expected, make_case, name_of, operator, reference, run, truth
from numerics import assert_close, assert_relative_rule
from operands import Rows, gaussian, operator_by_rows
from torch._subclasses import FakeTensorMode

from dual_lora.core import blocked, compose_op, tile
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "CPU", blocked.Sizes(tile=16 * 577, block=16 * 4 * 577 * 2, narrow=16))


@both
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_every_form(form, dtype, small_blocks):
    case = make_case(T=63, I=100, O=577, forms=[form], dtype=dtype)
    assert_close(run(operator, case), truth(case), dtype, name_of(form))


@pytest.mark.parametrize("form", [{}, {"ste": "surrogate"}, {"magnitude": "identity"}], ids=name_of)
def test_scales_that_stay_on_the_device(form, small_blocks, monkeypatch):
    """As on a GPU, where to read a number would wait for the kernels before it."""
    monkeypatch.setattr(tile, "number", lambda scale: scale)
    case = make_case(T=63, I=100, O=577, forms=[form])
    assert_close(run(operator, case), truth(case), torch.float32, name_of(form))


@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
@pytest.mark.parametrize("form", [Form(), Form(ste="hardtanh")], ids=["paper", "hardtanh"])
def test_a_weight_in_fp64_keeps_its_bits_beside_factors_in_fp32(form, source, small_blocks):
    torch.manual_seed(0)
    W, x, dy = (torch.randn(s, dtype=torch.float64) for s in [(60, 40), (7, 40), (7, 60)])
    factors = Factors(*(torch.randn(s) for s in [(2, 40), (60, 2), (3, 40), (60, 3)]))
    start, full = (Adapter(factors, torch.tensor(s), form) for s in (0.0, 1.0))
    assert torch.equal(blocked.compose(source(W), [start], torch.float64), W)
    want = W + delta_weight(factors, 1.0, form)
    torch.testing.assert_close(blocked.compose(source(W), [full], torch.float64), want, rtol=1e-14, atol=0)
    x.requires_grad_()
    y = dual_lora_linear(x, source(W), None, [full])
    y.backward(dy)
    torch.testing.assert_close(y, x @ want.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, dy @ want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_factors_of_a_low_precision_are_multiplied_in_fp32(low, small_blocks):
    torch.manual_seed(0)
    W = torch.randn(60, 40)
    given = Factors(*(torch.randn(s).to(low) for s in [(2, 40), (60, 2), (3, 40), (60, 3)]))
    exact = Factors(*(f.float() for f in given))
    low_one, exact_one = (Adapter(factors, torch.tensor(0.5), Form()) for factors in (given, exact))
    assert torch.equal(*(blocked.compose(W, [it], torch.float32) for it in (low_one, exact_one)))


def test_the_case_reaches_both_sides_of_every_kink():
    case = make_case()
    _, grads = expected(case)
    A, B, C, D = case.factors[0]
    P, Q, G = B @ A, D @ C, grads["weight"].float()
    H = 0.25 * G * P.clamp(min=0)
    for what in (P > 0, P == 0, Q > 0, Q == 0, Q.abs() <= 1, H > 1, H < -1, (H.abs() < 1) & (H != 0)):
        assert 0.01 < what.double().mean() < 0.99


@both
@pytest.mark.parametrize(("O", "I"), [(63, 577), (577, 63), (1, 100), (100, 1), (64, 64)])
def test_shapes(O, I, dtype, small_blocks):
    case = make_case(T=5, I=I, O=O, dtype=dtype)
    assert_close(run(operator, case), truth(case), dtype, f"{O}x{I}")


@both
@pytest.mark.parametrize("layout", ["x", "weight", "dy", "all"])
def test_non_contiguous(layout, dtype, small_blocks):
    case = make_case(T=20, dtype=dtype)
    if layout in ("x", "all"):
        case = case._replace(x=case.x.t().contiguous().t())
        assert not case.x.is_contiguous()
    if layout in ("weight", "all"):
        case = case._replace(weight=case.weight.t().contiguous().t())
    if layout in ("dy", "all"):
        case = case._replace(dy=case.dy[:1].expand(20, -1))
    assert_close(run(operator, case), truth(case), dtype, layout)


@both
@pytest.mark.parametrize("lead", [(), (1,), (3, 7), (2, 3, 5)], ids=str)
def test_leading_dimensions(lead, dtype):
    case = make_case(O=50, lead=lead, dtype=dtype)
    assert_close(run(operator, case), truth(case), dtype, str(lead))


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("function", [operator, operator_by_rows])
def test_empty_batch(lead, function):
    got = run(function, make_case(O=50, lead=lead))
    assert got["y"].shape == (*lead, 50)
    assert got["x"].shape == (*lead, 100)
    assert all(not got[f"{n}0"].any() and got[f"{n}0"].shape for n in "ABCD")


def test_row_source_is_never_read_whole(small_blocks):
    case = make_case(T=20)
    source = Rows(case.weight)
    factors = [tuple(f.requires_grad_() for f in case.factors[0])]
    operator(case.x.requires_grad_(), source, None, factors, case.scales, case.forms).backward(case.dy)
    assert 0 < max(source.reads) < 577 / 2


@both
@pytest.mark.parametrize("ranks", [((3, 5),), ((3, 5), (2, 2))], ids=["one", "two"])
@pytest.mark.parametrize("form", [{}, {"magnitude": "identity"}], ids=["paper", "ablation"])
def test_loss_scale(ranks, form, dtype):
    """The gradients of a scaled loss are those of the unscaled one, times the scale."""
    case = make_case(T=20, ranks=ranks, forms=[form] * len(ranks), dtype=dtype)
    plain = run(operator, case)
    scaled = run(operator, case._replace(dy=case.dy * 1024, loss_scale=1024.0))
    for name in plain.keys() - {"y"}:
        plain[name] = plain[name] * 1024
    assert_close(scaled, plain, dtype)
    unknown = run(operator, case._replace(dy=case.dy * 1024))
    assert (unknown["C0"] - scaled["C0"]).abs().max() > 0.1 * scaled["C0"].abs().max()


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_strength_zero_is_the_base_and_moves_nothing(form):
    case = make_case(T=20, O=50, forms=[form])._replace(scales=[0.0])
    got = run(operator, case)
    base = torch.nn.functional.linear(case.x.double(), case.weight.double(), case.bias.double())
    assert_close({"y": got["y"]}, {"y": base}, torch.float32)
    assert all(not got[f"{n}0"].any() for n in "ABCD")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "form", [{}, {"ste": "identity"}, {"ste": "hardtanh"}, {"ste": "surrogate"}, {"magnitude": "identity"}], ids=name_of
)
def test_low_precision(low, form, small_blocks):
    case = make_case(low=low, forms=[form])
    got = run(operator, case)
    assert got["y"].dtype == got["x"].dtype == low
    assert got["A0"].dtype == torch.float32
    assert_relative_rule(got, run(reference, case), truth(case), str(low))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_row_source(low, small_blocks):
    case = make_case(low=low)
    ours, plain, true = run(operator_by_rows, case), run(reference, case), truth(case)
    for results in (ours, plain, true):
        del results["weight"]
    assert_relative_rule(ours, plain, true, str(low))


def test_gaussian_factors_in_fp32(small_blocks):
    """Not integers this time: signs agree because every Q and P has a margin, which is asserted."""
    gen = torch.Generator().manual_seed(1)
    case = make_case(T=63, I=100, O=143)
    A, B, C, D = (torch.randn(s, generator=gen) * 0.02 for s in ((3, 100), (143, 3), (5, 100), (143, 5)))
    for left, right in ((B, A), (D, C)):
        product = left.double() @ right.double()
        assert product.abs().min() > 2e-7 * product.abs().max()
    case = case._replace(factors=[(A, B, C, D)], scales=[437.3])
    assert_close(run(operator, case), truth(case), torch.float32)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_sign_of_zero(zero):
    """Rows of D that are zero, of either sign, point backward like everything that is not positive."""
    A, B, C = torch.rand(2, 20), torch.rand(30, 2), torch.randn(3, 20)
    D = torch.full((30, 3), zero)
    adapter = Adapter(Factors(A, B, C, D), torch.tensor(1.0), Form())
    delta = dual_lora_linear(torch.eye(20), None, None, [adapter]).t()
    torch.testing.assert_close(delta, -(B @ A))
    torch.testing.assert_close(blocked.compose(None, [adapter], torch.float32), -(B @ A))


def test_both_strengths_of_zero_magnitude():
    """ReLU'(0): 0 in the paper, so that B = 0 never trains; 1 in the ramp-free start, so that it does."""
    for live_zero in (False, True):
        case = make_case(T=20, O=50, forms=[{"live_zero": live_zero}])
        A, B, C, D = case.factors[0]
        case = case._replace(factors=[(A, torch.zeros_like(B), C, D)])
        got = run(operator, case)
        assert_close(got, truth(case), torch.float32)
        assert bool(got["B0"].any()) == live_zero


@both
@pytest.mark.parametrize(
    "form", [{}, {"ste": "hardtanh"}, {"ste": "surrogate"}, {"magnitude": "identity"}], ids=name_of
)
def test_negative_strength(form, dtype, small_blocks):
    """An adapter may be taken away from the base, as users of LoRA do."""
    case = make_case(T=20, forms=[form], dtype=dtype)._replace(scales=[-0.5])
    assert_close(run(operator, case), truth(case), dtype, name_of(form))


def test_compose_in_place_and_rounded_once():
    case = make_case(O=143)
    W = case.weight.bfloat16()
    A, B, C, D = case.factors[0]
    adapter = Adapter(Factors(A, B, C, D), torch.tensor(0.5), Form())
    update = 0.5 * (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
    want = (W.float() + update).bfloat16()
    assert torch.equal(blocked.compose(W, [adapter], torch.bfloat16), want)
    assert torch.equal(blocked.compose(W.clone().t().contiguous().t(), [adapter], torch.bfloat16), want)
    out = W.clone()
    assert blocked.compose(out, [adapter], torch.bfloat16, out=out) is out
    assert torch.equal(out, want)


def test_wrong_shapes_are_named():
    A, B, C, D = (torch.zeros(s) for s in ((2, 10), (20, 2), (3, 10), (20, 3)))
    x, W, s = torch.zeros(4, 10), torch.zeros(20, 10), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"do not fit a weight \[20, 10\]"):
        dual_lora_linear(x, W, None, [Adapter(Factors(A, B, C, D[:, :2]), s, Form())])
    with pytest.raises(ValueError, match=r"last dimension of x is 9, but the weight \[20, 10\] takes 10"):
        dual_lora_linear(x[:, :9], W, None, [Adapter(Factors(A, B, C, D), s, Form())])
    with pytest.raises(ValueError, match="no adapter"):
        dual_lora_linear(x, W, None, [])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64], ids=str)
def test_a_composed_weight_has_the_weights_precision(dtype):
    from dual_lora.core.compose_op import dual_lora_weight

    case = make_case(T=2, I=9, O=6)
    weight = None if dtype is None else case.weight.to(dtype)
    adapters = [
        Adapter(Factors(*four), torch.tensor(s), Form()) for four, s in zip(case.factors, case.scales, strict=True)
    ]
    assert dual_lora_weight(weight, adapters).dtype == (dtype or torch.float32)


OPERATORS = ("linear", "through_rows", "weight", "embedding")


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "XLA", "PrivateUse1"])
@pytest.mark.parametrize("name", [n + s for n in OPERATORS for s in ("", "_backward")])
def test_every_device_has_an_implementation(name, key):
    """Devices without kernels of ours take the blocks; "meta" keeps its fake, which makes shapes and nothing else."""
    from dual_lora.core import compose_op, embedding_op  # noqa: F401 - they define the operators

    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"dual_lora::{name}", key)


def test_without_data_only_the_composed_weight_is_composed_again(monkeypatch):
    """An estimate's tensors have no addresses, by which x and a second weight were taken for the last one."""
    with FakeTensorMode():
        x, W, _, factors = gaussian()
        adapters = [Adapter(factors, torch.ones(()), Form())]
        both = [compose_op.Composed(compose_op.dual_lora_weight(W, adapters), W, adapters) for _ in range(2)]
        again = []
        compose = compose_op.dual_lora_weight
        monkeypatch.setattr(compose_op, "dual_lora_weight", lambda *a, **k: again.append(a) or compose(*a, **k))
        with compose_op.recompose_in_backward(*both):
            y = sum((x.exp() @ c.result.T).sum() for c in both)
        y.backward()
    assert len(again) == 2
