"""Base layers of a subclass with a forward of its own, beside the table: arguments, caches, weights that are away."""

import pytest
import torch
from accelerate import cpu_offload
from reference_layer import adapted, delta, expect, leaves
from torch import nn
from torch.nn import functional

from dual_lora import composed_weights
from dual_lora.method import layer as layer_module


class ScaledHead(nn.Linear):
    """As language models with a learned scale of each logit have it."""

    def forward(self, x):
        return super().forward(x).float() * torch.arange(1, self.out_features + 1) / 4


class Positions(nn.Embedding):
    """As OPT's: it is called with a mask, and looks up positions."""

    def forward(self, mask, start=0):
        return super().forward((mask.cumsum(1) * mask).long()[:, start:] + 2)


CASES = {
    "scaled": lambda: (ScaledHead(12, 5), torch.randn(4, 12)),
    "positions": lambda: (Positions(9, 6), torch.ones(2, 4)),
}


def case(name):
    torch.manual_seed(4)
    return CASES[name]()


def weights_of(base, layer, factors):
    return {"weight": base.weight.detach() + delta(layer, factors)}


def test_further_arguments_are_the_bases():
    base, x = case("positions")
    model, layer = adapted(base, call=lambda it, x: it(x, start=1))
    expected = expect(base, weights_of(base, layer, leaves(layer)), x, lambda it, x: it(x, start=1))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_its_composed_weight_is_kept_while_a_model_decodes():
    base, x = case("scaled")
    model, _ = adapted(base)
    composed_weights.clear()
    with torch.no_grad():
        model.eval()(x)
        assert composed_weights.bytes_held == 0
        composed_weights.decoding = True  # as a layer with sequences finds
        model(x)
    assert composed_weights.bytes_held == base.weight.nbytes


def zero3(model):
    """As DeepSpeed's ZeRO-3: the base's weight is empty but for the time of the base's own forward."""
    base = model.base_model.model.it.base_layer
    weight, whole, empty = base.weight, base.weight.data, torch.empty(0)
    weight.ds_id, weight.ds_shape, weight.data = 0, whole.shape, empty
    base.register_forward_pre_hook(lambda *_: setattr(weight, "data", whole))
    base.register_forward_hook(lambda *_: setattr(weight, "data", empty))


def offloaded(model):
    cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("away", [zero3, offloaded])
def test_a_weight_that_is_there_in_the_bases_forward_alone_stays_its_own(away):
    """No weight can be composed from it: the adapter's product is added, as LoRA's is."""
    base, x = case("scaled")
    model, layer = adapted(base)
    expected = base(x) + x @ delta(layer, leaves(layer)).t()
    away(model)
    weight = layer.base_layer.weight
    assert weight.is_meta or not weight.numel()
    torch.testing.assert_close(model(x), expected)


def test_codes_of_a_library_keep_their_own_product():
    """As GGUF's: bytes that are no matrix [O, I]."""

    class Packed(nn.Linear):
        def __init__(self):
            super().__init__(12, 5)
            self.real = self.weight.detach()
            self.weight = nn.Parameter(torch.zeros(5, 7, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return functional.linear(x, self.real, self.bias)

    base, x = Packed(), torch.randn(4, 12)
    model, layer = adapted(base)
    torch.testing.assert_close(model(x), functional.linear(x, base.real + delta(layer, leaves(layer)), base.bias))
    with pytest.raises(ValueError, match="too coarse"):
        model.merge_adapter()


def test_a_forward_that_was_exchanged_for_all_layers_is_called(monkeypatch):
    """As programs do that patch `nn.Linear.forward` itself."""
    base = nn.Linear(12, 5)
    model, layer = adapted(base)
    x, W = torch.randn(4, 12), (base.weight + delta(layer, leaves(layer))).detach()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * functional.linear(x, self.weight, self.bias))
    torch.testing.assert_close(model(x), 2 * functional.linear(x, W, base.bias))
    assert nn.Linear.forward not in layer_module.Linear.forwards
