"""fp32 products by either library: every layout of the operands, and the operator on top of both."""

import pytest
import torch
from formula import make_case, operator, run, truth
from numerics import assert_close
from operands import operator_by_rows
from torch.utils._python_dispatch import TorchDispatchMode

from dual_lora.core import blocked, product

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
LAYOUTS = {
    "rows": lambda m: m.clone(),
    "columns": lambda m: m.t().contiguous().t(),
    "part of a wider matrix": lambda m: torch.cat([m, m], 1)[:, : m.shape[1]],
    "part of a taller one, transposed": lambda m: torch.cat([m.t(), m.t()], 1)[:, : m.shape[0]].t(),
    "strided": lambda m: torch.repeat_interleave(m, 2, 1)[:, ::2],
}


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch):
    monkeypatch.setattr(product, "SMALL", 1)


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    monkeypatch.setattr(product, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


def whole_numbers(*shape, seed):
    """Their products are exact, in any order of the sums."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("a_layout", LAYOUTS)
@pytest.mark.parametrize("b_layout", LAYOUTS)
def test_every_layout(library, a_layout, b_layout):
    a, b = whole_numbers(30, 17, seed=0), whole_numbers(17, 40, seed=1)
    want = a @ b
    a, b = LAYOUTS[a_layout](a), LAYOUTS[b_layout](b)
    assert torch.equal(product.mm(a, b), want)
    for layout in LAYOUTS.values():
        out, total = layout(torch.zeros(30, 40)), layout(torch.ones(30, 40))
        product.addmm_(total, a, b)
        assert torch.equal(product.mm(a, b, out), want)
        assert torch.equal(total, want + 1)


def test_columns(library):
    a, b = whole_numbers(30, 17, seed=0), whole_numbers(17, 40, seed=1)
    whole = torch.zeros(30, 60)
    assert product.mm_columns(whole, slice(10, 50), a, b) is whole
    assert torch.equal(whole, torch.cat([torch.zeros(30, 10), a @ b, torch.zeros(30, 10)], 1))
    assert torch.equal(product.mm_columns(torch.zeros(30, 40), slice(0, 40), a, b), a @ b)


def test_the_result_is_laid_out_like_the_place_that_was_offered(library):
    a, b = whole_numbers(30, 17, seed=0), whole_numbers(17, 40, seed=1)
    for out in (torch.empty(30, 40), torch.empty(40, 30).t()):
        assert product.mm(a, b, out).stride() == out.stride()


@pytest.mark.parametrize(("n", "k", "m"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1), (1, 5, 1)])
def test_empty_and_tiny(library, n, k, m):
    a, b = whole_numbers(n, k, seed=0), whole_numbers(k, m, seed=1)
    assert torch.equal(product.mm(a, b), a @ b)
    total = torch.ones(n, m)
    product.addmm_(total, a, b)
    assert torch.equal(total, a @ b + 1)


def test_no_operand_reaches_onednn_with_gaps():
    """Such operands are right as well, and a thousand times slower: nothing but this would tell."""
    for layout in LAYOUTS.values():
        b = layout(torch.rand(5, 7))
        taken = product.without_gaps(b)
        assert taken.is_contiguous() or taken.t().is_contiguous()
        assert (taken is b) == (b.is_contiguous() or b.t().is_contiguous())  # nothing is copied for nothing


class Operators(TorchDispatchMode):
    """names: the operators that PyTorch has run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **kwargs or {})


@needs_onednn
@pytest.mark.parametrize("faster", [True, False])
def test_which_products_onednn_makes(faster, monkeypatch):
    """Either library may give the same bits here, so that which one was taken shows in PyTorch's operators alone."""
    monkeypatch.setattr(product, "onednn_is_faster", lambda: faster)
    left, right = torch.rand(30, product.SAME_BITS + 1), torch.rand(product.SAME_BITS + 1, 300)
    products = {
        "P of few terms": lambda out: product.factors_mm(left[:, 1:], right[1:], out),
        "P of many terms": lambda out: product.factors_mm(left, right, out),
        "mm": lambda out: product.mm(left, right, out),
        "addmm_": lambda out: product.addmm_(out, left, right),
        "mm in fp64": lambda out: product.mm(left.double(), right.double(), out.double()),
    }
    taken = {}
    for name, make in products.items():
        with Operators() as run:
            make(torch.zeros(30, 300))
        assert run.names
        taken[name] = any("mkldnn" in operator for operator in run.names)
    assert taken == {
        "P of few terms": faster and product.onednn_sums_alike(),
        "P of many terms": False,
        "mm": faster,
        "addmm_": faster,
        "mm in fp64": False,
    }
    columns = left.t()
    assert product.as_left_operand(columns).is_contiguous() is faster
    assert (product.as_left_operand(columns) is columns) is not faster


@needs_onednn
@pytest.mark.parametrize("rank", [1, 16, 48, 128, 256, 512])
def test_signs_depend_neither_on_the_tile_nor_on_the_library(monkeypatch, rank):
    """Forward and backward cut the weight differently, the reference does not: all have to find the same bits.

    With AVX2 kernels alone (MKL_ENABLE_INSTRUCTIONS=AVX2) torch.mm itself rounds some entries otherwise in other tiles,
    and a sign may then differ where Q is within rounding of zero, and there alone.
    """
    monkeypatch.setattr(product, "onednn_is_faster", lambda: True)
    g = torch.Generator().manual_seed(rank)
    D, C = torch.randn(300, rank, generator=g), torch.randn(rank, 500, generator=g)
    whole = D @ C
    rounding = rank * torch.finfo(torch.float32).eps * (D.abs() @ C.abs())  # the bound for a sum of `rank` terms, twice
    parts = (slice(0, 300), slice(0, 500)), (slice(64, 128), slice(0, 500)), (slice(0, 300), slice(9, 77))
    cases = [(*part, LAYOUTS[layout]) for part in parts for layout in ("rows", "columns")]

    def tiles(mm):
        for rows, cols, layout in cases if rank <= product.SAME_BITS else cases[:2]:
            out = layout(torch.empty(300, 500)[rows, cols])
            yield mm(D[rows], C[:, cols], out=out), whole[rows, cols], rounding[rows, cols]

    same_bits = all(torch.equal(tile, want) for tile, want, _ in tiles(torch.mm))
    for tile, want, bound in tiles(product.factors_mm):
        assert torch.equal(tile, want) if same_bits else bool(((tile - want).abs() <= bound).all())


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("ranks", [((3, 5),), ((3, 5), (2, 2))], ids=["one", "two"])
@pytest.mark.parametrize("blocks", ["small", "whole", "tall"])
def test_the_operator(library, layout, ranks, blocks, monkeypatch):
    sizes = {
        "small": blocked.Sizes(tile=16 * 577, block=16 * 4 * 577 * 2, narrow=16),
        "tall": blocked.Sizes(tile=16 * 63, block=16 * 63 * 4, narrow=16),
        "whole": blocked.CPU,
    }
    monkeypatch.setattr(blocked, "CPU", sizes[blocks])
    case = make_case(T=20, ranks=ranks, forms=[{}] * len(ranks))
    case = case._replace(weight=LAYOUTS[layout](case.weight))
    assert_close(run(operator, case), truth(case), torch.float32, library)


def test_a_weight_read_by_rows(library):
    case = make_case(T=20)
    want, got = truth(case), run(operator_by_rows, case)
    del got["weight"], want["weight"]
    assert_close(got, want, torch.float32, library)


def test_which_library_is_taken(monkeypatch, tmp_path):
    for vendor, expected in (("GenuineIntel", False), ("AuthenticAMD", True)):
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
        monkeypatch.setattr(product, "Path", lambda _: tmp_path / "cpuinfo")
        for name, value in (("mkl", True), ("mkldnn", True)):
            monkeypatch.setattr(getattr(torch.backends, name), "is_available", lambda value=value: value)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert product.onednn_is_faster.__wrapped__() is expected
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert product.onednn_is_faster.__wrapped__() is False
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(product, "Path", lambda _: tmp_path / "of another system")
    assert product.onednn_is_faster.__wrapped__() is False
    monkeypatch.setattr(product, "Path", lambda _: tmp_path / "cpuinfo")
    for missing in ("mkl", "mkldnn"):
        with monkeypatch.context() as without:
            without.setattr(getattr(torch.backends, missing), "is_available", lambda: False)
            assert product.onednn_is_faster.__wrapped__() is False


@needs_onednn
def test_factors_go_to_onednn_only_where_it_adds_up_as_torch_does(monkeypatch):
    monkeypatch.setattr(product, "onednn_is_faster", lambda: True)
    used = []
    monkeypatch.setattr(product, "onednn_mm", lambda a, b: used.append(a) or torch.mm(a, b) * (1 + 2**-20))
    product.onednn_sums_alike.cache_clear()
    try:
        a, b = torch.randn(40, 8), torch.randn(8, 30)
        assert torch.equal(product.factors_mm(a, b, torch.empty(40, 30)), torch.mm(a, b))
        assert len(used) == 1, "the trial alone"
    finally:
        product.onednn_sums_alike.cache_clear()
