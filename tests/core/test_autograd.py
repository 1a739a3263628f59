"""The operator as a citizen of PyTorch: gradcheck, opcheck, what is kept and computed, autocast, compile."""

import pytest
import torch
from formula import make_case, operator, run, truth
from numerics import assert_close
from operands import Rows, gaussian
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dual_lora.core import blocked, product
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight

FORMS = [
    Form(),
    *map(Form, ("identity", "hardtanh", "surrogate")),
    Form(magnitude="identity"),
    Form(direction="identity"),
]


def arguments(x, W, bias, factors, form, scale=0.5):
    dtype = factors.A.dtype
    return x, W, bias, list(factors), [torch.tensor(scale, dtype=dtype)], [torch.empty(0)], [form.code], None, 1.0


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck(form):
    """x, W, bias, A and B have true derivatives away from P = 0; C and D have surrogates, which test_op compares."""
    x, W, bias, factors = gaussian(4, 6, 5, 2, 3, torch.float64)
    W.requires_grad_()
    assert (factors.B @ factors.A).abs().min() > 1e-3

    def function(x, W, bias, A, B):
        adapter = Adapter(Factors(A, B, factors.C.detach(), factors.D.detach()), torch.tensor(0.7).double(), form)
        return dual_lora_linear(x, W, bias, [adapter])

    assert torch.autograd.gradcheck(function, (x, W, bias, factors.A, factors.B))


def test_gradcheck_of_all_factors_without_sign():
    """The ablation without Sign is a plain product, whose C and D have true derivatives too."""
    x, W, _, factors = gaussian(4, 6, 5, 2, 3, torch.float64)
    form = Form(direction="identity")
    function = lambda *f: dual_lora_linear(x, W, None, [Adapter(Factors(*f), torch.tensor(0.7).double(), form)])  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(factors))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
def test_opcheck(form, weight):
    x, W, bias, factors = gaussian()
    torch.library.opcheck(torch.ops.dual_lora.linear.default, arguments(x, W if weight else None, bias, factors, form))


def test_opcheck_backward():
    x, W, _, factors = (t if t is None or isinstance(t, tuple) else t.detach() for t in gaussian())
    factors = [f.detach() for f in factors]
    args = (
        torch.randn(7, 30),
        x,
        W,
        factors,
        [torch.tensor(0.5)],
        [torch.empty(0)],
        [Form().code],
        torch.tensor(8.0),
        1.0,
        None,
        True,
        True,
        True,
    )
    torch.library.opcheck(torch.ops.dual_lora.linear_backward.default, args)


@pytest.fixture
def counted(monkeypatch):
    """PyTorch's profiler counts the products of its own operators, not those that go to oneDNN directly."""
    monkeypatch.setattr(product, "onednn_is_faster", lambda: False)


def flops_of_backward(y):
    """Floating-point operations of matrix products, as PyTorch's own profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as prof:
        y.sum().backward()
    return sum(event.flops for event in prof.key_averages() if event.key in ("aten::mm", "aten::addmm", "aten::matmul"))


@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
def test_the_first_layer_computes_no_dx(source, counted):
    T, I, O = 64, 48, 80
    counts = []
    for need in (True, False):
        x, W, bias, factors = gaussian(T, I, O)
        x.requires_grad_(need)
        counts.append(
            flops_of_backward(dual_lora_linear(x, source(W), bias, [Adapter(factors, torch.ones(()), Form())]))
        )
        assert (x.grad is not None) == need
    assert counts[0] - counts[1] == 2 * T * I * O


@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
def test_frozen_factors_cost_no_weight_gradient(source, counted):
    x, W, bias, factors = gaussian(64, 48, 80)
    factors = Factors(*(f.detach() for f in factors))
    full = 2 * 64 * 48 * 80
    composing = 2 * 48 * 80 * (3 + 4)
    y = dual_lora_linear(x, source(W), bias, [Adapter(factors, torch.ones(()), Form())])
    assert flops_of_backward(y) == full + composing


def test_each_input_gets_a_gradient_only_if_it_wants_one():
    for chosen in range(4):
        x, W, _, factors = gaussian()
        for k, factor in enumerate(factors):
            factor.requires_grad_(k == chosen)
        dual_lora_linear(x.detach(), W, None, [Adapter(factors, torch.ones(()), Form())]).sum().backward()
        assert [f.grad is not None for f in factors] == [k == chosen for k in range(4)]
        assert W.grad is None


@pytest.mark.parametrize("source", [lambda W: W, Rows, lambda W: None], ids=["tensor", "rows", "none"])
def test_nothing_is_kept_for_backward_but_the_inputs(source):
    x, W, bias, factors = gaussian(T=7, I=300, O=400)
    second = gaussian(T=7, I=300, O=400)[3]
    adapters = [Adapter(factors, torch.ones(()), Form()), Adapter(second, torch.ones(()), Form())]
    inputs = {t.untyped_storage().data_ptr() for t in (x, W, bias, *factors, *second, *(a.scale for a in adapters))}
    kept = []

    def pack(t):
        # A weight that is read by rows is kept as its handle's number.
        if t.untyped_storage().data_ptr() not in inputs and t.is_floating_point():
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = dual_lora_linear(x, source(W), bias, adapters)
    assert kept == []
    y.sum().backward()
    assert factors.A.grad.any()


def test_naive_autograd_would_be_caught_by_that_test():
    """The count above can fail: the reference keeps P and Q."""
    _, _, _, factors = gaussian()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        delta_weight(factors, 1.0)
    assert (30, 20) in kept


@pytest.mark.parametrize("source", [lambda W: W, Rows, lambda W: None], ids=["tensor", "rows", "none"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_backward_twice(form, source):
    """Saved tensors and inputs are not written to."""
    x, W, bias, factors = gaussian()
    inputs = x, W, bias, *factors
    before = [t.detach().clone() for t in inputs]
    y = dual_lora_linear(x, source(W), bias, [Adapter(factors, torch.tensor(0.5), form)])
    dy = torch.randn_like(y)
    wanted = x, bias, *factors
    first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
    second = torch.autograd.grad(y, wanted, dy)
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
def test_double_backward_raises_a_clear_error(source):
    x, W, _, factors = gaussian()
    y = dual_lora_linear(x, source(W), None, [Adapter(factors, torch.ones(()), Form())])
    (dA,) = torch.autograd.grad(y.sum(), factors.A, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dA.sum().backward()


def test_a_backward_that_is_not_differentiated_again_may_create_a_graph():
    x, W, _, factors = gaussian()
    y = dual_lora_linear(x, W, None, [Adapter(factors, torch.ones(()), Form())])
    first = torch.autograd.grad(y.sum(), factors.A, create_graph=True)[0]
    y = dual_lora_linear(x, W, None, [Adapter(factors, torch.ones(()), Form())])
    assert torch.equal(first, torch.autograd.grad(y.sum(), factors.A)[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
def test_gradient_checkpointing(reentrant, source):
    x, W, bias, factors = gaussian()

    def function(x):
        return dual_lora_linear(x, source(W), bias, [Adapter(factors, torch.tensor(0.5), Form())]).tanh()

    wanted = x, bias, *factors
    function(x).sum().backward()
    plain = [t.grad for t in wanted]
    for t in wanted:
        t.grad = None
    checkpoint(function, x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a, t.grad) for a, t in zip(plain, wanted, strict=True))


def test_autocast_keeps_products_of_factors_in_fp32():
    """Under autocast y is bf16, and ΔW is the rounding of the fp32 one, entry for entry."""
    _, _, _, factors = gaussian(I=100, O=63)
    adapter = Adapter(factors, torch.tensor(1.0), Form())
    want = delta_weight(factors, 1.0)
    rounded = want.bfloat16()
    low = Factors(*(f.bfloat16() for f in factors))
    assert not torch.equal(torch.sign(delta_weight(low, 1.0)), torch.sign(rounded)), "no sign depends on precision here"
    with torch.autocast("cpu", torch.bfloat16):
        y = dual_lora_linear(torch.eye(100), None, None, [adapter])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.t(), rounded)


@pytest.mark.parametrize("source", [lambda W: W, Rows], ids=["tensor", "rows"])
def test_autocast_gradients(source):
    x, W, bias, factors = gaussian(T=20)
    with torch.autocast("cpu", torch.bfloat16):
        y = dual_lora_linear(x, source(W), bias, [Adapter(factors, torch.tensor(0.5), Form())])
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    got = [t.grad for t in (x, bias, *factors)]
    assert all(g.dtype == torch.float32 for g in got)
    y = dual_lora_linear(x, W, bias, [Adapter(factors, torch.tensor(0.5), Form())])
    want = torch.autograd.grad(y.square().sum(), (x, bias, *factors))
    for g, w in zip(got, want, strict=True):
        assert (g - w).abs().max() < 0.05 * w.abs().max()


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_does_not_reach_the_signs(precision, matmul_precision):
    """Operands in TF32 or bf16 would flip signs; the user's setting is for the large products alone."""
    x, _, _, factors = gaussian(T=3, I=512, O=512, r1=512, r2=512)
    with torch.no_grad():
        adapter = Adapter(factors, torch.tensor(1.0), Form())
        composed, y = blocked.compose(None, [adapter], torch.float32), dual_lora_linear(x, None, None, [adapter])
        plain = factors.B @ factors.A
        matmul_precision(precision)
        assert torch.equal(blocked.compose(None, [adapter], torch.float32), composed)
        assert torch.equal(delta_weight(factors, 1.0), composed), "the reference's signs depend on the setting"
        torch.testing.assert_close(dual_lora_linear(x, None, None, [adapter]), y, rtol=0, atol=0.02 * y.abs().max())
        assert torch.get_float32_matmul_precision() == precision, "the user's setting was not put back"
        if precision == "medium" and torch.equal(factors.B @ factors.A, plain):
            pytest.skip("this CPU has no lower precision, so that nothing was shown")


def jvp(function, at):
    return torch.func.jvp(function, (at,), (torch.ones_like(at),))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_is_refused(mode):
    """An operator without a rule for it would give a tangent of zero."""
    x, W, _, factors = gaussian()
    adapter = Adapter(Factors(*(f.detach() for f in factors)), torch.tensor(0.5), Form())

    def other(A):
        return [adapter._replace(factors=adapter.factors._replace(A=A))]

    A, indices = adapter.factors.A, torch.tensor([1, 2])
    functions = [
        (lambda x: dual_lora_linear(x, W, None, [adapter]), x.detach()),
        (lambda A: dual_lora_linear(x, W, None, other(A)), A),
        (lambda A: dual_lora_weight(W, other(A)), A),
        (lambda A: dual_lora_embedding(indices, W, other(A)), A),
    ]
    for function, at in functions:
        with mode(), pytest.raises(NotImplementedError, match="no forward mode"):
            jvp(function, at)


def test_transforms_raise_a_clear_error():
    x, W, _, factors = gaussian()
    adapter = Adapter(Factors(*(f.detach() for f in factors)), torch.tensor(0.5), Form())
    product = lambda x: dual_lora_linear(x, W, None, [adapter])  # noqa: E731
    for transformed in (torch.func.grad(lambda x: product(x).sum()), torch.func.vmap(product)):
        with pytest.raises(NotImplementedError, match=r"torch\.func's transforms.*in a loop"):
            transformed(x.detach())
    doubled = torch.func.vmap(lambda k: k * product(x.detach()))  # nothing of ours is transformed
    assert doubled(torch.ones(2)).shape == (2, 7, 30)


def jvp_by_hand(x, product):
    with torch.autograd.forward_ad.dual_level():
        return product(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_tangents_without_a_transform_are_refused_too(mode):
    x, W, _, factors = gaussian()
    adapter = Adapter(Factors(*(f.detach() for f in factors)), torch.tensor(0.5), Form())
    with mode(), pytest.raises(NotImplementedError, match="no forward mode"):
        jvp_by_hand(x.detach(), lambda x: dual_lora_linear(x, W, None, [adapter]))


def test_adapters_of_other_shapes_are_refused_without_a_weight_too():
    x, _, _, factors = gaussian(O=30)
    more = gaussian(O=31)[3]
    adapters = [Adapter(f, torch.tensor(0.5), Form()) for f in (factors, more)]
    with pytest.raises(ValueError, match=r"do not fit a weight \[30, 20\]"):
        dual_lora_linear(x, None, None, adapters)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, W, bias, factors = gaussian(T=7, I=20, O=30)
        y = dual_lora_linear(x, W, bias, [Adapter(factors, torch.ones(()), Form())])
        assert y.shape == (7, 30)
        y.sum().backward()
        assert [f.grad.shape for f in factors] == [f.shape for f in factors]
        assert x.grad.shape == x.shape


def test_meta_tensors():
    with torch.device("meta"):
        x, W, bias, factors = gaussian()
        y = dual_lora_linear(x, W, bias, [Adapter(factors, torch.ones(()), Form())])
    assert y.shape == (7, 30)
    assert y.device.type == "meta"


def test_the_same_bits_every_time():
    case = make_case(T=63)
    first, second = run(operator, case), run(operator, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_traced_without_graph_break():
    torch._dynamo.reset()
    case = make_case(T=20, O=143, ranks=((3, 5), (2, 2)))
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, case), truth(case), torch.float32)


@pytest.mark.slow
def test_compile_forward_and_backward_without_graph_break():
    torch._dynamo.reset()
    case = make_case(T=20, O=143, ranks=((3, 5), (2, 2)))
    compiled = torch.compile(operator, fullgraph=True)
    assert_close(run(compiled, case), truth(case), torch.float32)
