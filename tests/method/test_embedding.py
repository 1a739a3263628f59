"""Embeddings beside the table: max_norm, no rows or wrong ones, a thawed base, ties, only the rows in use composed."""

import pytest
import torch
from peft import get_peft_model
from reference_layer import adapted
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core import blocked

pytestmark = pytest.mark.filterwarnings("ignore:Merging adapter default into:dual_lora.DualLoraWarning")

IDS = torch.tensor([[1, 5, 1], [0, 29, 7]])


def embedding(**options):
    torch.manual_seed(1)
    return nn.Embedding(30, 6, **options)


def test_max_norm_shortens_the_composed_rows_and_leaves_the_weight_alone():
    base = embedding(max_norm=0.5)
    before = base.weight.detach().clone()
    model, layer = adapted(base)
    y = model(IDS)
    full = before + layer.get_delta_weight("default")
    expected = full[IDS] * (0.5 / full[IDS].norm(dim=-1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(layer.base_layer.weight, before)


def test_a_pass_without_the_adapter_leaves_the_weight_alone_too():
    """nn.Embedding with max_norm writes shortened rows into its weight: the adapter would then be on another one."""
    model, layer = adapted(embedding(max_norm=0.5))
    before, y = layer.base_layer.weight.detach().clone(), model(IDS)
    with model.disable_adapter():
        short = model(IDS)
    torch.testing.assert_close(short, embedding(max_norm=0.5)(IDS))
    assert torch.equal(layer.base_layer.weight, before)
    assert torch.equal(model(IDS), y)


def test_max_norm_of_a_sum_is_not_taken_of_its_parts():
    model, layer = adapted(embedding(max_norm=0.5))
    model.eval()
    with pytest.raises(ValueError, match="which shortens the sum"):
        layer(IDS, adapter_names=["default", "default"])


def test_a_transform_raises_a_clear_error():
    model, _ = adapted(embedding())
    with pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(model)(IDS)


def test_only_rows_in_use_are_composed(monkeypatch):
    composed = []
    original = blocked.compose
    monkeypatch.setattr(blocked, "compose", lambda W, *a, **k: composed.append(W.shape) or original(W, *a, **k))
    model, _ = adapted(embedding())
    model(IDS)
    assert composed == [(5, 6)]


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.emb, self.head = nn.Embedding(30, 6), nn.Linear(6, 30, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x))


def test_tied_head_sees_the_base_before_and_the_merged_weight_after_merging():
    """As with LoRA: an adapter is on one of the tied modules, a merge writes into the weight that both hold."""
    model = get_peft_model(Tied(), DualLoraConfig(target_modules=["emb"], init_weights=False)).eval()
    base = Tied()
    delta_weight = model.base_model.model.emb.get_delta_weight("default")
    with torch.no_grad():
        W = base.emb.weight
        torch.testing.assert_close(model(IDS), (W + delta_weight)[IDS] @ W.t())
        model.merge_adapter()
        torch.testing.assert_close(model(IDS), (W + delta_weight)[IDS] @ (W + delta_weight).t())
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.head.weight, W)


@pytest.mark.parametrize("wrong", [-1, -100, 30])
def test_indices_that_are_none_are_refused_as_by_the_base(wrong):
    with pytest.raises(IndexError):
        embedding()(torch.tensor([wrong]))
    with pytest.raises(IndexError):
        adapted(embedding())[0](torch.tensor([wrong]))


def test_no_indices_at_all():
    model, layer = adapted(embedding())
    y = model(torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert all(not f.grad.any() for f in layer.factors("default"))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}], ids=str)
def test_a_thawed_base_gets_its_gradient(options):
    model, layer = adapted(embedding(**options))
    frozen = model(IDS)
    layer.base_layer.weight.requires_grad_(True)
    y, plain = model(IDS), embedding(**options)
    torch.testing.assert_close(y, frozen)
    g = torch.randn_like(y)
    y.backward(g)
    plain(IDS).backward(g)
    assert torch.equal(layer.base_layer.weight.grad, plain.weight.grad)
    assert layer.factors("default").A.grad.any()


def eight_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Embedding8bit(30, 64)
    base.load_state_dict(nn.Embedding(30, 64).state_dict())
    return base.to("cpu")


def four_bit():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Embedding4bit(30, 64)
    base.load_state_dict(nn.Embedding(30, 64).state_dict())
    return base.to("cpu")


def by_torchao():
    quantization = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Embedding(30, 64))
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, _: type(m) is nn.Embedding)
    return base[0]


@pytest.mark.parametrize("quantised", [eight_bit, four_bit, by_torchao])
def test_quantised_embeddings_are_refused(quantised):
    """The update would be rounded to the integers that the weight is stored in."""
    with pytest.raises(ValueError, match=r"quantised embedding.*Leave it out"):
        adapted(quantised())
