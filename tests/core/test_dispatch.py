"""Who computes: what the kernels are asked for, and what every operator gives with them, in Triton's interpreter."""

import warnings
from unittest import mock

import pytest
import torch
from formula import make_case, truth
from numerics import assert_close
from operands import Rows

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

import triton

from dual_lora.core import blocked, dispatch, stacked, whole
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.kernels import launch as triton_launch
from dual_lora.core.kernels import linear as triton_linear
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight

CUDA = torch.device("cuda", 0)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels compute on the CPU as well, and the blocks nothing."""
    monkeypatch.setattr(dispatch, "implementation", lambda *args: triton_linear)
    for name in ("forward", "backward", "compose", "factor_gradients"):
        monkeypatch.delattr(blocked, name)


def test_a_quantised_weight_is_dequantised_for_the_kernels(kernels):
    case = make_case(T=20, O=63, I=100, bias=False)
    source = Rows(case.weight)
    leaves = [t.requires_grad_() for t in (case.x, *case.factors[0])]
    adapter = Adapter(Factors(*leaves[1:]), torch.tensor(case.scales[0]), Form())
    y = dual_lora_linear(leaves[0], source, None, [adapter])
    y.backward(case.dy)
    got = {"y": y.detach(), **{n: t.grad for n, t in zip(("x", "A0", "B0", "C0", "D0"), leaves, strict=True)}}
    want = {name: t for name, t in truth(case).items() if name in got}
    assert_close(got, want, torch.float32)
    assert source.reads == [63, 63]  # once for each pass


@pytest.mark.parametrize("routed", [None, [2, 0]], ids=["all", "routed"])
@pytest.mark.parametrize("transposed", [False, True], ids=["[E, O, I]", "[E, I, O]"])
@pytest.mark.parametrize("E", [None, 3], ids=["matrix", "experts"])
@pytest.mark.parametrize("base", ["frozen", "trained", "none"])
@pytest.mark.parametrize("by", ["kernels", "blocks"])
def test_composed_weights_and_their_gradients(by, base, E, transposed, routed, request):
    if by == "kernels":
        request.getfixturevalue("kernels")
    if E is None and routed is not None:
        pytest.skip("a matrix has no experts")
    cases = [make_case(T=20, O=63, I=100, seed=seed) for seed in range(E or 1)]
    if E is None:
        weight, factors = cases[0].weight, cases[0].factors[0]
    else:
        weight = torch.stack([c.weight for c in cases])
        factors = [torch.stack(f) for f in zip(*(c.factors[0] for c in cases), strict=True)]
    if transposed:
        weight = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    leaves = [t.clone().requires_grad_() for t in factors]
    index = None if routed is None else torch.tensor(routed)
    own = None if base == "none" else weight.clone().requires_grad_(base == "trained")
    got = dual_lora_weight(own, [Adapter(Factors(*leaves), torch.tensor(0.25), Form())], routed=index)
    assert own is None or got.stride() == weight.stride()
    G = torch.randn_like(got)
    got.backward(G)
    doubles = [t.detach().double().requires_grad_() for t in factors]
    each = [tuple(doubles)] if E is None else list(zip(*doubles, strict=True))
    deltas = [delta_weight(Factors(*four), torch.tensor(0.25, dtype=torch.float64)) for four in each]
    deltas = [d if routed is None or e in routed else 0 * d for e, d in enumerate(deltas)]
    want = (0 if own is None else weight.double()) + (deltas[0] if E is None else torch.stack(deltas))
    want.backward(G.double())
    assert own is None or (own.grad is None if base == "frozen" else torch.equal(own.grad, G))
    assert_close({"W": got.detach()}, {"W": want.detach()}, torch.float32)
    assert_close({n: t.grad for n, t in zip("ABCD", leaves, strict=True)},
                 {n: t.grad for n, t in zip("ABCD", doubles, strict=True)}, torch.float32)  # fmt: skip


def of_rank(*shape):
    *batch, r = shape
    A, B = torch.empty(*batch, r, 8), torch.empty(*batch, 8, r)
    return [Adapter(Factors(A, B, A, B), torch.tensor(1.0), Form())]


class Right:
    """Kernels that have proved right."""

    @staticmethod
    def are_correct(dtype, weight, adapters, gradient_of):
        return True


def plain_of(weight, adapters):
    """Who computes without kernels: small weights at once, those that are read by rows in blocks."""
    if adapters[0].factors.B.ndim == 3:
        return stacked
    return whole if weight is None or isinstance(weight, torch.Tensor) else blocked


@pytest.mark.parametrize(
    ("weight", "adapters", "dtype", "taken"),
    [
        (None, of_rank(16), torch.bfloat16, True),
        (Rows(torch.empty(8, 8)), of_rank(16), torch.float16, True),
        (None, of_rank(300, 4), torch.bfloat16, True),  # 300 experts, not rank 300
        (None, of_rank(256), torch.bfloat16, True),
        (None, of_rank(257), torch.bfloat16, False),
        (None, of_rank(16), torch.float64, False),
        (torch.empty(8, 8), of_rank(16), torch.bfloat16, False),  # on another device
    ],
)
def test_what_the_kernels_take(weight, adapters, dtype, taken, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device: Right)
    assert dispatch.implementation(CUDA, dtype, weight, adapters) is (Right if taken else plain_of(weight, adapters))
    assert dispatch.implementation(torch.device("cpu"), dtype, weight, adapters) is plain_of(weight, adapters)
    monkeypatch.setenv(dispatch.SWITCH, "plain")
    assert dispatch.implementation(CUDA, dtype, weight, adapters) is plain_of(weight, adapters)


def test_the_larger_rank_counts():
    ranks = torch.empty(300, 8), torch.empty(8, 300), torch.empty(4, 8), torch.empty(8, 4)
    for four in (ranks, ranks[2:] + ranks[:2]):
        with mock.patch.object(dispatch, "triton_kernels", return_value=Right):
            adapters = [Adapter(Factors(*four), torch.tensor(1.0), Form())]
            assert dispatch.implementation(CUDA, torch.bfloat16, None, adapters) is whole


def test_adapters_as_an_operator_takes_them():
    """With rms(Q)² of the whole behind the scale of a part, and without."""
    whole, part = of_rank(4)[0], of_rank(2)[0]._replace(mean_square=torch.tensor(3.0), form=Form(ste="surrogate"))
    assert [a.mean_square for a in dispatch.adapters_of(*dispatch.flat([whole, part]))] == [None, 3.0]
    for before, after in zip([whole, part], dispatch.adapters_of(*dispatch.flat([whole, part])), strict=True):
        assert (after.scale, after.form) == (before.scale, before.form)
        assert all(a is b for a, b in zip(after.factors, before.factors, strict=True))


def card(monkeypatch, capability=None, gfx=None):
    monkeypatch.setattr(triton_launch, "target", triton_launch.target.__wrapped__)  # which remembers a device's answer
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch.version, "hip", None if gfx is None else "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = type("Properties", (), {"gcnArchName": gfx})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    dispatch.triton_kernels.cache_clear()


@pytest.mark.parametrize(
    ("capability", "row"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_90"), ((12, 0), "sm_80")],
)
def test_cards_of_nvidia(capability, row, monkeypatch):
    card(monkeypatch, capability)
    assert triton_launch.target(CUDA) == row


def test_a_card_of_amd(monkeypatch):
    card(monkeypatch, gfx="gfx942:sramecc+:xnack-")
    assert triton_launch.target(CUDA) == "gfx942"


@pytest.mark.parametrize("version", ["3.4.0", "3.10.0+rocm7"])
def test_versions_that_are_taken(version, monkeypatch):
    card(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", version)
    assert dispatch.triton_kernels(CUDA) is triton_linear
    dispatch.triton_kernels.cache_clear()


@pytest.mark.parametrize(
    ("found", "version", "words"),
    [
        ({"capability": (7, 5)}, "3.9.0", "it is sm_75, and they have tiles for sm_80"),
        ({"gfx": "gfx1100"}, "3.9.0", "it is gfx1100, and they have tiles for gfx942"),
        ({"capability": (9, 0)}, "3.3.1", r"Triton is 3\.3\.1, and they need 3\.4 or later"),
    ],
)
def test_what_cannot_be_is_said_once(found, version, words, monkeypatch):
    card(monkeypatch, **found)
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.warns(UserWarning, match=f"not used on Some Card: {words}"):
        assert dispatch.implementation(CUDA, torch.bfloat16, None, of_rank(16)) is whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.implementation(CUDA, torch.bfloat16, None, of_rank(16)) is whole
    dispatch.triton_kernels.cache_clear()
