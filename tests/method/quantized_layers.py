"""One linear layer [64, 128] in every kind of quantisation that computes on a CPU, alone or with an adapter."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from dual_lora import DualLoraConfig

O, I = 64, 128


def plain():
    torch.manual_seed(1)
    return nn.Linear(I, O)


def four_bit(quant_type, nested=True, features=(I, O)):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    source = nn.Linear(*features)
    options = {"quant_type": quant_type, "compress_statistics": nested}
    layer = bnb.nn.Linear4bit(*features, compute_dtype=torch.float32, **options)
    layer.weight = bnb.nn.Params4bit(source.weight.data.clone(), requires_grad=False, **options)
    layer.bias.data = source.bias.data.clone()
    return layer.to("cpu").requires_grad_(False)


def decoded(weight):
    """What 4-bit entries stand for, read here: bitsandbytes 0.50 misreads some matrices on CPUs with AVX-512."""
    from bitsandbytes.functional import dequantize_blockwise

    state = weight.quant_state
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    stored = weight.data.view(-1).view(torch.uint8).int()
    entries = state.code[torch.stack([stored >> 4, stored & 15], -1).flatten()[: state.shape.numel()]]
    return (entries * scales.repeat_interleave(state.blocksize)[: len(entries)]).view(state.shape)


def eight_bit():
    bnb = pytest.importorskip("bitsandbytes")
    source = plain()
    layer = bnb.nn.Linear8bitLt(I, O, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(source.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    layer.bias.data = source.bias.data.clone()
    return layer.to("cpu").requires_grad_(False)


def hqq(nbits, axis=1):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis)
    return quantize.HQQLinear(plain(), config, compute_dtype=torch.float32, device="cpu").requires_grad_(False)


def torchao(dynamic=False):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(plain())
    kinds = quantization.Int8DynamicActivationInt8WeightConfig, quantization.Int8WeightOnlyConfig
    quantization.quantize_(model, kinds[0 if dynamic else 1]())
    return model[0].requires_grad_(False)


def torchao_int4():
    """Four bits in groups along the rows, the kind of torchao's that computes on a CPU."""
    pytest.importorskip("torchao.quantization").quantize_(model := nn.Sequential(plain()), int4_config())
    return model[0].requires_grad_(False)


def int4_config():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


KINDS = {
    "nf4 nested": lambda: four_bit("nf4"),
    "nf4": lambda: four_bit("nf4", nested=False),
    "fp4": lambda: four_bit("fp4"),
    "int8": eight_bit,
    "hqq 8": lambda: hqq(8),
    "hqq 4": lambda: hqq(4),
    "hqq 3": lambda: hqq(3),
    "hqq 4 columns": lambda: hqq(4, axis=0),
    "torchao int8": torchao,
    "torchao int8 dynamic": lambda: torchao(dynamic=True),
    "torchao int4": torchao_int4,
}


def wrapped(kind, **options):
    """(PEFT model, its adapted layer, the quantised layer), with visible random factors."""
    base = KINDS[kind]()
    options = {"target_modules": ["1"], "init_weights": False, "r": 4, **options}
    model = get_peft_model(nn.Sequential(nn.Identity(), base), DualLoraConfig(**options))
    return model, model.base_model.model[1], base
