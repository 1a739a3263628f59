"""Configurations of published models, written down in code: nothing is downloaded to plan for them.

`published_config("llama-3-8b")` is transformers' own configuration object; sizes, heads and vocabularies are those of
the publication named in `FAMILIES`. A test builds every one on the meta device and compares its number of parameters
with what the publication states. The Gemma 3 models from 4B on are the language models without their vision tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dual_lora.lab.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Published:
    """One size of a family. stated: number of parameters in the publication's words; of: what it counts."""

    stated: str
    values: dict[str, Any]
    of: Literal["all", "backbone"] = "all"


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name of the architecture; shared: values that all sizes have in common."""

    model_type: str
    source: str
    sizes: dict[str, Published]
    shared: dict[str, Any] = field(default_factory=dict)
    head: Literal["causal", "classification"] = "causal"


def _decoder(
    stated: str, hidden: int, inner: int, layers: int, heads: int, kv: int | None = None, **more: Any
) -> Published:
    """hidden, inner: widths of the residual stream and of the MLP; kv: key/value heads, where they are fewer."""
    return Published(
        stated,
        {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv or heads,
            **more,
        },
    )


def _encoder(
    stated: str, hidden: int, layers: int, heads: int, of: Literal["all", "backbone"], **more: Any
) -> Published:
    return Published(
        stated,
        {
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            **more,
        },
        of,
    )


def _gpt2(stated: str, hidden: int, layers: int, heads: int) -> Published:
    return Published(stated, {"n_embd": hidden, "n_layer": layers, "n_head": heads})


def _theta(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": base, "rope_type": "default", **more}}


def _llama3_long(factor: float) -> dict[str, Any]:
    """The stretched rotary frequencies of Llama 3.1 and later."""
    scaled = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return _theta(500000.0, **scaled, original_max_position_embeddings=8192) | {"max_position_embeddings": 131072}


_SMALL_LLAMA3 = {**_llama3_long(32.0), "tie_word_embeddings": True}
_GEMMA3 = {"head_dim": 256, "query_pre_attn_scalar": 256, "vocab_size": 262144}
_GEMMA3_LARGE = {"vocab_size": 262208, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024}
_BUCKETS = {  # relative positions of DeBERTa v2 and v3
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_relative_positions": -1,
}
_CONVOLUTION = {"conv_kernel_size": 3, "conv_act": "gelu"}

FAMILIES: dict[str, Family] = {
    "LLaMA": Family(
        "llama",
        "arXiv 2302.13971, table 2",
        {
            "llama-7b": _decoder("6.7B", 4096, 11008, 32, 32),
            "llama-13b": _decoder("13.0B", 5120, 13824, 40, 40),
            "llama-33b": _decoder("32.5B", 6656, 17920, 60, 52),
            "llama-65b": _decoder("65.2B", 8192, 22016, 80, 64),
        },
        {"vocab_size": 32000, "max_position_embeddings": 2048},
    ),
    "Llama 2": Family(
        "llama",
        "arXiv 2307.09288, table 1 and section 2; github.com/Lightning-AI/litgpt, litgpt/config.py",
        {
            "llama-2-7b": _decoder("6.7B", 4096, 11008, 32, 32),
            "llama-2-13b": _decoder("13.0B", 5120, 13824, 40, 40),
            "llama-2-70b": _decoder("69B", 8192, 28672, 80, 64, 8),
        },
        {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "Llama 3": Family(
        "llama",
        "arXiv 2407.21783, table 3; github.com/meta-llama/llama-models, models/sku_list.py",
        {
            "llama-3-8b": _decoder("8.0B", 4096, 14336, 32, 32, 8),
            "llama-3-70b": _decoder("70.6B", 8192, 28672, 80, 64, 8),
            "llama-3.1-8b": _decoder("8.0B", 4096, 14336, 32, 32, 8, **_llama3_long(8.0)),
            "llama-3.1-70b": _decoder("70.6B", 8192, 28672, 80, 64, 8, **_llama3_long(8.0)),
            "llama-3.1-405b": _decoder("406B", 16384, 53248, 126, 128, 8, **_llama3_long(8.0)),
            "llama-3.2-1b": _decoder("1.23B", 2048, 8192, 16, 32, 8, **_SMALL_LLAMA3),
            "llama-3.2-3b": _decoder("3.21B", 3072, 8192, 28, 24, 8, **_SMALL_LLAMA3),
            "llama-3.3-70b": _decoder("70.6B", 8192, 28672, 80, 64, 8, **_llama3_long(8.0)),
        },
        {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, **_theta(500000.0)},
    ),
    "Qwen3": Family(
        "qwen3",
        "arXiv 2505.09388, table 1; github.com/Lightning-AI/litgpt, litgpt/config.py",
        {
            "qwen3-0.6b": _decoder("0.6B", 1024, 3072, 28, 16, 8, tie_word_embeddings=True),
            "qwen3-1.7b": _decoder("1.7B", 2048, 6144, 28, 16, 8, tie_word_embeddings=True),
            "qwen3-4b": _decoder("4.0B", 2560, 9728, 36, 32, 8, tie_word_embeddings=True),
            "qwen3-8b": _decoder("8.2B", 4096, 12288, 36, 32, 8),
            "qwen3-14b": _decoder("14.8B", 5120, 17408, 40, 40, 8),
            "qwen3-32b": _decoder("32.8B", 5120, 25600, 64, 64, 8),
        },
        {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, **_theta(1000000.0)},
    ),
    "Qwen3 MoE": Family(
        "qwen3_moe",
        "arXiv 2505.09388, table 2; github.com/Lightning-AI/litgpt, litgpt/config.py",
        {
            "qwen3-30b-a3b": _decoder("30.5B", 2048, 6144, 48, 32, 4, moe_intermediate_size=768),
            "qwen3-235b-a22b": _decoder("235B", 4096, 12288, 94, 64, 4, moe_intermediate_size=1536),
        },
        {
            "vocab_size": 151936,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "max_position_embeddings": 40960,
            **_theta(1000000.0),
        },
    ),
    "Gemma": Family(
        "gemma",
        "arXiv 2403.08295, tables 1 and 2; github.com/google/gemma_pytorch, gemma/config.py",
        {
            "gemma-2b": _decoder("2.51B", 2048, 16384, 18, 8, 1),
            "gemma-7b": _decoder("8.54B", 3072, 24576, 28, 16),
        },
        {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192},
    ),
    "Gemma 2": Family(
        "gemma2",
        "arXiv 2408.00118, tables 1 and 2; github.com/google/gemma_pytorch, gemma/config.py",
        {
            "gemma-2-2b": _decoder("2.61B", 2304, 9216, 26, 8, 4, head_dim=256),
            "gemma-2-9b": _decoder("9.24B", 3584, 14336, 42, 16, 8, head_dim=256),
            "gemma-2-27b": _decoder("27.2B", 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
        },
        {"vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096},
    ),
    "Gemma 3": Family(
        "gemma3_text",
        "arXiv 2503.19786, table 1 (without the vision encoder); github.com/Lightning-AI/litgpt, litgpt/config.py",
        {
            "gemma-3-270m": _decoder("268M", 640, 2048, 18, 4, 1, **_GEMMA3, sliding_window=512),
            "gemma-3-1b": _decoder("1.00B", 1152, 6912, 26, 4, 1, **_GEMMA3, sliding_window=512),
            "gemma-3-4b": _decoder("3.88B", 2560, 10240, 34, 8, 4, **_GEMMA3_LARGE),
            "gemma-3-12b": _decoder("11.77B", 3840, 15360, 48, 16, 8, **_GEMMA3_LARGE),
            "gemma-3-27b": _decoder(
                "27.0B", 5376, 21504, 62, 32, 16, **_GEMMA3_LARGE | {"head_dim": 128, "query_pre_attn_scalar": 168}
            ),
        },
        {"max_position_embeddings": 131072},
    ),
    "SmolLM2": Family(
        "llama",
        "arXiv 2502.02737; github.com/Lightning-AI/litgpt, litgpt/config.py",
        {
            "smollm2-135m": _decoder("135M", 576, 1536, 30, 9, 3, **_theta(100000.0)),
            "smollm2-360m": _decoder("360M", 960, 2560, 32, 15, 5, **_theta(100000.0)),
            "smollm2-1.7b": _decoder("1.7B", 2048, 8192, 24, 32, **_theta(130000.0)),
        },
        {"vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    ),
    "GPT-2": Family(
        "gpt2",
        "github.com/openai/gpt-2, README (the paper's own counts were wrong, it says there)",
        {
            "gpt2": _gpt2("124M", 768, 12, 12),
            "gpt2-medium": _gpt2("355M", 1024, 24, 16),
            "gpt2-large": _gpt2("774M", 1280, 36, 20),
            "gpt2-xl": _gpt2("1558M", 1600, 48, 25),
        },
    ),
    "RoBERTa": Family(
        "roberta",
        "arXiv 1907.11692, section 5 and appendix; github.com/facebookresearch/fairseq, examples/roberta/README.md",
        {
            "roberta-base": _encoder("125M", 768, 12, 12, "all"),
            "roberta-large": _encoder("355M", 1024, 24, 16, "all"),
        },
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "classification",
    ),
    "DeBERTa": Family(
        "deberta",
        "arXiv 2006.03654; github.com/microsoft/DeBERTa, README (counts without the vocabulary)",
        {
            "deberta-base": _encoder("100M", 768, 12, 12, "backbone"),
            "deberta-large": _encoder("350M", 1024, 24, 16, "backbone"),
            "deberta-xlarge": _encoder("700M", 1024, 48, 16, "backbone"),
        },
        {
            "vocab_size": 50265,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_biased_input": False,
            "max_relative_positions": -1,
        },
        "classification",
    ),
    "DeBERTa v2": Family(
        "deberta-v2",
        "arXiv 2006.03654; github.com/microsoft/DeBERTa, README and experiments/language_model/xxlarge.json",
        {
            "deberta-v2-xlarge": _encoder("900M", 1536, 24, 24, "all", **_CONVOLUTION),
            "deberta-v2-xxlarge": _encoder("1.5B", 1536, 48, 24, "all", **_CONVOLUTION),
        },
        {"vocab_size": 128100, **_BUCKETS},
        "classification",
    ),
    "DeBERTa v3": Family(
        "deberta-v2",
        "arXiv 2111.09543; github.com/microsoft/DeBERTa, README and experiments/language_model/rtd_*.json",
        {
            "deberta-v3-xsmall": _encoder("22M", 384, 12, 6, "backbone"),
            "deberta-v3-small": _encoder("44M", 768, 6, 12, "backbone"),
            "deberta-v3-base": _encoder("86M", 768, 12, 12, "backbone"),
            "deberta-v3-large": _encoder("304M", 1024, 24, 16, "backbone"),
            "mdeberta-v3-base": _encoder("86M", 768, 12, 12, "backbone", vocab_size=251000),
        },
        {"vocab_size": 128100, **_BUCKETS},
        "classification",
    ),
}

# Names under which the same weights are also known.
_ALSO = {"llama-30b": "llama-33b", "deberta-xxlarge": "deberta-v2-xxlarge"}
# What hubs put around a name without changing the architecture.
_BEFORE = ("meta-", "openai-")
_AFTER = ("-hf", "-instruct", "-chat", "-it", "-pt", "-base", "-instruct-2507", "-thinking-2507", "-chat-hf")


def published_names() -> list[str]:
    """All names, family by family."""
    return [name for _, _, name in _all()]


def published_family(name: str) -> Family:
    """The family that a name belongs to. Raises UserError as `published_config` does."""
    return _find(name)[0]


def published_config(name: str, **more: Any) -> PreTrainedConfig:
    """transformers' configuration of a published model. more: values laid over it, such as num_labels.

    name: as in `published_names()`; a hub name like "meta-llama/Meta-Llama-3-8B-Instruct" means the same.
    Raises UserError for a name that is not here, with the nearest one.
    """
    from transformers import AutoConfig

    family, size = _find(name)
    return AutoConfig.for_model(family.model_type, **{**family.shared, **size.values, **more})


def known_name(text: str) -> str | None:
    """The name in `published_names()` that a text means, or None."""
    names = set(published_names())
    plain = text.rsplit("/", 1)[-1].lower()
    for start in ("", *_BEFORE):
        bare = plain.removeprefix(start)
        for end in ("", *_AFTER):
            candidate = bare.removesuffix(end)
            candidate = _ALSO.get(candidate, candidate)
            if candidate in names:
                return candidate
    return None


def _find(name: str) -> tuple[Family, Published]:
    known = known_name(name)
    if known is None:
        raise UserError(f"No published configuration is called {name!r}.{suggest(name.lower(), published_names())}")
    return next((family, size) for family, size, own in _all() if own == known)


def _all() -> Iterator[tuple[Family, Published, str]]:
    for family in FAMILIES.values():
        for name, size in family.sizes.items():
            yield family, size, name
