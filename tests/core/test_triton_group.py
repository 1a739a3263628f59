"""Many layers in one launch against one launch each and against plain PyTorch, in Triton's interpreter or on a GPU.

P and Q of `inputs` are exact in fp32, zeros among them, so the kernel has to give the very bits of plain PyTorch.
"""

import pytest
import torch

pytest.importorskip("triton", minversion="3.3", reason="the Triton kernels need triton 3.3 or later")

from test_triton_compose import DTYPES, FORMS, assert_same, inputs, plain

from dual_lora.core import triton_group
from dual_lora.core.composing import Job
from dual_lora.core.reference import Factors
from dual_lora.core.triton_compose import compose
from dual_lora.core.triton_group import compose_group


@pytest.fixture
def launches(monkeypatch):
    """The layers of every launch."""
    seen, launch = [], triton_group._launch

    def count(alike, rows):
        seen.append((alike, len(rows)))
        return launch(alike, rows)

    monkeypatch.setattr(triton_group, "_launch", count)
    return seen


def a_block(low=torch.float32, **options):
    """q, k, v, o, gate, up and down of a small transformer, awkward sizes among them."""
    sizes = [(48, 48), (16, 48), (16, 48), (48, 48), (130, 48), (130, 48), (48, 130)]
    return [Job(*inputs(O, I, low=low, seed=k, **options), low) for k, (O, I) in enumerate(sizes)]


def assert_each(layers):
    for k, (got, layer) in enumerate(zip(compose_group(layers), layers, strict=True)):
        want = plain(layer.weight, layer.adapters, layer.dtype)
        assert got.shape == want.shape, k
        assert_same(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_in_one_launch(dtype, launches):
    layers = a_block(dtype)
    assert_each(layers)
    # The 130 columns of `down` are no multiple of 16: a kernel that may not assume it.
    assert [(alike.aligned, n) for alike, n in launches] == [(True, 6), (False, 1)]


def test_the_bits_of_a_launch_for_each():
    layers = a_block()
    real = [layer._replace(adapters=[with_real_numbers(a) for a in layer.adapters]) for layer in layers]
    for got, layer in zip(compose_group(real), real, strict=True):
        assert_same(got, compose(layer.weight, layer.adapters))


def with_real_numbers(adapter):
    return adapter._replace(factors=Factors(*map(torch.randn_like, adapter.factors)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form(form):
    assert_each(a_block(forms=[form])[:3])


def test_several_adapters_round_once():
    assert_each(a_block(torch.float16, ranks=[(3, 5), (16, 1), (2, 9)], forms=FORMS[:3])[:4])


def test_layers_that_differ_go_in_launches_of_their_own(launches):
    layers = a_block()[:2] + a_block(torch.float16)[:2] + a_block(ranks=[(4, 4)])[:1] + a_block(forms=FORMS[1:2])[:1]
    assert_each(layers)
    assert sorted(n for _, n in launches) == [1, 1, 2, 2]


def test_more_layers_than_a_table_has_rows(monkeypatch, launches):
    monkeypatch.setattr(triton_group, "LAYERS", 2)
    assert_each(a_block()[:5])
    assert [n for _, n in launches] == [2, 2, 1]


def test_a_full_table(monkeypatch):
    monkeypatch.setattr(triton_group, "LAYERS", 4)
    assert_each(a_block()[:4])


def shifted(weight):
    """The same weight one entry further in memory."""
    return torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)


def test_misaligned_weights(launches):
    assert_each([layer._replace(weight=shifted(layer.weight)) for layer in a_block()[:2]])
    assert [alike.aligned for alike, _ in launches] == [False]


def test_another_dtype_of_the_result():
    assert_each([layer._replace(dtype=torch.float16) for layer in a_block()[:3]])


def test_factors_of_any_strides():
    layers = [
        layer._replace(adapters=[a._replace(factors=Factors(*(f.t().contiguous().t() for f in a.factors)))
                                 for a in layer.adapters])
        for layer in a_block()[:3]
    ]  # fmt: skip
    assert_each(layers)


def test_nothing_to_compose(launches):
    weight, adapters = inputs(0, 16)
    assert compose_group([Job(weight, adapters, torch.float32)])[0].shape == (0, 16)
    assert compose_group([]) == []
    assert launches == []


def test_what_does_not_fit_is_refused():
    weight, adapters = inputs()
    with pytest.raises(ValueError, match=r"weight has shape \(62, 100\)"):
        compose_group([Job(weight[1:], adapters, torch.float32)])
    with pytest.raises(ValueError, match="row-major"):
        compose_group([Job(weight.t().contiguous().t(), adapters, torch.float32)])
    with pytest.raises(ValueError, match="float64"):
        compose_group([Job(weight.double(), adapters, torch.float32)])
