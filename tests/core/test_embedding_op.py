"""The embedding's operator alone: nn.Embedding's defaults, the precision of what it returns, shapes while tracing."""

import pytest
import torch
from torch.nn.functional import embedding

from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight

O, I, R = 11, 7, 3


@pytest.fixture
def adapters():
    draw = torch.Generator().manual_seed(0)
    A, C = (torch.randn(R, I, generator=draw) for _ in range(2))
    B, D = (torch.randn(O, R, generator=draw) for _ in range(2))
    return [Adapter(Factors(A, B, C, D), torch.tensor(0.5), Form())]


def test_defaults_are_those_of_nn_embedding(adapters):
    weight, indices = torch.randn(O, I), torch.tensor([[3, 0, 3], [10, 3, 1]])
    whole = weight + delta_weight(adapters[0].factors, adapters[0].scale)
    for options in ({}, {"max_norm": 1.0}):
        leaves = [f.clone().requires_grad_() for f in adapters[0].factors]
        theirs = [f.clone().requires_grad_() for f in adapters[0].factors]
        y = dual_lora_embedding(indices, weight, [adapters[0]._replace(factors=Factors(*leaves))], **options)
        torch.testing.assert_close(y.detach(), embedding(indices, whole.clone(), **options))
    y.sum().backward()  # rows that occur twice count twice
    A, B, C, D = theirs
    update = (B @ A).relu() * torch.where(D @ C > 0, 1.0, -1.0)
    embedding(indices, 0.5 * update).sum().backward()
    torch.testing.assert_close([leaves[0].grad, leaves[1].grad], [theirs[0].grad, theirs[1].grad])


@pytest.mark.parametrize("weight", [None, torch.zeros(O, I, dtype=torch.bfloat16), torch.zeros(O, I).double()])
def test_the_precision_is_the_weights(weight, adapters):
    wanted = torch.float32 if weight is None else weight.dtype
    assert dual_lora_embedding(torch.tensor([1, 2]), weight, adapters).dtype == wanted


@pytest.mark.parametrize("padding", [-1, 3])
def test_opcheck(padding, adapters):
    indices, factors = torch.tensor([[3, 0], [10, 3]]), [f.requires_grad_() for f in adapters[0].factors]
    rest = [adapters[0].scale], [torch.empty(0)], [Form().code], None
    args = indices, torch.randn(O, I), factors, *rest, padding, None, 2.0, False, torch.float32
    torch.library.opcheck(torch.ops.dual_lora.embedding.default, args)
    back = torch.randn(2, 2, I), indices, [f.detach() for f in factors], *rest, padding, False
    torch.library.opcheck(torch.ops.dual_lora.embedding_backward.default, back)
