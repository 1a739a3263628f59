"""Layers whose parent reads their weight: what is read is W + ΔW, in training and in inference."""

import copy
import warnings

import pytest
import torch
from tiny import adapted, layers, train, trainable
from torch import nn
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from dual_lora import DualLoraConfig
from dual_lora.method.layers.read import ReadConv1d, ReadLinear


class Reads(nn.Module):
    """Calls `called`, reads `read` and `filter`, and looks at the rest alone."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.looked_at = (nn.Linear(6, 6) for _ in range(3))
        self.filter = nn.Conv1d(3, 3, 2)

    def forward(self, x):
        x = self.called(x).to(self.looked_at.weight.dtype)
        if isinstance(self.looked_at.weight, torch.Tensor):
            x = self.looked_at(x)
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return nn.functional.conv1d(x.view(2, 3, 6), self.filter.weight, self.filter.bias)


def batch():
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def test_what_is_read_is_composed_and_the_rest_is_called():
    torch.manual_seed(0)
    names = ["called", "read", "looked_at", "filter"]
    model = adapted(Reads(), target_modules=names, init_weights=False, r=4)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in layers(model).items()}
    assert (kinds["read"], kinds["filter"]) == (ReadLinear, ReadConv1d)
    assert ReadLinear not in (kinds["called"], kinds["looked_at"])
    before = model(batch())
    before.square().sum().backward()
    assert all(p.grad.any() for p in trainable(model))
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(batch()), before, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(model(batch()), before, atol=1e-2)


class ReadsFromAfar(nn.Module):
    """Each layer by another name; of the blocks one layer is read and one is called."""

    def __init__(self):
        super().__init__()
        self.by_alias, self.by_property, self.by_module, self.by_name, self.other = (nn.Linear(6, 6) for _ in range(5))
        self.first_of_two, self.second_of_two, self.chosen, self.spare = (nn.Linear(6, 6) for _ in range(4))
        self.blocks = nn.ModuleList(nn.ModuleDict({"read": nn.Linear(6, 6), "called": nn.Linear(6, 6)}) for _ in "ab")
        self.inner = Inner()

    @property
    def filter(self):
        return self.by_property.weight

    @property
    def head(self):
        return self.by_module

    def forward(self, x):
        self.other.weight.mul_(1.0)  # written to, in place
        layer = self.by_alias
        x = self.other(nn.functional.linear(x, layer.weight, layer.bias)) @ self.filter @ self.head.weight
        x = nn.functional.linear(x, self.by_name.weight)
        for k, block in enumerate(self.blocks):
            x = block["called"](x @ block["read"].weight) + k
        x = x @ sum(layer.weight for layer in (self.first_of_two, self.second_of_two))
        layer = self.chosen if len(x) else self.spare
        x = x @ layer.weight
        return x @ self.inner.deep.weight


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.Linear(6, 6)


def test_a_weight_is_found_by_whatever_name_it_is_read():
    torch.manual_seed(0)
    names = ["by_alias", "by_property", "by_module", "by_name", "other", "read", "called", "deep"]
    names += ["first_of_two", "second_of_two", "chosen", "spare"]
    model = adapted(ReadsFromAfar(), target_modules=names, init_weights=False, r=4)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in layers(model).items()}
    assert {name for name, kind in kinds.items() if kind is ReadLinear} == set(names) - {"other", "called"}
    with torch.no_grad():
        unmerged = model(batch())
        torch.testing.assert_close(model.merge_and_unload()(batch()), unmerged, rtol=1e-4, atol=1e-4)


class ReadsSometimes(nn.Module):
    """As BLOOM, whose attention reads `dense` for a setting that few have."""

    def __init__(self):
        super().__init__()
        self.dense, self.slow = nn.Linear(6, 6), False

    def forward(self, x):
        return nn.functional.linear(x, self.dense.weight) if self.slow else self.dense(x)


def test_a_batch_of_several_adapters_is_refused_where_a_weight_is_read_in_it():
    model = adapted(ReadsSometimes(), target_modules=["dense"], init_weights=False, r=4)
    model.add_adapter("other", DualLoraConfig(target_modules=["dense"], init_weights=False, r=4))
    model.eval()
    mixed = model(batch(), adapter_names=["default", "other", "__base__"] * 2)
    for k, name in enumerate(["default", "other"]):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[k::3], model(batch())[k::3])
    model.base_model.model.slow = True
    with pytest.raises(TypeError, match="does not support mixed adapter batches"):
        model(batch(), adapter_names=["default", "other", "__base__"] * 2)
    model(batch())


MODELS = {
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"], conv_L_cache=3,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_real_models_compute_merged_as_unmerged(name):
    torch.manual_seed(0)
    targets = {"mamba": ["dt_proj", "x_proj"], "lfm2": ["conv.conv", "q_proj"]}[name]
    model = adapted(MODELS[name](), target_modules=targets, init_weights=True, r=4)
    ids = torch.arange(12).view(1, 12)
    start = model(input_ids=ids).logits
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    train(model, 10, optimizer=optimizer, loss=lambda: model(input_ids=ids, labels=ids).loss)
    model.eval()
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        assert (unmerged - start).abs().max() > 1e-3
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(unmerged, merged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "name"),
    [(Reads, "read.weight"), (lambda: nn.TransformerEncoderLayer(6, 2, 8), "out_proj.weight")],
    ids=["read", "attention"],
)
def test_a_parameter_that_is_read_past_its_module_is_refused(base, name):
    """The wrapper of a parameter acts in a call of its module, so the update would act once it is merged."""
    with pytest.raises(ValueError, match=r"is read by a module above it.*in `target_modules`"):
        adapted(base(), target_modules=[], target_parameters=[name])
    adapted(base(), target_modules=[], target_parameters=["called.weight" if base is Reads else "linear1.weight"])


def test_transformers_does_not_say_of_a_read_layer_that_it_has_no_effect():
    """It says so of LoRA, in a layer for sound that reads its kernel."""
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer

    block = TDNNLayer(Wav2Vec2Config(tdnn_dim=[8, 8], tdnn_kernel=[3, 3], tdnn_dilation=[1, 1]), layer_id=0)
    x = torch.randn(1, 7, block.in_conv_dim)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapted(block, r=4, target_modules=["kernel"], init_weights=False).eval()
        y = model(x)
        with model.disable_adapter():
            assert not torch.allclose(model(x), y)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
