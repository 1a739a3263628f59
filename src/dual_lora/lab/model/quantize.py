"""A base in 4 or 8 bits (`model.quantize`), packed while it is loaded: by bitsandbytes or by torchao.

The adapter's factors stay as they are. Merging takes the base as it was before it was packed. torchao's 4 bits are not
offered: the form that a CPU computes with takes a byte a number, the others need a card or a further library.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dual_lora.lab.errors import UserError

if TYPE_CHECKING:
    from dual_lora.lab.recipe.schema import ModelSection

PACKAGES = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
}
# Heads are not packed: they are drawn and trained whole, or rank every token.
WHOLE = ["lm_head", "score", "classifier", "pre_classifier", "pooler", "dense_head"]


def check_quantize(part: ModelSection, is_gguf: bool) -> None:
    """Raise UserError for a base that cannot be packed: the library is missing, or it lies in a GGUF file.

    Needs no library.
    """
    if part.quantize == "none":
        return
    package = PACKAGES[part.quantize]
    if find_spec(package) is None:
        raise UserError(
            f'model.quantize: {part.quantize} needs the package {package}: pip install "dual-lora[quantized]".'
        )
    if is_gguf:
        raise UserError(
            f"model.quantize is {part.quantize}, but transformers cannot quantise a GGUF file ({part.path}): name the "
            "model's folder of safetensors, or leave model.quantize out."
        )


def quantization_config(part: ModelSection, dtype: Any, is_gguf: bool) -> Any:
    """Return the configuration for `from_pretrained`; None for a base that stays whole. dtype: in which products are
    computed."""
    if part.quantize == "none":
        return None
    check_quantize(part, is_gguf)
    whole = WHOLE if part.head != "causal" else None
    if PACKAGES[part.quantize] == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=whole)
    from transformers import BitsAndBytesConfig

    if part.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=part.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,
    )


def check_packed(part: ModelSection, asked: Any, model: Any) -> None:
    """Raise UserError if a base came packed in another way than asked: what its own config.json says goes first."""
    found = getattr(model.config, "quantization_config", None)
    names = ("load_in_4bit", "load_in_8bit") + ("bnb_4bit_quant_type",) * bool(getattr(asked, "load_in_4bit", False))
    kinds = [[getattr(one, name, None) for name in names] + [type(getattr(one, "quant_type", None))]
             for one in (asked, found)]  # fmt: skip
    if kinds[0] != kinds[1]:
        raise UserError(
            f"model.quantize is {part.quantize}, but {part.path} is quantised already, in another way (see its "
            "config.json). Leave model.quantize out, or name the unquantised model."
        )
