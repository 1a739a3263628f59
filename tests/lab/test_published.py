"""Built-in configurations against what the publications state, the exact counts known, and transformers' defaults."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.empty import shortened
from dual_lora.lab.recipe.published import FAMILIES, known_name, published_config, published_family, published_names

SIZES = {name: (family, size) for family in FAMILIES.values() for name, size in family.sizes.items()}
UNITS = {"M": 10**6, "B": 10**9}

# Counts of parameters on the models' pages, beyond the digits of the publications.
EXACT = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
}


def counted(name: str, layers: int, embeddings: bool = True) -> int:
    family, _ = SIZES[name]
    config = shortened(published_config(name), layers)
    with torch.device("meta"):
        model = (AutoModelForCausalLM if family.head == "causal" else AutoModel).from_config(config)
    whole = sum(p.numel() for p in model.parameters())
    return whole if embeddings else whole - model.get_input_embeddings().weight.numel()


def parameters(name: str, embeddings: bool = True) -> int:
    """Every block is like the second one."""
    one, two = counted(name, 1, embeddings), counted(name, 2, embeddings)
    return one + (two - one) * (published_config(name).num_hidden_layers - 1)


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters_is_the_published_one(name):
    """Within a unit of the last digit stated, or 3 % (backbones are stated in round numbers)."""
    _, size = SIZES[name]
    digits, unit = size.stated[:-1], UNITS[size.stated[-1]]
    decimals = len(digits.partition(".")[2])
    zeros = 0 if decimals else len(digits) - len(digits.rstrip("0"))
    last_digit = unit * 10.0 ** (zeros - decimals)
    found = parameters(name, embeddings=size.of == "all")
    assert found == pytest.approx(float(digits) * unit, abs=max(last_digit, 0.03 * float(digits) * unit)), f"{found:,}"


@pytest.mark.parametrize("name", EXACT)
def test_exact_number_of_parameters(name):
    assert parameters(name) == EXACT[name]


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("llama-7b", "llama"),
        ("gemma-7b", "gemma"),
        ("gemma-2-2b", "gemma2"),
        ("gpt2", "gpt2"),
        ("roberta-base", "roberta"),
        ("deberta-v2-xlarge", "deberta-v2"),
    ],
)
def test_shapes_agree_with_the_defaults_of_transformers(name, model_type):
    """transformers' defaults are one published size of these architectures."""
    ours, default = published_config(name), AutoConfig.for_model(model_type)
    shapes = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    for shape in (*shapes, "intermediate_size", "tie_word_embeddings"):
        assert getattr(ours, shape, None) == getattr(default, shape, None), shape


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("FacebookAI/roberta-base", "roberta-base"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("google/gemma-3-27b-it", "gemma-3-27b"),
        ("llama-30b", "llama-33b"),
        ("somebody/my-model", None),
    ],
)
def test_hub_names_mean_the_same(text, name):
    assert known_name(text) == name


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'llama-3-9b'.*Did you mean 'llama-3-8b'"):
        published_config("llama-3-9b")


def test_every_family_says_where_its_numbers_are_from():
    assert all("arXiv" in family.source or "github.com" in family.source for family in FAMILIES.values())
    assert len(published_names()) == len(set(published_names())) == len(SIZES)
    assert published_family("deberta-v3-base").head == "classification"
