"""The trial before a kernel's first launch: planted faults are found, errors are no verdicts, each is tried once.

On the GPU where there is one, else in Triton's interpreter.
"""

import warnings

import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="the Triton kernels need triton 3.3 or later")

from dual_lora.core import dispatch, whole
from dual_lora.core.kernels import check as triton_check
from dual_lora.core.kernels import compose as triton_compose
from dual_lora.core.kernels import gradient as triton_gradient
from dual_lora.core.kernels import launch as triton_launch
from dual_lora.core.kernels import linear as triton_linear
from dual_lora.core.reference import PLAIN, Adapter, Factors, Form
from dual_lora.lab.gpu_trials import all_launches

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMS = [
    Form(),
    Form("identity"),
    Form("hardtanh"),
    Form("surrogate"),
    Form(magnitude="identity"),
    Form(direction="identity"),
    Form(live_zero=True),
    Form(magnitude="identity", direction="weight"),
]
UNTRAINED = [Form(direction="frozen"), Form(magnitude="identity", direction="frozen"), PLAIN, Form(direction="weight")]
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]  # the interpreter's bf16
R = (3, 5, Form())


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(triton_check, "_verdicts", {})
    monkeypatch.setattr(triton_check, "_errors", type(triton_check._errors)())


def launches(dtype=torch.float32, ranks=(R,)):
    return list(all_launches(DEVICE, dtype, ranks))


def gradients(dtype=torch.float32, ranks=(R,)):
    return [launch for launch in launches(dtype, ranks) if launch.kernel == "gradient"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_and_alignment_is_right(dtype):
    errors = {launch: triton_check.error(launch) for launch in launches(dtype)}
    assert max(errors.values()) <= triton_check.TOLERANCE[dtype]
    tiles = {triton_compose.TILES[triton_launch.target(DEVICE)]}
    assert {launch.tile for launch in errors} == tiles | {
        *triton_gradient.TILES[triton_launch.target(DEVICE), dtype.itemsize]
    }


def test_every_form_is_right():
    none = {"frozen": 1, "weight": 0, "one": 0}
    ranks = [(3, none.get(form.direction, 5), form) for form in (*FORMS, *UNTRAINED)]
    compose, *_ = launches(ranks=ranks)
    gradient, *_ = gradients(ranks=ranks)
    gradient = gradient._replace(weight=compose.tensors[0]._replace(aligned=False, strides=(0, 0)))
    few = gradient._replace(ranks=(*ranks[:1], *ranks[-4:]))
    for launch in (
        compose,
        gradient,
        gradient._replace(scaled=True, ranks=ranks[:5]),  # every estimator
        few._replace(deterministic=True),  # knows no form, no more than the next one does
        few._replace(sizes=(0, *gradient.sizes[1:]), tensors=(None, gradient.tensors[1])),
    ):
        assert triton_check.error(launch) <= 1e-5


@pytest.mark.parametrize("form", [*FORMS, *UNTRAINED], ids=str)
def test_a_fault_in_one_form_is_found(form, monkeypatch):
    """Each form alone, its update made twice as large: no other form's numbers hide it."""
    rank = (3, {"frozen": 1, "weight": 0, "one": 0}.get(form.direction, 5), form)
    first = launches(ranks=[rank])[0]
    right = triton_compose.compose
    monkeypatch.setattr(triton_compose, "compose", lambda W, *given: right(W, *given) * 2 - W)
    assert triton_check.error(first) > 0.01


def test_a_trial_is_the_launch_that_it_stands_for(monkeypatch):
    right, seen = triton_gradient.factor_gradients, []

    def noted(dy, x, adapters, loss_scale=None, deterministic=None, routed=None, tile=None, weight=None):
        seen.append((dy is not None, loss_scale is not None, deterministic, tile, x.dtype, len(adapters)))
        return right(dy, x, adapters, loss_scale, deterministic, routed, tile, weight)

    monkeypatch.setattr(triton_gradient, "factor_gradients", noted)
    first = gradients()[0]
    ranks, tile = (R, (2, 2, Form())), first.tile
    for launch in (first, first._replace(scaled=True), first._replace(deterministic=True, ranks=ranks)):
        assert triton_check.error(launch) <= 1e-5
    assert seen == [
        (True, False, False, tile, torch.float32, 1),
        (True, True, False, tile, torch.float32, 1),
        (True, False, True, tile, torch.float32, 2),
    ]


def test_a_trial_of_composing_has_the_weight_that_it_stands_for(monkeypatch):
    right, seen = triton_compose.compose, []

    def noted(weight, *args):
        seen.append(triton_check.layout(weight))
        return right(weight, *args)

    monkeypatch.setattr(triton_compose, "compose", noted)
    first = launches()[0]
    weights = [first.tensors[0], first.tensors[0]._replace(aligned=False), None]
    for weight in weights:
        assert triton_check.error(first._replace(tensors=(weight, first.tensors[1]))) <= 1e-5
    assert seen == weights


def test_a_trial_meets_every_branch_of_the_formula(monkeypatch):
    """Entries on both sides of ReLU and Sign, and at zero, in factors, weight, input and gradient."""
    seen = []

    def noted(kernel):
        def call(first, second, *given, **named):
            adapters, tensors = (second, [first]) if kernel is compose else (given[0], [first, second])
            seen.append((adapters, [t for t in tensors if t is not None]))
            return kernel(first, second, *given, **named)

        return call

    compose, gradient = triton_compose.compose, triton_gradient.factor_gradients
    monkeypatch.setattr(triton_compose, "compose", noted(compose))
    monkeypatch.setattr(triton_gradient, "factor_gradients", noted(gradient))
    launch = gradients()[0]
    for one in (launches()[0], launch, launch._replace(sizes=(0, *launch.sizes[1:]))):
        assert triton_check.error(one) <= 1e-5
    assert len(seen) == 3
    for adapters, tensors in seen:
        A, B, C, D = adapters[0].factors
        for values in (*tensors, A, B, C, D, B @ A, D @ C):
            assert set(values.double().sign().unique().tolist()) == {-1, 0, 1}
        assert 0 < float(adapters[0].scale) < 1


@pytest.mark.parametrize("place", ["rows", "columns", "neither"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_small_problem_is_placed_as_the_large_one(place, aligned):
    memory = torch.zeros(5000)[0 if aligned else 1 :]
    shape, strides = (32, 48), {"rows": (48, 1), "columns": (1, 48), "neither": (150, 3)}[place]
    large = memory.as_strided(shape, strides)
    values = torch.randn(5, 7)
    small = triton_check._with_layout(values, triton_check.layout(large))
    assert torch.equal(small, values)
    assert triton_check.layout(small) == triton_check.layout(large)


def adapter(O=48, I=32, r=3, form=Form()):  # noqa: B008
    shapes = (r, I), (O, r), (r, I), (O, r)
    return Adapter(Factors(*(torch.randn(s, device=DEVICE) for s in shapes)), torch.tensor(1.0, device=DEVICE), form)


def test_what_makes_another_program_is_tried_anew_and_what_does_not_is_not(monkeypatch):
    tried = []
    monkeypatch.setattr(triton_check, "error", lambda launch: tried.append(launch) or 0.0)
    x, dy = torch.randn(16, 32, device=DEVICE), torch.randn(16, 48, device=DEVICE)

    def ask(dy=dy, x=x, adapters=None, scaled=False):
        assert triton_check.is_correct(triton_check.gradient_launch(dy, x, adapters or [adapter()], scaled))
        return len(tried)

    assert ask() == 1
    assert ask(torch.randn(32, 48, device=DEVICE), torch.randn(32, 32, device=DEVICE)) == 1  # more tokens
    assert ask(adapters=[adapter(r=4)]) == 2
    assert ask(adapters=[adapter(form=Form("identity"))]) == 3
    assert ask(scaled=True) == 4
    assert ask(dy=None, x=torch.randn(48, 32, device=DEVICE)) == 5
    assert ask(x=torch.randn(16 * 32 + 1, device=DEVICE)[1:].view(16, 32)) == 6  # aligned to nothing
    assert ask(dy=dy.half(), x=x.half()) == 7
    # A number of tokens that 16 does not divide.
    assert ask(torch.randn(17, 48, device=DEVICE), torch.randn(17, 32, device=DEVICE)) == 8
    assert ask() == 8


def test_a_weight_that_is_read_by_rows_is_tried_as_what_it_is_dequantised_to():
    def tried(weight):
        return triton_check.compose_launch(weight, [adapter()], torch.float16).tensors

    weight = torch.randn(48, 32, device=DEVICE)
    assert tried(object()) == (triton_check.layout(weight.half()),) * 2
    assert tried(weight) == (triton_check.layout(weight), triton_check.layout(weight.half()))
    assert tried(None) == (None, triton_check.layout(weight.half()))


@pytest.mark.parametrize("wrong", ["the last tile", "one entry", "not a number"])
def test_a_compose_kernel_that_is_wrong_somewhere_is_found(wrong, monkeypatch):
    right = triton_compose.compose

    def planted(*args, **kwargs):
        out = right(*args, **kwargs)
        if wrong == "the last tile":
            out[..., 64:, 64:] *= -1
        else:
            out[..., -1, 0] = float("nan") if wrong == "not a number" else out[..., -1, 0] + 1
        return out

    monkeypatch.setattr(triton_compose, "compose", planted)
    compose, *others = launches()
    with pytest.warns(UserWarning, match="compose kernel is not used.*differs from fp64"):
        assert not triton_check.is_correct(compose)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_check.is_correct(compose)
        assert triton_check.is_correct(next(launch for launch in others if launch.kernel == "gradient"))


def test_a_gradient_kernel_that_is_wrong_with_one_tile_only_is_found(monkeypatch):
    right, broken, whole = triton_gradient.factor_gradients, triton_launch.Tile(16, 16, 16, 4, 1), gradients()[0]

    def planted(dy, x, adapters, loss_scale=None, deterministic=None, routed=None, tile=None, weight=None):
        found = right(dy, x, adapters, loss_scale, deterministic, routed, tile, weight)
        if tile == broken:  # leaves out one program's share of one gradient
            found[0].D[tile.rows :] = 0
        return found

    monkeypatch.setattr(triton_gradient, "factor_gradients", planted)
    with pytest.warns(UserWarning, match="tiles of 16 × 16"):
        assert not triton_check.is_correct(whole._replace(tile=broken))
    assert triton_check.is_correct(whole)


def test_running_out_of_memory_is_no_verdict(monkeypatch):
    compose, error = launches()[0], triton_check.error

    def full(launch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_check, "error", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            assert not triton_check.is_correct(compose)
    monkeypatch.setattr(triton_check, "error", error)
    assert triton_check.is_correct(compose)


def test_one_error_is_no_verdict_and_three_are(monkeypatch):
    compose, error, left = launches()[0], triton_check.error, [1]

    def once(launch):
        if left:
            left.pop()
            raise RuntimeError("a driver's bad moment")
        return error(launch)

    monkeypatch.setattr(triton_check, "error", once)
    assert not triton_check.is_correct(compose)
    assert triton_check.is_correct(compose)
    triton_check._verdicts.clear()
    triton_check._errors.clear()
    left.extend(range(10))
    assert not triton_check.is_correct(compose)
    assert not triton_check.is_correct(compose)
    with pytest.warns(UserWarning, match="RuntimeError: a driver's bad moment"):
        assert not triton_check.is_correct(compose)
    assert not triton_check.is_correct(compose)
    assert len(left) == 7


def test_while_a_graph_is_captured_nothing_is_tried_and_nothing_decided(monkeypatch):
    card = launches()[0]._replace(device=torch.device("cuda", 0))
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(triton_check, "error", lambda launch: 0.0)
    assert not triton_check.is_correct(card)
    capturing[0] = False
    assert triton_check.is_correct(card)


def test_a_wrong_gradient_kernel_leaves_backward_to_the_blocks(monkeypatch):
    """Forward may use its kernel, which is right."""
    monkeypatch.setattr(dispatch, "triton_kernels", lambda device: triton_linear)
    monkeypatch.setattr(triton_check, "is_correct", lambda launch: launch.kernel == "compose")
    x, dy, cuda = torch.randn(16, 32, device=DEVICE), torch.randn(16, 48, device=DEVICE), torch.device("cuda")
    assert dispatch.implementation(cuda, x.dtype, None, [adapter()]) is triton_linear
    assert dispatch.implementation(cuda, x.dtype, None, [adapter()], (dy, x, None)) is whole
