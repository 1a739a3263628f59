"""PyTorch's transformer modules read weights off their children in inference; the adapter acts all the same."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig, DualLoraLayer

BASES = {
    "layer": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
    "gelu": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")),
    "norm first": lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
    "decoder": lambda: Decoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)),
    "transformer": lambda: Both(nn.Transformer(8, 2, 2, 2, 16, batch_first=True)),
    "attention": lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
}
SECOND = r".*layers\.1\.(linear1|linear2|self_attn)"
TARGETS = [["linear1", "linear2"], ["linear2"], ["out_proj"], ["self_attn", "linear1"], "all-linear", SECOND]


class Decoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **kwargs):
        return self.layer(x, x.flip(1))


class Both(Decoder):
    def forward(self, x, src_key_padding_mask=None):
        return self.layer(x, x.flip(1), src_key_padding_mask=src_key_padding_mask)


class Attention(Decoder):
    def forward(self, x, **kwargs):
        return self.layer(x, x, x, **kwargs)[0]


def inputs():
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def has_targets(base, targets):
    names = [name for name, _ in base.named_modules()]
    if isinstance(targets, list):
        return all(any(name.endswith(t) for name in names) for t in targets)
    return targets == "all-linear" or any(".layers.1." in f".{name}" for name in names)


def adapted(kind, targets):
    torch.manual_seed(0)
    base = BASES[kind]().eval()
    if not has_targets(base, targets):
        pytest.skip("has no such modules")
    config = DualLoraConfig(target_modules=targets, init_weights=False, r=4)
    return base, get_peft_model(copy.deepcopy(base), config).eval()


def dense(base, model):
    """The base with W + ΔW written into its weights by the formula, in fp64, and no fast path."""
    expected = copy.deepcopy(base).double()
    for name, module in model.named_modules():
        if not isinstance(module, DualLoraLayer):
            continue
        A, B, C, D = (f.detach().double() for f in module.factors("default"))
        delta = module.strength("default") * (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
        plain = expected.get_submodule(name.replace("base_layer.", ""))
        weight = plain.in_proj_weight if isinstance(plain, nn.MultiheadAttention) else plain.weight
        weight.data += delta
    return expected


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_in_inference(kind, targets, padded):
    base, model = adapted(kind, targets)
    model = model.base_model.model
    x, options, kept = inputs(), {}, slice(None)
    if padded:
        if kind == "decoder":
            pytest.skip("takes no mask here")
        if kind in ("layer", "gelu", "norm first"):
            base, model = base[0], model[0]
        mask = torch.zeros(4, 5, dtype=torch.bool)
        mask[1, 3:], mask[2, 4:] = True, True
        options = {"key_padding_mask" if kind == "attention" else "src_key_padding_mask": mask}
        kept = ~mask
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = dense(base, model)(x.double(), **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    with torch.no_grad():
        y = model(x, **options)
    torch.testing.assert_close(y[kept].double(), expected[kept], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[kept], base(x, **options)[kept], atol=1e-2)


def test_unloaded_the_fast_path_is_back():
    base, model = adapted("encoder", ["linear1"])
    assert base.use_nested_tensor
    assert base.layers[0].activation_relu_or_gelu == 1
    assert not model.base_model.model.use_nested_tensor
    plain = model.unload()
    assert plain.use_nested_tensor
    assert plain.layers[0].activation_relu_or_gelu == 1


def test_an_output_projection_alone_trains():
    """nn.MultiheadAttention reads its weight and calls no forward."""
    _, model = adapted("attention", ["out_proj"])
    model.train()
    model(inputs()).square().sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "dual_lora_" in n)
    with torch.no_grad(), model.disable_adapter():
        off = model(inputs())
    before = model(inputs())
    model.merge_adapter()
    torch.testing.assert_close(model(inputs()), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(off, before, atol=1e-2)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no nn.LinearCrossEntropyLoss")
def test_the_linear_layer_inside_a_loss():
    torch.manual_seed(0)
    base = Decoder(nn.LinearCrossEntropyLoss(8, 3, bias=True))
    model = get_peft_model(
        copy.deepcopy(base), DualLoraConfig(target_modules=["linear"], init_weights=False, r=4)
    ).base_model.model.train()
    x, target = torch.randn(6, 8), torch.randint(0, 3, (6,))
    expected = copy.deepcopy(base).double()
    module = model.layer.linear
    four = [f.detach().double().requires_grad_() for f in module.factors("default")]
    A, B, C, D = four
    delta = module.strength("default") * (B @ A).clamp(min=0) * torch.where(D @ C > 0, 1.0, -1.0)
    linear = expected.layer.linear
    want = nn.functional.cross_entropy(x.double() @ (linear.weight + delta).t() + linear.bias, target)
    loss = model.layer(x, target)
    torch.testing.assert_close(loss.double(), want)
    loss.backward()
    want.backward()
    for ours, theirs in zip(module.factors("default")[:2], four[:2], strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)
    assert module.factors("default").C.grad.any()


def test_no_word_about_fast_paths():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("encoder", ["linear1"])
