"""Tiny random models under the names that PEFT's tests ask the hub for, laid out like the hub's own cache.

The tests load `peft-internal-testing/tiny-random-OPTForCausalLM` and the like. Their weights are random anyway, so the
same architectures are built here from configurations with a fixed seed, and every library finds them in its usual way
in the cache folder, offline. A name that is not listed is a test that cannot run without the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha1
from pathlib import Path
from typing import Any

REVISION = sha1(Path(__file__).read_bytes()).hexdigest()  # other configurations are other models
SMALL: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
TOKENS = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}


def _opt(**changes: Any) -> Any:
    from transformers import OPTConfig

    shape = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512, "dropout": 0.1}
    return OPTConfig(**{**SMALL, **shape, **TOKENS, **changes})


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=2, eos_token_id=2)


def _gptj() -> Any:
    from transformers import GPTJConfig

    return GPTJConfig(
        vocab_size=1024,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        rotary_dim=4,
        bos_token_id=2,
        eos_token_id=2,
    )


def _config(name: str, **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**options)

    return make


def _bert(name: str, **options: Any) -> Callable[[], Any]:
    return _config(name, **{**SMALL, "intermediate_size": 64, "max_position_embeddings": 514, **options})


_DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 16,
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
}
_T5 = _config(
    "T5Config",
    vocab_size=1024,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=2,
    num_heads=4,
    decoder_start_token_id=0,
    bos_token_id=0,
)
_MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}

CAUSAL = "AutoModelForCausalLM"
CLASSIFIER = "AutoModelForSequenceClassification"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
BASE = "AutoModel"

WIDE_OPT = "local/wide-random-OPTForCausalLM"
"""For the tests that quantise: a row is a block of bitsandbytes' at least. The hub has no such model."""

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (CAUSAL, lambda: _opt(num_hidden_layers=5)),
    WIDE_OPT: (CAUSAL, lambda: _opt(num_hidden_layers=5, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128)),
    "peft-internal-testing/opt-125m": (  # one test counts on the real width
        CAUSAL,
        lambda: _opt(num_hidden_layers=12, hidden_size=768, word_embed_proj_dim=768, num_attention_heads=12),
    ),
    "facebook/opt-125m": (CAUSAL, lambda: _opt(num_hidden_layers=12)),
    "facebook/opt-350m": (CAUSAL, _opt),
    "peft-internal-testing/tiny-random-gpt2": (CAUSAL, _gpt2),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (CAUSAL, _gpt2),
    "hf-internal-testing/tiny-random-gpt2": (CAUSAL, _gpt2),
    "gpt2": (CAUSAL, _gpt2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (CAUSAL, _gptj),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        CAUSAL,
        _config("GPTNeoXConfig", **SMALL, intermediate_size=64, max_position_embeddings=512),
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, _config("LlamaConfig", **LLAMA)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, _config("LlamaConfig", **LLAMA)),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (CAUSAL, _config("LlamaConfig", **LLAMA)),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        CLASSIFIER,
        _config("LlamaConfig", **LLAMA, pad_token_id=1),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (CAUSAL, _config("Qwen2Config", **LLAMA)),
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": (CAUSAL, _config("Qwen2Config", **LLAMA)),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": (CAUSAL, _config("Qwen3Config", **LLAMA, head_dim=8)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        CAUSAL,
        _config("Gemma3TextConfig", **LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=128),
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (CAUSAL, _config("MistralConfig", **LLAMA)),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        CAUSAL,
        _config("BloomConfig", vocab_size=1024, hidden_size=32, n_layer=5, n_head=4),
    ),
    "hf-internal-testing/Mixtral-tiny": (CAUSAL, _config("MixtralConfig", **_MOE)),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        CAUSAL,
        _config("Qwen3MoeConfig", **LLAMA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        CAUSAL,
        _config("GptOssConfig", **_MOE, head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        CAUSAL,
        _config(
            "Llama4TextConfig",
            **_MOE,
            head_dim=8,
            intermediate_size_mlp=64,
            interleave_moe_layer_step=1,
            attention_chunk_size=128,
            pad_token_id=1,
        ),
    ),
    "Qwen/Qwen2-0.5B": (CAUSAL, _config("Qwen2Config", **LLAMA, tie_word_embeddings=True)),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": (
        CAUSAL,
        _config(
            "NemotronHConfig",
            **{k: v for k, v in LLAMA.items() if k != "num_hidden_layers"},
            layers_block_type=["linear_attention", "full_attention", "moe"],
            head_dim=8,
            ssm_state_size=8,
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            n_routed_experts=4,
            moe_intermediate_size=48,
            moe_shared_expert_intermediate_size=48,
        ),
    ),
    "tiiuae/falcon-mamba-tiny-dev": (
        CAUSAL,
        _config("FalconMambaConfig", vocab_size=1024, hidden_size=32, num_hidden_layers=2, state_size=8),
    ),
    "peft-internal-testing/tiny-clip-text-2": (
        "CLIPTextModel",
        _config("CLIPTextConfig", **SMALL, intermediate_size=64, max_position_embeddings=77),
    ),
    "peft-internal-testing/tiny-random-BertModel": ("AutoModelForPreTraining", _bert("BertConfig")),  # pooler and head
    "hf-internal-testing/tiny-random-BertModel": (BASE, _bert("BertConfig")),
    "peft-internal-testing/tiny-random-RobertaModel": (BASE, _bert("RobertaConfig")),
    "peft-internal-testing/tiny-random-DebertaModel": (BASE, _bert("DebertaConfig", **_DEBERTA)),
    "peft-internal-testing/tiny-random-DebertaV2Model": (BASE, _bert("DebertaV2Config", **_DEBERTA)),
    "bert-base-uncased": (CLASSIFIER, _bert("BertConfig")),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (CLASSIFIER, _bert("BertConfig")),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (CLASSIFIER, _bert("RobertaConfig")),
    "peft-internal-testing/tiny-random-t5": (SEQ2SEQ, _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": (SEQ2SEQ, _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (SEQ2SEQ, _T5),
    "google/flan-t5-small": (SEQ2SEQ, _T5),
    "google/flan-t5-base": (SEQ2SEQ, _T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        SEQ2SEQ,
        _config(
            "BartConfig",
            vocab_size=1024,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=256,
        ),
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "AutoModelForImageClassification",
        _config(
            "ResNetConfig",
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
        ),
    ),
}


# Revisions of a model other than its main one, which have other weights.
REVISIONS = {"peft-internal-testing/tiny-random-BertModel": "v2.0.0"}
# Adapters of the hub of which the tests read the configuration, at a revision.
ADAPTERS = {"peft-internal-testing/tiny-opt-lora-revision": "test"}
PIPELINE = "hf-internal-testing/tiny-sd-pipe"


def build(cache: Path) -> Path:
    """Write every model that is not there yet below `cache`/hub and return that folder."""
    hub = cache / "hub"
    for name, (auto, config) in MODELS.items():
        _lay(hub, name, "main", lambda folder, a=auto, c=config: _write(folder, a, c(), seed=0))  # type: ignore[misc]
        if name in REVISIONS:
            _lay(hub, name, REVISIONS[name], lambda folder, a=auto, c=config: _write(folder, a, c(), seed=1))  # type: ignore[misc]
    for name, revision in ADAPTERS.items():
        _lay(hub, name, revision, _write_adapter_config)
    _lay(hub, PIPELINE, "main", _write_pipeline)
    return hub


def _lay(hub: Path, name: str, revision: str, write: Callable[[Path], None]) -> None:
    """Have `write` fill a snapshot of a repository where the hub's cache has it, unless it is there already."""
    folder = hub / ("models--" + name.replace("/", "--"))
    reference, snapshot = folder / "refs" / revision, sha1(f"{REVISION} {revision}".encode()).hexdigest()
    if reference.exists() and reference.read_text() == snapshot:
        return
    write(folder / "snapshots" / snapshot)
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(snapshot)


def _enliven(model: Any) -> Any:
    """Fresh models are near zero everywhere; the tests compare outputs with tolerances made for livelier ones."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _write(folder: Path, auto: str, config: Any, seed: int) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, auto)
    _enliven(kind.from_config(config) if auto.startswith("Auto") else kind(config)).save_pretrained(folder)
    if "Image" in auto:
        transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        _tokenizer().save_pretrained(folder)


def _write_adapter_config(folder: Path) -> None:
    from peft import LoraConfig

    LoraConfig(base_model_name_or_path="peft-internal-testing/opt-125m", task_type="CAUSAL_LM").save_pretrained(folder)


def _write_pipeline(folder: Path) -> None:
    """Stable Diffusion's parts, tiny: a text encoder, a UNet with attention and convolutions, an image decoder."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    groups = {"norm_num_groups": 4, "block_out_channels": (8, 16)}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        **groups,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **groups
    )
    config = transformers.CLIPTextConfig(**{**SMALL, **TOKENS}, intermediate_size=64, max_position_embeddings=77)
    tokenizer = _tokenizer()
    tokenizer.model_max_length = 77
    diffusers.StableDiffusionPipeline(
        vae=_enliven(vae),
        text_encoder=_enliven(transformers.CLIPTextModel(config)),
        tokenizer=tokenizer,
        unet=_enliven(unet),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _tokenizer() -> Any:
    """A word-level tokenizer with 1,000 words; the tests only need that there is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 1000)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="</s>", eos_token="</s>"
    )
