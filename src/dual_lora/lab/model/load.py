"""Load a model and its tokenizer from a folder, the hub, a GGUF file or an installed package."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dual_lora._warning import warn
from dual_lora.lab.errors import UserError, being_read, described, memory_full
from dual_lora.lab.memory import allow_mapped
from dual_lora.lab.model.device import best_device, is_sharded_launch
from dual_lora.lab.model.location import (
    Location,
    check_answers,
    check_settings,
    is_here,
    locate,
    suggest_model,
)
from dual_lora.lab.model.named_files import (
    check_templates,
    check_tokenizer_arguments,
    check_tokenizer_rules,
    check_whole_model,
    weights_of,
)
from dual_lora.lab.model.own_code import is_plain, own_code_hint, unasked
from dual_lora.lab.model.quantize import check_packed, quantization_config
from dual_lora.lab.read import folded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dual_lora.lab.recipe.schema import ModelSection

# Decoders out of encoders whose positions begin behind the padding token's: neither ours nor those of `generate` do.
SHIFTED = {
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod", "roberta-prelayernorm",
}  # fmt: skip
# Of versions that save these.
BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention)\.(bias|masked_bias))$")
# Of a GGUF file: architectures whose scaling of positions transformers takes over, and what it calls special tokens.
_SCALED = ("gpt-oss",)
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
UNREAD = "this model has no place for and leaves out, the first of them %s: it may be another one than was meant."


@dataclass
class Loaded:
    """A model with its tokenizer. ``fresh`` names the modules whose weights were drawn, not read (a new head)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fresh: list[str] = field(default_factory=list)


def load_tokenizer(path: str, location: Location | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at ``path``, with a padding token. location: of a revision, a folder without model."""
    import transformers
    from packaging.version import Version
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    location = location or locate(path)
    with _clear_errors(path), quick_reading(location):
        check_tokenizer_arguments(location.name, location.revision)
        check_tokenizer_rules(location.name, location.revision)
        with _explain_missing_tokenizer(path):
            tokenizer = AutoTokenizer.from_pretrained(location.name, **location.arguments())
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"The model {path!r} has a {type(tokenizer).__name__}, which is no tokenizer of one model.")
        check_tokenizer_rules(location.name, location.revision, tokenizer)
        if location.gguf_file and Version(transformers.__version__) < Version("5.20"):
            set_special_tokens(Path(location.name) / location.gguf_file, tokenizer)
    check_templates(path, tokenizer.chat_template)
    if is_plain(tokenizer):
        tokenizer.init_kwargs.pop("auto_map", None)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Texts that are too long are cut or left out, and counted: the warning of an index error would be wrong.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def load_model(part: ModelSection, num_labels: int | None = None, device: str | None = None) -> Loaded:
    """Model and tokenizer of a recipe's ``model`` part, on the best device (or ``device``), in evaluation mode.

    num_labels: number of classes, for head "classification". Seed before the call: a new head is drawn at random.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from dual_lora.lab.model.pickled import check_weights
    from dual_lora.method.layers.quantized_rows import keep_unpacked

    location = locate(part.path, part.revision)
    check_settings(location)
    with _clear_errors(part.path), quiet():
        check_whole_model(location.name, location.revision)
        weights = weights_of(location.name, location.revision)
        allow_mapped(weights)
        check_weights(file for file in weights if folded(file.name).endswith(".bin"))
    tokenizer = load_tokenizer(part.path, location)
    arguments: dict[str, Any] = {"dtype": getattr(torch, dtype_of(part, device)), **location.arguments()}
    if part.attention:
        arguments["attn_implementation"] = part.attention
    if packed := quantization_config(part, arguments["dtype"], location.gguf_file is not None):
        arguments["quantization_config"] = packed
        if device is not None or not is_sharded_launch():
            arguments["device_map"] = {"": device or best_device()}  # packed where it will be
    factory: Any = AutoModelForCausalLM
    if part.head != "causal":
        factory = AutoModelForSequenceClassification
        arguments["num_labels"] = num_labels
    with _clear_errors(part.path), quiet(), quick_reading(location):
        model, info = factory.from_pretrained(location.name, output_loading_info=True, **arguments)
        if packed:
            check_packed(part, packed, model)
        if is_plain(model):
            vars(model.config).pop("auto_map", None)
        if location.gguf_file:
            forget_packing(model)
            check_whole(Path(location.name) / location.gguf_file, model, part.head == "causal")
    # A decoder with a head for classes looks for the last token that is no padding, of the kind that rows are given.
    if part.head != "causal" or getattr(model.config.get_text_config(), "pad_token_id", None) is None:
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    fresh = sorted({key.rsplit(".", 1)[0] for key in info["missing_keys"]})
    if part.head == "causal":
        _check_language_model(part.path, model.config.model_type, fresh)
    inside = f"{model.base_model_prefix}."
    if drawn := sorted(key for key in info["missing_keys"] if key.startswith(inside) and "pooler" not in key):
        raise UserError(
            f"{part.path} is not the whole of a {type(model).__name__}: it does not hold {drawn[0]} and "
            f"{len(drawn) - 1} more weights of the model below its head, which would be drawn at random."
        )
    # transformers' own report is kept quiet. Heads for other tasks and masks (GPT-2's and its kin's) do no harm.
    left = (key for key in info["unexpected_keys"] if key.startswith(inside) and ".pooler." not in key)
    if unread := sorted(key for key in left if not BUFFER.search(key)):
        warn(f"{part.path} holds {len(unread)} weights that {UNREAD % unread[0]}", stacklevel=2)
    gather_for_head(model)
    keep_unpacked(model)  # or a validation in training ends the gradients of any method on 4 bits
    if not packed and (device is not None or not is_sharded_launch()):
        model.to(device or best_device())
    return Loaded(model.eval(), tokenizer, fresh)


def _check_language_model(path: str, kind: str, fresh: list[str]) -> None:
    """Raise UserError for a model that cannot write: of another kind, or without its head. fresh: modules not read."""
    if kind in SHIFTED:
        raise UserError(
            f"Models of type {kind} cannot be trained as language models here ({path}): they number positions from the "
            "padding token's number on, and this command numbers them from 0. Use a causal language model, or your own "
            "script."
        )
    if fresh:
        check_answers(path)
        raise UserError(
            f"{path} is not a causal language model: it has no weights for {', '.join(fresh)}. To predict classes or "
            "numbers with it, set model.head to classification or regression."
        )


def quick_reading(location: Location) -> contextlib.AbstractContextManager[None]:
    """Make transformers, inside the block, read this model's GGUF file quickly, and within bounds: see `read_once`."""
    if location.gguf_file is None:
        return contextlib.nullcontext()
    from dual_lora.lab.model.read_gguf import read_once

    return read_once(Path(location.name) / location.gguf_file)


def dtype_of(part: ModelSection, device: str | None = None) -> str:
    """The precision of a recipe's ``model`` part, what `auto` stands for on the device in its place."""
    if part.dtype != "auto":
        return part.dtype
    from dual_lora.lab.model.precision import DTYPES, fast_precision

    return DTYPES[fast_precision(device).precision]


def gather_for_head(model: Any) -> None:
    """Give the output head its positions in one piece.

    With ``logits_to_keep`` they are a slice of all positions, which torch multiplies row by row of the batch on a CPU
    in bf16, with a copy of the head's weight each time (SmolLM2, batch 8: 450 MB, and forty times the product's time).
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, positions: (positions[0].contiguous(), *positions[1:]))


def forget_packing(model: PreTrainedModel) -> None:
    """Weights read from a GGUF file are plain tensors, but transformers keeps them marked as packed, and then
    neither saves nor trains them (transformers 5.24)."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]


class _GgufContents(NamedTuple):
    """The contents of a GGUF file: how its positions are scaled, if they are, the size of each tensor, and ids of
    tokens."""

    scaling: str
    sizes: dict[str, int]
    tokens: dict[str, int]


def check_whole(file: Path, model: Any, language: bool = True) -> None:
    """Raise UserError if the model that was read from a GGUF file lacks what stands in it.

    A language model has as many weights as the file, and what stands below another head as many as the file without
    its own; long-context factors of positions (Llama 3.1 and later) are a tensor or a field of their own.
    """
    held = _contents_of(file, file.stat().st_mtime_ns)
    way_out = "transformers leaves that out, and the model would be another one: use the model's folder of safetensors."
    if held.scaling:
        raise UserError(f"{file} scales its positions ({held.scaling}); {way_out}")
    # Where tied, a head of its own in the file, as Bloom's have, is a copy.
    headless = not language or model.config.tie_word_embeddings
    wanted = sum(size for name, size in held.sizes.items() if not (headless and name == "output.weight"))
    read = sum(p.numel() for p in (model if language else model.base_model).parameters())
    if wanted != read:
        raise UserError(f"{file} holds {wanted:,} weights, of which the model that was read has {read:,}; {way_out}")


def set_special_tokens(file: Path, tokenizer: Any) -> None:
    """Give a tokenizer that was read from a GGUF file the special tokens that the file names."""
    for name, id in _contents_of(file, file.stat().st_mtime_ns).tokens.items():
        if getattr(tokenizer, f"{name}_id") != id:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))


@lru_cache(maxsize=8)
def _contents_of(file: Path, changed: int) -> _GgufContents:
    """Return the contents of a GGUF file. Takes a second, most of it for the vocabulary: a study's runs read the same
    file. changed: its time."""
    from dual_lora.lab.model.read_gguf import reader_of

    reader = reader_of(file)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    scaling = [name for name in sizes if name.startswith("rope_f")]
    if not scaling and architecture not in _SCALED and field(f"{architecture}.rope.scaling.type") not in (None, "none"):
        scaling = ["rope.scaling.type"]
    ids = {name: field(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _TOKENS.items()}
    return _GgufContents(", ".join(scaling), sizes, {name: int(id) for name, id in ids.items() if id is not None})


@contextlib.contextmanager
def quiet() -> Any:
    """Switch off transformers' progress bars and load reports: they would tear the progress display."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _explain_missing_tokenizer(path: str) -> Any:
    """Say that a tokenizer is missing: the first line of transformers' own error ends before it says anything."""
    try:
        yield
    except ValueError as error:
        if "instantiate the backend tokenizer" not in str(error):
            raise
        raise UserError(
            f"The model {path!r} has no tokenizer that can be read, expected tokenizer.json next to config.json. "
            "Save one into the model's folder: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER). "
            "If it has a tokenizer.model, `pip install sentencepiece tiktoken` may be enough."
        ) from error


@contextlib.contextmanager
def _clear_errors(path: str) -> Any:
    try:
        with being_read(f"The model {path!r}"), unasked():
            yield
    except UserError:
        raise
    except Exception as error:
        if memory_full(error):
            raise
        # Readers of foreign files raise whatever comes: struct.error, SafetensorError, KeyError.
        first = described(error, OSError, ValueError, lines=1)
        where, near = ("", "") if is_here(path) else (" (there is no such folder here)", suggest_model(path))
        raise UserError(
            f"The model {path!r} could not be loaded{where}: {first}{own_code_hint(error)}{near}"
        ) from error
