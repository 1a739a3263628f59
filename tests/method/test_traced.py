"""`torch.jit.trace` of adapted models: the graph composes the weight, whatever inference has kept before."""

import pytest
import torch
from reference_layer import Holder, adapted
from tiny import adapted as adapted_mlp
from tiny import points
from torch import nn

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda n: torch.randn(n, 6)),
    "convolution": (lambda: nn.Conv1d(6, 4, 3), lambda n: torch.randn(n, 6, 9)),
    "embedding": (lambda: nn.Embedding(9, 4), lambda n: torch.randint(0, 9, (n, 3))),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_traced_layer_is_the_layer(kind, grad):
    base, inputs = LAYERS[kind]
    model, _ = adapted(base())
    model.eval()
    assert isinstance(model.base_model.model, Holder)
    x = inputs(5)
    with torch.set_grad_enabled(grad):
        for _ in range(2):  # before anything is kept, and after
            traced = torch.jit.trace(model, (x,))
            expected = model(x)  # without gradients one product and its bias may be rounded at once, by a kept weight
            rounding = 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
            torch.testing.assert_close(traced(x), expected, rtol=0, atol=float(rounding))


def test_a_traced_model_takes_other_batches():
    model = adapted_mlp(init_weights=False).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, (points(3),))
        torch.testing.assert_close(traced(points(7)), model(points(7)))


def test_a_traced_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model, _ = adapted(attention, call=lambda layer, x: layer(x, x, x, need_weights=False)[0])
    model.eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        model(x)
        traced = torch.jit.trace(model, (x,))
        torch.testing.assert_close(traced(x), model(x))
