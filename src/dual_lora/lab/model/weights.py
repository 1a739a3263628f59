"""The identity of a base's or an adapter's weights, without reading all of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora._warning import warn
from dual_lora.lab.model.load import BUFFER
from dual_lora.lab.model.location import locate

if TYPE_CHECKING:
    from dual_lora.lab.recipe.schema import ModelSection


TENSORS = 512  # of a model that are looked at, as many of every kind: all of them up to some 13B parameters
# Of a configuration, what says who wrote it or how to train it, and not what the model computes.
_NO_MODEL = re.compile(
    r"_.*|architectures|auto_map|transformers_version|torch_dtype|dtype|use_cache|model_type|initializer_range"
    r"|pretraining_tp|(pad|bos|eos)_token_id|id2label|label2id|is_encoder_decoder|.*(dropout|pdrop)"
)
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, struct.error)
_SETTING = "config "  # begins the name of a value of the configuration


def weights_digest(part: ModelSection) -> dict[str, str]:
    """Return digests of the base's files, by samples of many tensors and the values of its configuration: all may take
    minutes.

    By tensors, so that a copy in other shards is the same. Files of other kinds (GGUF, pickled ones) are taken whole.
    Of a model on the hub those that are here; nothing where none is.
    """
    location = locate(part.path, part.revision)
    if location.gguf_file:
        return {"GGUF": _sampled(Path(location.name) / location.gguf_file)}
    here = Path(location.name)
    folder = here if here.is_dir() else folder_here(location.name, location.revision)
    if folder is None:
        return {}
    tensors = _tensors_in(folder) or {f"file {f.name}": _sampled(f) for f in sorted(folder.glob("*.bin"))}
    return tensors | _numbers_of(folder / "config.json")


def is_other_base(before: object, now: dict[str, str]) -> bool | None:
    """Whether two prints are of other weights; None where nothing tells: one is missing, or files are of other kinds.

    What one of two prints alone has tells nothing: tied weights are in some files.
    """
    old, new = tensor_digests(before), tensor_digests(now)
    # A model with a head calls `transformer.h.0` what the one without calls `h.0`.
    pairs = [(old, new), (_shortened(old, new), new), (old, _shortened(new, old))]
    old, new = max(pairs, key=lambda pair: len(pair[0].keys() & pair[1].keys()))
    return weights_changed(old, new) if old.keys() & new.keys() else None


def _shortened(prints: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return a digest without that first part of its names with which the fewest of them are those of another digest.
    In one pass, since a digest may come with somebody else's adapter and have any number of names."""
    gained = Counter[str]()
    for name in prints:
        begin, dot, rest = name.partition(".")
        if dot:
            gained[begin + dot] += (rest in others) - (name in others)
    begin = max(gained, key=lambda begin: gained[begin], default="")
    return {name.removeprefix(begin): value for name, value in prints.items()}


def other_settings(before: object, now: dict[str, str]) -> list[str]:
    """Values of the configuration that differ, in words. Versions name and write some anew, so it may be the same."""
    old = before if isinstance(before, dict) else {}
    names = sorted(name for name in old.keys() & now.keys() if name.startswith(_SETTING) and old[name] != now[name])
    return [f"{name.removeprefix(_SETTING)} was {old[name]} and is {now[name]}" for name in names]


def warn_of_doubt(before: object, now: dict[str, str], who: str) -> None:
    """Warn where nothing tells whether it is the base that `who` says, and of other values in its configuration."""
    if before and now and is_other_base(before, now) is None:
        warn(
            f"It cannot be checked whether the base model's weights are those that {who}: its files are of another "
            "kind (safetensors, GGUF), or its tensors have other names.",
            stacklevel=3,
        )
    if found := other_settings(before, now):
        warn(
            f"The base model's configuration is not the one that {who}: {', '.join(found)}. Restore it if that "
            "changes what the model computes.",
            stacklevel=3,
        )


def tensor_digests(prints: object) -> dict[str, object]:
    """Return the part of a digest that is about the weights themselves: {} where only the configuration was there."""
    return {n: v for n, v in prints.items() if not n.startswith(_SETTING)} if isinstance(prints, dict) else {}


def short_digest(prints: dict[str, str]) -> str:
    """Return a digest in a few characters."""
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]


def folder_digest(folder: Path) -> dict[str, str]:
    """Return digests of a model's or an adapter's folder: its weights, by files' sizes and samples, and its
    configuration."""
    weights = (f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") or f.name == "config.json")
    files = sorted(f for f in weights if f.is_file())
    return {file.name: _sampled(file) for file in files}


def weights_changed(before: object, now: Mapping[str, object]) -> bool:
    """Whether a print says that other weights are there by now.

    What one of two prints alone has tells nothing: a folder may hold more.
    """
    return isinstance(before, dict) and any(before[name] != now[name] for name in before.keys() & now.keys())


def _numbers_of(config: Path) -> dict[str, str]:
    """The plain values of a configuration, and its lists of such."""
    try:
        values = dict(_plain(json.loads(config.read_bytes())))
    except (OSError, ValueError, ArithmeticError, AttributeError, RecursionError):  # damaged: the loader says it
        return {}
    # The longest length counts where positions are stretched by it, and is a limit elsewhere.
    kinds = {value for name, value in values.items() if name.rpartition(".")[2] in ("rope_type", "type")}
    if not kinds & {'"dynamic"', '"longrope"', '"yarn"'}:
        values = {n: value for n, value in values.items() if n.rpartition(".")[2] != "max_position_embeddings"}
    return {_SETTING + name: value for name, value in sorted(values.items())}


def _plain(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; what turns positions stands in a section of its own, of several names, since transformers 5."""
    for name, value in values.items():
        if _NO_MODEL.fullmatch(name):
            continue
        if isinstance(value, dict):
            yield from _plain(value, above if name.startswith("rope_") else f"{above}{name}.")
        elif isinstance(value, str | int | float | list):
            text = json.dumps([_number(v) for v in value] if isinstance(value, list) else _number(value))
            yield above + name, text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()[:16]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _tensors_in(folder: Path) -> dict[str, str]:
    """Return digests of tensors in safetensors files, whatever their shards: of each kind the same number, in other
    layers."""
    held: dict[str, Callable[[], str]] = {}
    only = folder / "model.safetensors"  # what transformers reads where it is there
    for file in [only] if only.is_file() else sorted(folder.glob("*.safetensors")):
        with suppress(*_DAMAGED):  # the loader says it
            held |= _tensors_of(file)
    kinds: dict[str, list[str]] = {}
    for name in sorted((name for name in held if not BUFFER.search(name)), key=_sampling_key):
        kinds.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    rounds = (one for some in itertools.zip_longest(*kinds.values()) for one in some if one is not None)
    return {name: held[name]() for name in sorted(itertools.islice(rounds, TENSORS))}


def _sampling_key(name: str) -> bytes:
    """An order by chance, which is that of `h.0.attn.weight` for `transformer.h.0.attn.weight` as well."""
    layer = re.search(r"\.(\d+\..*)", name)
    return hashlib.sha256((layer[1] if layer else name).encode()).digest()


def _tensors_of(file: Path) -> dict[str, Callable[[], str]]:
    """Return functions that read samples of each tensor of a file. Raises one of `_DAMAGED` for a file of another
    kind."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length)) if length < size else {}
    header.pop("__metadata__", None)
    read: dict[str, Callable[[], str]] = {}
    for name, at in header.items():
        first, last = (8 + length + int(offset) for offset in at["data_offsets"])
        if not 0 <= first <= last <= size:
            raise ValueError(f"{name} does not lie in the file")
        read[name] = partial(_sampled_tensor, file, first, last, f"{at['dtype']} {at['shape']}")
    return read


def _sampled_tensor(file: Path, first: int, last: int, kind: str) -> str:
    return _sampled(file, 4, 1024, first, last, kind)[:8]


def folder_here(name: str, revision: str | None) -> Path | None:
    """The folder that a model of the hub has in the cache, None for one that is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a hub would have
        return None
    return Path(file).parent if isinstance(file, str) else None


def _sampled(
    file: Path, samples: int = 64, size: int = 4096, first: int = 0, last: int | None = None, kind: str = ""
) -> str:
    """A print of the size of a file, or of the bytes from `first` to `last` in it, and of parts spread over them."""
    whole = (file.stat().st_size if last is None else last) - first
    digest = hashlib.sha256((kind or str(whole)).encode())
    with file.open("rb") as held:
        for k in range(samples):
            held.seek(first + max(0, whole - size) * k // (samples - 1))
            digest.update(held.read(min(size, whole)))
    return digest.hexdigest()[:16]
