"""Base layers of a subclass with a forward of its own: f(x; W + ΔW), as after a merge, whatever f is."""

import pytest
import torch
from accelerate import cpu_offload
from reference_layer import adapted, assert_matches_reference, delta, expect, leaves
from torch import nn
from torch.nn import functional

from dual_lora import composed_weights
from dual_lora.method import layer as layer_module


class ScaledHead(nn.Linear):
    """As language models with a learned scale of each logit have it."""

    def forward(self, x):
        return super().forward(x).float() * torch.arange(1, self.out_features + 1) / 4


class NormHead(nn.Linear):
    """Not linear in its weight."""

    def forward(self, x):
        return functional.linear(x, functional.normalize(self.weight), self.bias)


class PaddedConv(nn.Conv1d):
    """Causal: pads its input to the left. Unpadded, one position is left of it, which would be added to all."""

    def forward(self, x):
        return super().forward(functional.pad(x, (2, 0)))


class StandardConv(nn.Conv2d):
    def forward(self, x):
        W = self.weight
        return self._conv_forward(x, (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True), self.bias)


class Positions(nn.Embedding):
    """As OPT's: it is called with a mask, and looks up positions."""

    def forward(self, mask, start=0):
        return super().forward((mask.cumsum(1) * mask).long()[:, start:] + 2)


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        return functional.normalize(super().forward(ids), dim=-1)


IDS = torch.tensor([[1, 5, 1], [0, 2, 7]])
CASES = {
    "scaled": lambda: (ScaledHead(12, 5), torch.randn(4, 12)),
    "normed head": lambda: (NormHead(12, 5), torch.randn(4, 12)),
    "padded": lambda: (PaddedConv(4, 6, 3), torch.randn(2, 4, 3)),
    "standardised": lambda: (StandardConv(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "positions": lambda: (Positions(9, 6), torch.ones(2, 4)),
    "normed embedding": lambda: (NormedEmbedding(9, 6, padding_idx=1), IDS),
}


def case(name):
    torch.manual_seed(4)
    return CASES[name]()


def weights_of(base, layer, factors):
    update = delta(layer, factors).view(base.weight.shape)
    if getattr(base, "padding_idx", None) is not None:
        update = update * (torch.arange(len(update)) != base.padding_idx)[:, None]
    return {"weight": base.weight.detach() + update}


@pytest.mark.parametrize("ste", ["clip", "surrogate"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name, ste):
    assert_matches_reference(*case(name), weights_of, ste=ste)


@pytest.mark.parametrize("name", CASES)
def test_unmerged_as_merged_in_inference(name):
    base, x = case(name)
    model, layer = adapted(base)
    model.eval()
    expected = expect(base, weights_of(base, layer, leaves(layer)), x)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", CASES)
def test_samples_of_several_adapters(name):
    base, x = case(name)
    model, layer = adapted(base)
    x = x[:2]
    expected = [base(x)[0], expect(base, weights_of(base, layer, leaves(layer)), x)[1]]
    y = model.eval().base_model.model.it(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(y, torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_further_arguments_are_the_bases():
    base, x = case("positions")
    model, layer = adapted(base, call=lambda it, x: it(x, start=1))
    expected = expect(base, weights_of(base, layer, leaves(layer)), x, lambda it, x: it(x, start=1))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_with_dropout_the_adapter_alone_sees_a_dropped_input():
    base, x = case("padded")
    model, layer = adapted(base, dropout=0.5)
    torch.manual_seed(7)
    y = model.train()(x)
    torch.manual_seed(7)
    dropped = functional.dropout(x, 0.5)
    update = delta(layer, leaves(layer)).view(base.weight.shape)
    torch.testing.assert_close(y, base(x) + functional.conv1d(functional.pad(dropped, (2, 0)), update))


def test_its_composed_weight_is_kept_in_inference():
    base, x = case("scaled")
    model, _ = adapted(base)
    composed_weights.clear()
    with torch.no_grad():
        model.eval()(x)
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
