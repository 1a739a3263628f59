"""Handles: operators that read a weight by rows, as a graph holds them."""

import pytest
import torch
from operands import Rows, gaussian

from dual_lora.core import op
from dual_lora.core.handle import handle, source_of
from dual_lora.core.op import dual_lora_linear, through_rows
from dual_lora.core.reference import Adapter, Form


def opener_of(W):
    source = Rows(W)
    return lambda: source


def of(W):
    return handle(opener_of(W), tuple(W.shape))


def test_opcheck():
    x, W, bias, factors = gaussian()
    number = of(W).number
    args = x, number, bias, list(factors), [torch.tensor(0.5)], [torch.empty(0)], [Form().code], None, 1.0
    torch.library.opcheck(torch.ops.dual_lora.linear.default, args)
    y = torch.randn(7, 30)
    torch.library.opcheck(torch.ops.dual_lora.through_rows.default, (x, y, number))
    four = [f.detach() for f in factors]
    args = (
        y,
        x.detach(),
        number,
        four,
        [torch.tensor(0.5)],
        [torch.empty(0)],
        [Form().code],
        torch.tensor(8.0),
        1.0,
        None,
        True,
        False,
        True,
    )
    torch.library.opcheck(torch.ops.dual_lora.linear_backward.default, args)
    torch.library.opcheck(torch.ops.dual_lora.through_rows_backward.default, (y, number, 20))


def test_through_rows(monkeypatch):
    """The value is the foreign one, the gradient is the product's, block by block."""
    monkeypatch.setattr(op, "ROW_BLOCK", 16 * 20)
    x, W, _, _ = gaussian(T=6)
    x = x.detach().view(2, 3, 20).requires_grad_()
    foreign = torch.randn(2, 3, 30)
    y = through_rows(x, foreign, of(W))
    assert torch.equal(y, foreign)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ W)


def test_one_graph_for_all_weights_of_a_shape():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    x, _, _, factors = gaussian()
    adapters = [Adapter(factors, torch.tensor(0.5), Form())]
    product = torch.compile(lambda weight: dual_lora_linear(x, weight, None, adapters), backend=counter, fullgraph=True)
    weights = [torch.randn(30, 20) for _ in range(3)]
    handles = [of(W) for W in weights]
    for W, weight in zip(weights, handles, strict=True):
        torch.testing.assert_close(product(weight), dual_lora_linear(x, W, None, adapters))
    assert counter.frame_count == 1


def test_a_weight_lives_as_long_as_its_handle_or_a_graph_that_needs_it():
    x, W, _, factors = gaussian()
    weight = of(W)
    number = weight.number.clone()
    y = dual_lora_linear(x, weight, None, [Adapter(factors, torch.tensor(0.5), Form())])
    del weight
    y.sum().backward()
    del y
    with pytest.raises(RuntimeError, match=rf"weight behind handle {int(number)} is gone.*Keep the model"):
        source_of(number)
