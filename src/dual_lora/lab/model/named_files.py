"""Checks of what a model's settings name: files of its own folder, and tokens by a number that has an end.

Loaders open whatever is named, wherever it lies: a text in `vocab` of tokenizer_config.json is a file whose lines
become the vocabulary, which is saved with each run and merged model, and uploaded. An index names files of weights, and
an adapter_config.json next to a config.json an adapter, which transformers puts onto the model unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.tokenizer_rules import check_rules
from dual_lora.lab.read import entries_named, read_object, regular

ARGUMENTS = ("tokenizer_config.json", "special_tokens_map.json")  # of the tokenizer's class, both of them
# Arguments that no tokenizer opens. Where a file of the first two kinds lay is noted by every older transformers.
_NO_FILES = re.compile(
    r"(tokenizer_file|special_tokens_map_file|name_or_path|auto_map|chat_template|content|.*_(tokens?|side|class|type))"
)
_SOUGHT = ("gguf_file", "cache_dir", "token", "proxies")  # by these it would be sought in another place
# What transformers notes itself of where it lies, for which the second of these files would put something else.
_NOTED = ("name_or_path", "is_local", "local_files_only", "tokenizer_file")
_LONGEST = 4096  # characters of a path
_TEMPLATE = re.compile(r"[\w\-][\w.\-]{0,99}")
MOST_TEMPLATES = 100
# By these a tokenizer makes tokens of its own, or fills up a text's; published ones have some 100, and widths of 1000.
MADE = re.compile(r"extra_ids|offset|num_\w+|(max|pad)_(width|depth)")
MOST_MADE = 2000
LARGEST_NUMBER = 2_000_000  # of a token; the largest published vocabularies have 262,144
MOST_SPECIAL = 10_000  # the time that they take grows with their square; published ones have some 1000


def check_tokenizer_arguments(model: str, revision: str | None = None) -> None:
    """Raise UserError for a tokenizer whose settings name a file outside of its folder or another place to seek it,
    tokens without an end, or a class that is no tokenizer.

    model: folder or hub name.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    from dual_lora.verify.parts import check_parts  # late: it brings PEFT

    every = {name: _settings(model, name, revision) for name in ARGUMENTS}
    of_model = configuration(model, revision)
    try:
        check_parts(of_model)  # transformers reads it to find the tokenizer's class, in an adapter's folder too
    except ValueError as error:
        raise UserError(f"The folder {model}: {error}") from None
    for name, settings in every.items():
        _check_token_count(settings, f"{name} of {model}", of_model)
        others = [key for key in _SOUGHT if settings.get(key)]
        if name == ARGUMENTS[1]:
            others += [key for key in _NOTED if key in settings]
        for key in others:
            raise UserError(
                f"{name} of {model} has {key} {settings[key]!r:.200}, by which the tokenizer would be sought in "
                f"another place. Nothing was read: remove {key}."
            )
        for key, text in _texts_in(settings):
            if _is_outside(text, [model] + [HF_HUB_CACHE] * key.endswith("_file")):
                raise UserError(
                    f"{name} of {model} names a file as {key}, {text[:200]}, which lies outside of its folder: "
                    "the file's content would become a part of the tokenizer and be saved with it. Nothing "
                    f"was read: remove {key}."
                )
    for where, settings in ((ARGUMENTS[0], every[ARGUMENTS[0]]), ("config.json", of_model)):
        _check_class(settings.get("tokenizer_class"), f"{where} of {model}")


def _check_class(name: Any, where: str) -> None:
    """Raise UserError for a class of transformers that is no tokenizer. It would load what it is for, such as a whole
    model with all its parts, of files that nothing has looked at."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
    from transformers.utils.import_utils import DummyObject  # of one whose library is missing

    for each in (name, f"{name}Fast", name.removesuffix("Fast")) if isinstance(name, str) else ():
        kind: Any = tokenizer_class_from_name(each)
        if kind is None or isinstance(kind, DummyObject):
            continue
        if not isinstance(kind, type) or not issubclass(kind, PreTrainedTokenizerBase):
            raise UserError(f"{where} has tokenizer_class {name[:100]!r}, which is no tokenizer of one model.")


def check_tokenizer_rules(model: str, revision: str | None, tokenizer: Any = None) -> None:
    """Raise UserError for a tokenizer whose rules make very much out of little.

    tokenizer: as it was loaded, of whatever files. Without it tokenizer.json is read, whose rules are used on its own
    tokens while it is loaded.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        others = _settings(model, ARGUMENTS[0], revision).get("fast_tokenizer_files")  # of other versions
        for name in ["tokenizer.json", *map(str, others if isinstance(others, list) else ())]:
            check_rules(_settings(model, name, revision), f"{name} of {model}")
    elif backend is not None:
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest > LARGEST_NUMBER:
            raise UserError(
                f"The tokenizer of {model} has a token of the number {largest:,}, expected at most "
                f"{LARGEST_NUMBER:,}: to save it takes memory for each number below."
            )
        parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
        check_rules({name: json.loads(part.__getstate__()) for name, part in parts.items() if part}, model)


def _check_token_count(settings: dict[str, Any], where: str, config: dict[str, Any]) -> None:
    """Raise UserError for more tokens than a tokenizer can be built with in a minute. config: the model's."""
    for key, value in settings.items():
        if MADE.fullmatch(key) and isinstance(value, int) and value > MOST_MADE:
            raise UserError(f"{where} has {key} {value:,}, expected at most {MOST_MADE:,}.")
    lists = [value for key, value in settings.items() if "special_tokens" in key and isinstance(value, list | dict)]
    count = max(map(len, lists), default=0)
    added = settings.get("added_tokens_decoder")
    if isinstance(added, dict) and len(added) > MOST_SPECIAL and _is_in_python(settings, config):
        count = max(count, len(added))
    if count > MOST_SPECIAL:
        raise UserError(f"{where} has {count:,} special tokens, expected at most {MOST_SPECIAL:,}.")


def _is_in_python(settings: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a tokenizer may be one of transformers' own, in Python, which adds tokens slowly."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    of_kind: Any = TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))
    names = [settings.get("tokenizer_class"), config.get("tokenizer_class")]
    names += of_kind if isinstance(of_kind, list | tuple) else [of_kind]
    kinds = [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    return any(isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizer) for kind in kinds)


def check_templates(model: str, templates: Any) -> None:
    """Raise UserError for chat templates that could not be saved with a run, which would be said at its end: their
    names become files."""
    named = templates if isinstance(templates, dict) else {} if templates is None else {"default": templates}
    if len(named) > MOST_TEMPLATES:
        raise UserError(f"{model} has {len(named):,} chat templates, expected at most {MOST_TEMPLATES}.")
    for name, text in named.items():
        if not isinstance(name, str) or not _TEMPLATE.fullmatch(name):
            raise UserError(f"{model} has a chat template named {name!r:.200}, expected letters, digits, '_' and '-'.")
        if not isinstance(text, str):
            raise UserError(f"The chat template {name} of {model} is no text: {text!r:.100}.")


def check_whole_model(model: str, revision: str | None = None) -> None:
    """Raise UserError for a model with an adapter in its folder, and for weights in other folders than the model's."""
    if _file_of(model, "adapter_config.json", revision):
        raise UserError(
            f"{model} has an adapter_config.json. If it is an adapter, name its base; if it is a model, move "
            "that file away, or transformers would put the adapter onto the model without a look at its patterns and "
            "numbers."
        )
    check_plain_names(Path(model))


def check_plain_names(folder: Path) -> None:
    """Raise UserError for an index in a folder that names weights in another one, or what are no files of weights."""
    for index in entries_named(folder, "*.index.json"):
        for shard in _shards(index):
            check_plain_name(shard, str(index))


def check_plain_name(name: str, where: str, kinds: tuple[str, ...] = (".safetensors", ".bin")) -> None:
    """Raise UserError for a file of weights that lies in another folder, or is of another kind: transformers takes all
    but safetensors for PyTorch's. where: what names it."""
    if len(PurePosixPath(name).parts) != 1 or len(PureWindowsPath(name).parts) != 1 or not name.endswith(kinds):
        raise UserError(
            f"{where} names {name[:200]!r}, expected files of weights that lie next to it ({' or '.join(kinds)})."
        )


def weights_of(model: str, revision: str | None = None) -> list[Path]:
    """A model's files of weights, safetensors or PyTorch's; of one on the hub those that transformers would read."""
    folder = Path(model)
    if folder.is_dir():
        return entries_named(folder, "*.safetensors", "*.bin")
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if first := _file_of(model, name, revision):
            names = _shards(Path(first)) if name.endswith(".json") else {name}
            return [Path(file) for file in _files_of(model, sorted(names), revision)]
    return []


def _shards(index: Path) -> set[str]:
    weights = _read(index).get("weight_map")
    return set(map(str, weights.values())) if isinstance(weights, dict) else set()


def _is_outside(text: str, roots: list[str]) -> bool:
    try:
        path = Path(text)
        there = len(text) <= _LONGEST and path.exists() and not path.is_dir()
        return there and not any(path.resolve().is_relative_to(Path(root).resolve()) for root in roots)
    except (OSError, ValueError):  # no name that a file has
        return False


def _texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Texts that a tokenizer might open, each with the name that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            if not _NO_FILES.fullmatch(name):
                yield from _texts_in(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each, key)


def configuration(model: str, revision: str | None) -> dict[str, Any]:
    """Return what transformers takes for a model's config.json, which may name another file; {} if it cannot be
    read."""
    from transformers import PretrainedConfig

    try:
        return dict(PretrainedConfig.get_config_dict(model, revision=revision)[0])
    except Exception:  # of a folder that has none, or of a damaged file, which its own reader will report
        return {}


def _settings(model: str, name: str, revision: str | None) -> dict[str, Any]:
    file = _file_of(model, name, revision)
    return _read(Path(file)) if file else {}


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} for a damaged one, which its own reader will report. Raises UserError for a
    file that is not read here, and might be there."""
    try:
        regular(file)
    except ValueError as error:
        raise UserError(f"{file} was not read: {error}.") from None
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def _file_of(model: str, name: str, revision: str | None) -> str | None:
    """Return the path of a model's file, of one on the hub in the cache; None where there is none."""
    folder = Path(model)
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    return next(iter(_files_of(model, [name], revision)), None)


def _files_of(model: str, names: list[str], revision: str | None) -> list[str]:
    """Where files of a model on the hub lie in the cache, which takes them in; those that are there."""
    from transformers.utils.hub import cached_files

    kinds = ("missing_entries", "connection_errors", "gated_repo")
    quietly: Any = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    return cached_files(model, names, revision=revision, **quietly) or []
