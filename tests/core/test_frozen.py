"""Frozen signs, the weight as direction, no direction, and sums: values and every gradient against the formula."""

import pytest
import torch

from dual_lora.core import blocked, dispatch, frozen
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import PLAIN, Adapter, Factors, Form, delta_weight

FROZEN = Form(magnitude="identity", direction="frozen")
HIRA = Form(magnitude="identity", direction="weight")
FORMS = {
    "frozen": FROZEN,
    "frozen with ReLU": Form(direction="frozen", live_zero=True),
    "sum": FROZEN._replace(plain=2),
    "sum with ReLU": Form(direction="frozen", plain=3),
    "weight": HIRA,
    "plain": PLAIN,
    "LoHa": Form(magnitude="identity", direction="identity"),
}
SEED = -4423456466869146977
ROW = [-1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0]
SHAPES = {"one tile": (63, 100), "blocks": (1100, 577), "tall": (20_000, 160)}


def signs(seed: int, O: int, I: int) -> torch.Tensor:
    """S₀ by whole numbers of Python, one entry after the other."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    low, high = seed % 2**32, (seed >> 32) % 2**32
    D, C = [mix(o ^ low) | 1 for o in range(O)], [mix(i ^ high) | 1 for i in range(I)]
    return torch.tensor([[1.0 if (d * c) % 2**32 < 2**31 else -1.0 for c in C] for d in D], dtype=torch.float64)


def adapter_of(form: Form, O: int, I: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(6, I, generator=draw, dtype=torch.float64) / I**0.5
    B = torch.randn(O, 6, generator=draw, dtype=torch.float64)
    if form.direction == "frozen":
        C, D = frozen.keys(torch.tensor(frozen.seed_of(seed, "a.layer")), O, I)
    else:
        r2 = 4 if form.trains_direction else 0
        C, D = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((r2, I), (O, r2)))
    four = (f.to(dtype).requires_grad_(f.numel() > 0) if f.is_floating_point() else f for f in (A, B, C, D))
    return Adapter(Factors(*four), torch.tensor(0.7), form)


@torch.no_grad()
def composed(adapter: Adapter) -> torch.Tensor:
    return dispatch.compose(None, [adapter], torch.float32)


def update(form: Form, A, B, C, D, W) -> torch.Tensor:
    """ΔW by the formula, independently, in fp64; autograd differentiates it."""
    O, I = W.shape
    P = B[:, form.plain :] @ A[form.plain :]
    M = P.relu() if form.magnitude == "relu" else P
    d = {
        "frozen": lambda: signs(frozen.seed_of(5, "a.layer"), O, I) if O < 2000 else torch.where(D * C > 0, 1.0, -1.0),
        "weight": lambda: W,
        "one": lambda: 1.0,
        "identity": lambda: D @ C,
    }[form.direction]()
    return float(torch.tensor(0.7)) * (M * d + B[:, : form.plain] @ A[: form.plain])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_value_and_every_gradient(form: Form, shape: tuple[int, int], dtype: torch.dtype):
    O, I = shape
    adapter = adapter_of(form, O, I, dtype)
    draw = torch.Generator().manual_seed(1)
    W, x, dy = (torch.randn(s, generator=draw, dtype=dtype) for s in ((O, I), (130, I), (130, O)))
    x.requires_grad_()
    y = dual_lora_linear(x, W, None, [adapter])
    trained = {n: f for n, f in adapter.factors._asdict().items() if f.requires_grad}
    ours = torch.autograd.grad(y, [x, *trained.values()], dy)

    x64 = x.detach().double().requires_grad_()
    four = {
        n: f.detach().double().requires_grad_() if n in trained else f for n, f in adapter.factors._asdict().items()
    }
    truth = x64 @ (W.double() + update(form, **four, W=W.double())).T
    theirs = torch.autograd.grad(truth, [x64, *(four[n] for n in trained)], dy.double())
    bound = 2e-5 if dtype == torch.float32 else 1e-12
    for name, got, want in zip(["y", "x", *trained], (y, *ours), (truth, *theirs), strict=True):
        assert (got - want).norm() <= bound * want.norm(), name


def test_the_signs_are_those_of_the_formula_and_nobody_else_s():
    C, D = frozen.keys(torch.tensor(frozen.seed_of(0, "model.layers.0.q_proj")), 40, 50)
    whole = torch.where(D * C > 0, 1.0, -1.0).double()
    assert torch.equal(whole, signs(frozen.seed_of(0, "model.layers.0.q_proj"), 40, 50))
    others = [(0, "model.layers.1.q_proj"), (1, "model.layers.0.q_proj")]
    for number, name in others:
        assert 0.4 < (whole == signs(frozen.seed_of(number, name), 40, 50)).double().mean() < 0.6
    # These bits are in people's files.
    assert frozen.seed_of(0, "model.layers.0.q_proj") == SEED
    assert whole[0, :16].tolist() == ROW


def test_signs_are_as_independent_ones():
    n = 512
    for number in range(3):
        C, D = frozen.keys(torch.tensor(frozen.seed_of(number, "a")), n, n)
        S = torch.where(D * C > 0, 1.0, -1.0)
        assert S.sum().abs() < 4 * n  # its standard deviation is n
        assert 1.94 < torch.linalg.matrix_norm(S, 2) / n**0.5 < 2.06
        for product in (S @ S.T, S.T @ S):
            rest = product.fill_diagonal_(0) / n**0.5
            assert rest.abs().max() < 6.5
            assert 0.97 < rest.square().mean() < 1.03


def test_parts_of_a_weight_take_their_parts_of_the_signs():
    adapter = adapter_of(FORMS["sum"], 300, 200)
    whole = composed(adapter)
    A, B, C, D = adapter.factors
    rows, columns = slice(70, 170), slice(11, 150)
    part = adapter._replace(factors=Factors(A[:, columns], B[rows], C[:, columns], D[rows]))
    assert torch.allclose(composed(part), whole[rows, columns], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(blocked.compose(None, [adapter], torch.float32), dual_lora_weight(None, [adapter]))


def test_experts_have_signs_of_their_own():
    seeds = torch.tensor([frozen.seed_of(0, f"experts.{e}") for e in range(3)])
    C, D = frozen.keys(seeds, 20, 30)
    assert (C.shape, D.shape) == ((3, 1, 30), (3, 20, 1))
    for e in range(3):
        one = frozen.keys(seeds[e], 20, 30)
        assert torch.equal(C[e], one[0])
        assert torch.equal(D[e], one[1])
    A, B = torch.randn(3, 4, 30), torch.randn(3, 20, 4).requires_grad_()
    many = dual_lora_weight(torch.zeros(3, 20, 30), [Adapter(Factors(A, B, C, D), torch.tensor(1.0), FROZEN)])
    want = (B @ A) * torch.where(D * C > 0, 1.0, -1.0)
    assert torch.allclose(many, want, atol=1e-6)
    G = torch.randn(3, 20, 30)
    (got,) = torch.autograd.grad(many, B, G)
    (wanted,) = torch.autograd.grad(want, B, G)
    assert torch.allclose(got, wanted, atol=1e-5)


def test_embeddings():
    adapter = adapter_of(FORMS["sum"], 40, 24)
    W, indices = torch.randn(40, 24), torch.tensor([[3, 3, 39], [0, 7, 3]])
    want = torch.nn.functional.embedding(indices, W + composed(adapter))
    got = dual_lora_embedding(indices, W, [adapter])
    assert torch.allclose(got, want, atol=1e-6)
    got.sum().backward()
    A, B = adapter.factors.A.grad, adapter.factors.B.grad
    assert A.abs().sum() > 0
    assert B[5].abs().sum() == 0 < B[3].abs().sum()


def test_codes_of_forms_come_back():
    for form in FORMS.values():
        plainless = form._replace(plain=0)
        assert Form.from_code(plainless.code) == plainless


def test_the_weight_as_direction_needs_the_weight():
    adapter = adapter_of(HIRA, 8, 8)
    with pytest.raises(ValueError, match='"weight" needs the weight'):
        delta_weight(adapter.factors, adapter.scale, HIRA)
