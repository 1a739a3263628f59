"""The gradient of a composed weight from a sample of the tokens, where another function makes the product."""

import itertools

import pytest
import torch
from torch.nn import functional

from dual_lora.core import sampled, tokens
from dual_lora.core.sampled import Geometry, SampledProducts, with_sampled_gradient
from dual_lora.core.tokens import AUTO

NUMBERS = (torch.arange(400) + 0.5).double() / 400  # every number that may be drawn, evenly


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def convolution(n, *, groups=1, stride=1, padding=1, dilation=1, batch=4):
    """x, weight, f and geometry of a convolution with n dimensions."""
    sizes, kernel = {1: (60 if batch else 150,), 2: (9, 8), 3: (5, 4, 6)}[n], (3, 2, 2)[:n]
    x, weight = normal(*([batch] if batch else []), 4, *sizes), normal(6, 4 // groups, *kernel, seed=1) / 3
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
    geometry = Geometry(*([v] * n for v in (stride, padding, dilation)))
    return x, weight, lambda x, W: convolve(x, W, None, *geometry, groups=groups), {"geometry": geometry}


def product():
    return normal(3, 50, 7), normal(5, 7, seed=1), lambda x, W: x @ W.mT, {}


def experts():
    ends = torch.tensor([40, 40, 110, 130], dtype=torch.int32)
    x, weight = normal(130, 7), normal(4, 5, 7, seed=1)

    def f(x, W):
        starts = [0, *ends.tolist()]
        return torch.cat([x[i:j] @ W[e].mT for e, (i, j) in enumerate(itertools.pairwise(starts))])

    return x, weight, f, {"ends": ends}


CASES = {
    "product": product,
    "experts": experts,
    "conv1d": lambda: convolution(1),
    "conv1d without a batch": lambda: convolution(1, batch=0),
    "conv2d": lambda: convolution(2),
    "conv2d with groups, stride and dilation": lambda: convolution(
        2, groups=2, stride=2, padding=2, dilation=2, batch=8
    ),
    "conv2d by channel": lambda: convolution(2, groups=2, padding=0),
    "conv3d": lambda: convolution(3),
}


def gradients(case, share, dy=None, seed=3):
    """dx and dW of a case, or of its sum weighed by dy."""
    x, weight, f, more = CASES[case]()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch.manual_seed(seed)
    y = with_sampled_gradient(lambda W: f(x, W), x, weight, share, **more)
    dy = normal(*y.shape, seed=2) if dy is None else dy(y)
    y.mul_(1.0)  # an output that is written to, as nn.ReLU(inplace=True) does
    y.backward(dy)
    return x.grad, weight.grad


@pytest.mark.parametrize("case", CASES)
def test_the_expectation_is_the_gradient_and_dx_is_exact(case, monkeypatch):
    dx, dW = gradients(case, 1.0)
    total, differing = torch.zeros_like(dW), 0
    for number in NUMBERS:
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: number)
        one, other = gradients(case, 0.5)
        assert torch.equal(one, dx)
        total += other
        differing += not torch.allclose(other, dW)
    assert differing > len(NUMBERS) * 0.9
    assert (total / len(NUMBERS) - dW).norm() < 0.04 * dW.norm()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.5, AUTO])
def test_a_sample_that_has_all_that_carries_something_is_exact(case, share):
    """64 tokens are always drawn, and at most 50 have a gradient."""

    channel = 0 if "without a batch" in case else 1 if "conv" in case else -1

    def few(y):
        keep = torch.zeros_like(y.select(channel, 0)).flatten()
        keep[:: -(-len(keep) // 50)] = 1
        return normal(*y.shape, seed=2) * keep.view_as(y.select(channel, 0)).unsqueeze(channel)

    for one, other in zip(gradients(case, share, few), gradients(case, 1.0, few), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
def test_patches_are_those_of_unfold(case):
    if "conv" not in case:
        return
    x, weight, f, more = CASES[case]()
    x = x if x.ndim == weight.ndim else x.unsqueeze(0)
    groups, kernel = x.shape[1] // weight.shape[1], weight.shape[2:]
    sizes = f(x, weight).shape[2:]
    every = torch.arange(len(x) * sizes.numel())
    patches = sampled._patches(x, every, sizes, kernel, more["geometry"])
    rows = patches.unflatten(2, (groups, -1)).permute(0, 2, 3, 1).flatten(2)
    y = torch.einsum("tgi,goi->tgo", rows, weight.reshape(groups, -1, rows.shape[-1])).reshape(len(x), -1, 6)
    torch.testing.assert_close(y.mT.reshape(len(x), 6, *sizes), f(x, weight))
    norms = sampled._patch_norms(x, groups, kernel, more["geometry"])
    torch.testing.assert_close(norms.flatten(0, 1), rows.norm(dim=2))


def test_products_that_are_known_and_those_that_are_not():
    """The gradient of a weight from a product that is known differs, and dx never does."""
    W, other = normal(3, 8, 8).requires_grad_(), normal(8, 8, seed=5).requires_grad_()
    x = normal(200, 8, seed=1).requires_grad_()
    ends = torch.tensor([90, 150, 200], dtype=torch.int32)

    def run(f, share):
        torch.manual_seed(0)
        products = SampledProducts(share)
        composed = W * 1
        products.add(composed)
        with products.context():
            y = f(composed)
        return torch.autograd.grad(y.square().sum(), [x, W, other], materialize_grads=True)

    import transformers.integrations.moe  # noqa: F401 - registers its operator, from 5.1 on

    known = {
        "linear": lambda W: functional.linear(x, W[0]),
        "linear by name": lambda W: functional.linear(x, weight=W[0], bias=other[0]),
        "matmul": lambda W: x @ W[1],
        "transposed": lambda W: torch.matmul(x, W[1].mT),
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        known["grouped"] = lambda W: torch.ops.transformers.grouped_mm_fallback(x, W.mT, ends)
    unknown = {
        "another's": lambda W: functional.linear(x, other) + W[0].sum(),
        "batched": lambda W: torch.bmm(x.view(1, 200, 8).expand(3, -1, -1), W).sum(0),
        "itself": lambda W: x * W[0].sum(),
    }
    for name, f in (known | unknown).items():
        (dx, dW, do), (dx2, dW2, do2) = run(f, 1.0), run(f, 0.4)
        torch.testing.assert_close(dx, dx2), torch.testing.assert_close(do, do2)
        assert torch.allclose(dW, dW2) == (name in unknown), name
        torch.testing.assert_close(run(f, 0.4)[1], dW2)  # the seed's


def test_storage_that_is_another_s_now_is_not_sampled():
    products = SampledProducts(0.5)
    composed = normal(8, 8).requires_grad_() * 1
    products.add(composed)
    again = composed.detach().requires_grad_()  # its memory, when the composed weight is gone
    assert products._is_ours(composed)
    assert products._is_ours(composed.mT)
    del composed
    assert not products._is_ours(again)


def test_no_second_derivative():
    x, W = normal(100, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    y = with_sampled_gradient(lambda W: x @ W.mT, x, W, 0.5)
    (g,) = torch.autograd.grad(y.square().sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


def test_what_comes_after_the_last_expert_adds_nothing():
    x, W = normal(100, 4).requires_grad_(), normal(2, 3, 4, seed=1)
    dy, ends = normal(100, 3, seed=2), torch.tensor([50, 80], dtype=torch.int32)
    shape, draw = list(W.shape), torch.tensor(0.3)
    op = torch.ops.dual_lora.sampled_gradient
    whole = op(dy, x, shape, 1.0, draw, ends, [], [], [])
    torch.testing.assert_close(whole, torch.stack([dy[:50].mT @ x[:50], dy[50:80].mT @ x[50:80]]))
    dy[80:] *= 1e6
    torch.testing.assert_close(
        op(dy, x, shape, 0.8, draw, ends, [], [], []), op(dy[:80], x[:80], shape, 0.8, draw, ends, [], [], [])
    )
    assert tokens.MIN_TOKENS == 64
