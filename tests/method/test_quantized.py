"""Quantised bases beside the table: rows, repacked weights, what libraries do to them, several libraries together."""

import copy

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from quantized_layers import KINDS, I, O, decoded, four_bit, int4_config, plain, torchao, torchao_int4, wrapped
from reference_layer import adapted, delta, leaves
from tiny import llama, words
from torch import nn
from torch.nn.functional import linear

from dual_lora import DualLoraConfig, composed_weights
from dual_lora.core import blocked
from dual_lora.method.layers import quantized, quantized_rows
from dual_lora.method.layers.quantized import QuantizedLinear
from dual_lora.method.layers.quantized_rows import row_source

KIND = pytest.mark.parametrize("kind", KINDS)
FUSED = set(KINDS) - {"int8", "torchao int8 dynamic"}


def requantises(layer):
    """Give a torchao layer what transformers' quantiser would have told."""
    if layer.quantization_backend.backend_name == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        four = "Intx" in type(layer.get_base_layer().weight).__name__
        layer.quantization_backend.get_apply_tensor_subclass = int4_config if four else Int8WeightOnlyConfig
        layer.quantization_backend.supports_merge = True


def whole(layer):
    if layer.quantization_backend.backend_name == "bnb 4bit":
        quantized_rows.undo_packing_for_cpu(layer.get_base_layer())
    return layer.quantization_backend.get_base_weight(layer.get_base_layer()).detach().float().clone()


@KIND
def test_rows_are_those_of_the_whole_weight(kind):
    _, layer, base = wrapped(kind)
    expected = whole(layer)
    rows = row_source(base, layer.quantization_backend)
    assert tuple(rows.shape) == (O, I)
    for start, stop in ((0, 5), (5, 30), (30, O)):
        torch.testing.assert_close(rows.rows(start, stop).float(), expected[start:stop], atol=1e-6, rtol=1e-5)


def test_rows_that_do_not_end_with_a_block():
    """Rows of 100 entries in blocks of 64, whose scales are quantised in blocks of 256."""
    layer = four_bit("nf4", features=(100, 333))
    _, adapted_layer = adapted(layer)
    expected = whole(adapted_layer)
    source = row_source(layer, adapted_layer.quantization_backend)
    for start, stop in ((0, 1), (1, 7), (7, 200), (200, 333)):
        assert torch.equal(source.rows(start, stop).float(), expected[start:stop])


def test_rows_of_no_whole_blocks_are_read_and_merged_right():
    """On CPUs with AVX-512 bitsandbytes misreads a whole matrix of 96 columns, which a merge took for the weight."""
    model, layer = adapted(four_bit("nf4", nested=False, features=(96, 200)), r=8)
    base = layer.get_base_layer()
    W, delta_W = decoded(base.weight), layer.get_delta_weight("default").detach()
    x = torch.randn(3, 96)
    torch.testing.assert_close(model(x), linear(x, W + delta_W, base.bias), atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="quantised again"):
        model.eval().merge_adapter()
    merged = decoded(layer.get_base_layer().weight)
    scales = layer.get_base_layer().weight.quant_state.absmax.repeat_interleave(64).view(200, 96)
    assert ((merged - W - delta_W).abs() <= 0.16 * scales).all(), "half of the widest step between two values"
    assert layer.merge_error == pytest.approx(float((merged - W - delta_W).norm() / delta_W.norm()), rel=1e-3)


def test_a_weight_that_was_repacked_for_inference_is_read_and_merged_right():
    """bitsandbytes repacks 4-bit weights in place on CPUs with bf16 units when it runs in eval mode, if it may."""
    model, layer, base = wrapped("nf4 nested")
    x = torch.randn(4, I)
    model.eval()
    base.support_avx512bf16_for_cpu = pytest.importorskip("bitsandbytes.functional").has_avx512bf16()
    with torch.no_grad():
        base(x)  # rounds its scales at the first time
        original = whole(layer)
        expected = model(x)
        base(x)
        if not getattr(base.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("this CPU has no bf16 units, for which bitsandbytes repacks")
        composed_weights.clear()
        assert torch.equal(model(x), expected)
        base(x)
        with pytest.warns(UserWarning, match="quantised again"):
            model.merge_adapter()
        torch.testing.assert_close(whole(layer), original + layer.get_delta_weight("default"), atol=0.5, rtol=0.1)
        model.unmerge_adapter()
        assert torch.equal(whole(layer), original)


@pytest.mark.parametrize("after", ["evaluation", "evaluation and saving", "nothing"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_an_evaluation_leaves_of_a_4_bit_model(nested, after):
    """A repacked layer stops the gradient in silence, and saving one transposes its scales (bitsandbytes 0.50)."""
    base = nn.Sequential(*(four_bit("nf4", nested, (128, 128)) for _ in range(3)))
    for layer in base:
        layer.bias = None
    with torch.no_grad():
        base[1].weight.quant_state.absmax[:40] //= 3  # or else a transposed scale is like its neighbour
    W = [decoded(layer.weight) for layer in base]
    x = torch.randn(4, 128)
    if after != "nothing":
        base.eval()(x)
    if "saving" in after:
        base.state_dict()
    model = get_peft_model(base, DualLoraConfig(target_modules=["0"], init_weights=False, warmup_steps=0))
    for k in range(2):
        y = model.train()(x)
        y.square().mean().backward()
        layer = model.base_model.model[0]
        factors = leaves(layer)
        expected = x @ (W[0] + delta(layer, factors)).T @ W[1].T @ W[2].T
        expected.square().mean().backward()
        close = 0.03 if after != "nothing" else 1e-3  # one rounding of the scales to bf16, where the CPU has it
        got = y, *(f.grad for f in layer.factors("default"))
        for ours, theirs in zip(got, (expected, *(f.grad for f in factors)), strict=True):
            assert (ours - theirs).norm() <= close * theirs.norm(), k
        model.zero_grad()
        with torch.no_grad():
            model.eval()(x)
            model.state_dict()


@pytest.mark.parametrize("nested", [False, True])
def test_repacking_and_back_keeps_the_scales_in_their_places(nested):
    """bitsandbytes 0.50 leaves plain scales transposed: after the base's own forward an adapter read another one."""
    layer = four_bit("nf4", nested, (256, 64))  # several blocks in a row
    rows = quantized_rows._FourBitRows(layer)
    before = rows.rows(0, 64).clone()
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 256))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no bf16 units, for which bitsandbytes repacks")
    after = quantized_rows._FourBitRows(layer).rows(0, 64)
    torch.testing.assert_close(after, before, atol=0.01 * float(before.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["nf4 nested", "hqq 4"])
def test_a_merge_between_forward_and_backward_is_an_error(kind):
    model, _, _ = wrapped(kind)
    x = torch.randn(3, I, requires_grad=True)
    loss = model(x).square().sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


def test_converted_bits_are_an_error():
    """`model.float()` turns bf16 storage of 4-bit entries into other numbers."""
    bnb = pytest.importorskip("bitsandbytes")
    options = dict(quant_type="nf4", quant_storage=torch.bfloat16)
    base = bnb.nn.Linear4bit(128, 64, bias=False, **options)
    base.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, **options)
    model, _ = adapted(base.to("cpu"))
    model(torch.randn(2, 128))
    with pytest.raises(
        ValueError, match=r"stored as torch.bfloat16 was converted to torch.float32, for example by model.float"
    ):
        model.float()(torch.randn(2, 128))


def test_unmerging_leaves_nothing_of_the_merged_weight_on_the_layer():
    model, _layer, base = wrapped("nf4 nested")
    before = base.quant_state = base.weight.quant_state
    with pytest.warns(UserWarning, match="quantised again"):
        model.merge_adapter()
    base.quant_state = base.weight.quant_state
    model.unmerge_adapter()
    assert base.quant_state is base.weight.quant_state is before


@pytest.mark.parametrize("dynamic", [False, True])
def test_torchao_scales_its_input_first(dynamic):
    """SmoothQuant multiplies x by a scale of its own before the product, which is no part of the weight."""
    base = torchao(dynamic)
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    assert isinstance(base.weight, Int8Tensor)
    base.weight.act_pre_scale = scale = torch.rand(I) + 0.5
    model, layer = adapted(base)
    requantises(layer)
    x = torch.randn(5, I, requires_grad=True)
    delta_W = layer.get_delta_weight("default").detach()
    y = model(x)
    torch.testing.assert_close(y, base(x) + x @ delta_W.T, atol=1e-4, rtol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = (base.weight.dequantize() * scale + delta_W).sum(0).expand(5, I)
    torch.testing.assert_close(dx, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="Cannot merge"):
        model.merge_adapter()


def test_torchao_intx_with_quantised_activations_keeps_its_forward():
    quantization = pytest.importorskip("torchao.quantization")
    source = nn.Sequential(plain())
    quantization.quantize_(source, quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4))
    base = source[0].requires_grad_(False)
    model, layer = adapted(base)
    x = torch.randn(5, I)
    torch.testing.assert_close(model(x), base(x) + x @ layer.get_delta_weight("default").T, atol=1e-5, rtol=1e-5)


def test_forward_only_kinds_are_wired(monkeypatch):
    """GPTQ, AWQ, AQLM, EETQ and the like: their forward is kept, the adapter's product is added, merging is refused."""
    from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend

    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = I, O
            self.register_buffer("qweight", torch.randint(-8, 8, (O, I), dtype=torch.int8))
            self.bias = None

        def forward(self, x):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not repacked):
                return linear(x, self.qweight.float() / 8)

    monkeypatch.setattr(
        quantized,
        "resolve_quantization_backend",
        lambda base, **_: ForwardOnlyQuantizationBackend("gptq") if isinstance(base, Kernel) else None,
    )
    base, repacked = Kernel(), False
    model = get_peft_model(nn.Sequential(base), DualLoraConfig(target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    x = torch.randn(4, I, requires_grad=True)
    y = model(x)
    W = base.qweight.float() / 8 + layer.get_delta_weight("default")
    torch.testing.assert_close(y, linear(x, W), atol=1e-4, rtol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(4, I), atol=1e-3, rtol=1e-4)
    exported = torch.export.export(model.base_model.model.eval(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), y.detach())
    with pytest.raises(ValueError, match="Cannot merge Dual LoRA into a gptq layer"):
        model.merge_adapter()
    repacked = True  # as gptqmodel's are after an evaluation in 16 bits: the gradient stops there, in silence
    with pytest.raises(RuntimeError, match=r"Kernel passes no gradient to its input.*gptq_torch"):
        model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.detach())
    torch.testing.assert_close(model(x.detach()), y.detach())  # nothing below is trained


@pytest.mark.parametrize("kind", ["torchao int8", "torchao int8 dynamic"])
def test_a_copy_reads_its_own_weight(kind):
    model, layer, _ = wrapped(kind)
    copied, copied_layer = copy.deepcopy((model, layer))
    copied_layer.get_base_layer().weight.qdata.zero_()
    assert not torch.equal(whole(copied_layer), whole(layer))
    for one, its in ((model, layer), (copied, copied_layer)):
        x = torch.randn(4, I, requires_grad=True)
        one(x).sum().backward()
        dx = (whole(its) + its.get_delta_weight("default")).sum(0).expand(4, I)
        torch.testing.assert_close(x.grad, dx, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("other", ["full weights", "nf4", "int8"])
def test_a_base_that_a_script_exchanges_is_the_one_that_is_read(other):
    """As scripts do that quantise a base anew, or put the full weights back for the last steps."""
    model, layer, _ = wrapped("nf4 nested")
    x = torch.randn(4, I)
    model(x)
    old, new = layer.base_layer, nn.Linear(I, O) if other == "full weights" else KINDS[other]()
    if other == "nf4":
        new.weight.data = new.weight.data.flip(0)
    layer.base_layer = new
    expected = new(x) + linear(x, layer.get_delta_weight("default"))
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    if other == "full weights":
        model(x).sum().backward()
        assert new.weight.grad is not None
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected, atol=1e-4, rtol=1e-4)
    layer.base_layer = old
    torch.testing.assert_close(model(x), old(x) + linear(x, layer.get_delta_weight("default")), atol=1e-4, rtol=1e-4)


def test_the_whole_weight_never_stands_in_memory(monkeypatch):
    model, layer, _ = wrapped("nf4 nested")
    monkeypatch.setattr(blocked, "CPU", blocked.Sizes(tile=16 * I, block=16 * I * 4))
    seen = []
    original = quantized_rows._FourBitRows.rows
    monkeypatch.setattr(
        quantized_rows._FourBitRows, "rows", lambda self, a, b: seen.append(b - a) or original(self, a, b)
    )
    monkeypatch.setattr(type(layer.quantization_backend), "get_base_weight", None)
    model(torch.randn(4, I, requires_grad=True)).sum().backward()
    assert seen == [16] * (O // 16) * 2


def test_preparing_for_kbit_training_leaves_the_factors_in_fp32():
    model = prepare_model_for_kbit_training(nn.Sequential(four_bit("nf4")).bfloat16(), use_gradient_checkpointing=False)
    model = get_peft_model(model, DualLoraConfig(target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    assert {f.dtype for f in layer.factors("default")} == {torch.float32}
    # What TRL does to the adapters of a QLoRA model.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="fp32 again"):
        model(torch.randn(2, I)).sum().backward()
    assert {f.dtype for f in layer.factors("default")} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype):
    model, layer, base = wrapped("nf4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(4, I, dtype=dtype))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.factors("default").A.grad.dtype == torch.float32
    assert base.weight.dtype == torch.uint8
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in (4, 1000):  # by the kept weight, and without
            assert model.eval()(torch.randn(rows, I, dtype=dtype)).dtype == torch.bfloat16


@pytest.mark.slow
def test_qlora_with_transformers_and_trl(tmp_path):
    """A model quantised by transformers, trained by TRL, which casts adapters of 4-bit models to bf16."""
    pytest.importorskip("bitsandbytes")
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map="cpu",
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, learning_rate=1e-2, use_cpu=True, bf16=False, report_to=[]
    )
    data = Dataset.from_dict({"input_ids": [[3, 4, 5, 6, 7]] * 32})
    trainer = trl.SFTTrainer(
        model=base,
        args=arguments,
        train_dataset=data,
        processing_class=words(),
        peft_config=DualLoraConfig.paper(target_modules=["q_proj", "down_proj"], warmup_steps=2),
    )
    layers = [m for m in trainer.model.modules() if isinstance(m, QuantizedLinear)]
    with pytest.warns(UserWarning, match=r"cast to torch\.bfloat16 by foreign code and are fp32 again"):
        before = [f.detach().clone() for layer in layers for f in layer.factors("default")]
    trainer.train()
    after = [f for layer in layers for f in layer.factors("default")]
    assert len(layers) == 4
    assert {f.dtype for f in after} == {torch.float32}
    assert all(bool((a != b).any()) for a, b in zip(after, before, strict=True))
    assert {layer.steps_left("default") for layer in layers} == {0}


@pytest.mark.slow
def test_torchao_through_transformers_merges(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    llama().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), device_map="cpu"
    )
    model = get_peft_model(base, DualLoraConfig(target_modules=["q_proj", "down_proj"], init_weights=False)).eval()
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.warns(UserWarning, match="Merged into 4 quantised layers"):
            model.merge_adapter()
        assert (model(ids).logits - before).norm() < 0.05 * before.norm()
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", ["torchao", "torchao int4"])
def test_a_torchao_model_can_be_moved_after_inference(kind):
    """PyTorch moves such a weight by exchanging tensors, and refuses one that somebody else looks at."""
    base = torchao() if kind == "torchao" else torchao_int4()
    model, _ = adapted(base)
    model.eval()
    x = torch.randn(3, I)
    with torch.no_grad():
        before = model(x)
        model.to("cpu")
        assert torch.equal(model(x), before)
