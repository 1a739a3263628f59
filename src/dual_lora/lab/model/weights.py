"""Which weights a base or an adapter has, without reading all of them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.model.load import locate

if TYPE_CHECKING:
    from dual_lora.lab.recipe.schema import ModelSection


PARTS = 512  # layers, and tensors outside of them, that are looked at
TENSORS = 8  # of each layer: a merge changes a few kinds of them in many layers, or all of a few layers
_LAYER = re.compile(r"(.*?\.\d+)\.")
# Of a configuration, what says who wrote it or how to train it, and not what the model computes.
_NO_MODEL = re.compile(
    r"_.*|architectures|transformers_version|torch_dtype|dtype|use_cache|model_type|initializer_range|pad_token_id"
    r"|pretraining_tp|.*(dropout|pdrop)"
)
_BUFFER = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias)$")  # which some versions save with a layer
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, struct.error)
_SETTING = "config "  # begins the name of a value of the configuration


def print_of_weights(part: ModelSection) -> dict[str, str]:
    """What the base's files hold, by samples of its layers and the values of its configuration: all may take minutes.

    By layers, so that a copy in other shards is the same. Files of other kinds (GGUF, pickled ones) are taken whole.
    Of a model on the hub those that are here; nothing where none is.
    """
    location = locate(part.path, part.revision)
    if location.gguf_file:
        return {"GGUF": _sampled(Path(location.name) / location.gguf_file)}
    here = Path(location.name)
    folder = here if here.is_dir() else _folder_here(location.name, location.revision)
    if folder is None:
        return {}
    tensors = _tensors_in(folder) or {f"file {f.name}": _sampled(f) for f in sorted(folder.glob("*.bin"))}
    return tensors | _numbers_of(folder / "config.json")


def is_another(before: object, now: dict[str, str]) -> bool | None:
    """Whether two prints are of other weights; None where nothing tells: one is missing, or files are of other kinds.

    What one of two prints alone has tells nothing: tied weights are in some files, and versions name settings anew.
    """
    if have_changed(before, now):
        return True
    known = before.keys() & now.keys() if isinstance(before, dict) else ()
    return False if any(not name.startswith(_SETTING) for name in known) else None


def nothing_tells(who: str) -> str:
    """What to say where `is_another` is None, and there are two prints."""
    return (
        f"Nothing tells whether the base model's weights are those that {who}: its files are of another kind "
        "(safetensors, GGUF), or its tensors have other names."
    )


def told_of(prints: dict[str, str]) -> str:
    """A print in a few characters."""
    return hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()[:16]


def print_of_folder(folder: Path) -> dict[str, str]:
    """What a model's or an adapter's folder holds: its weights, by files' sizes and samples, and its configuration."""
    weights = (f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") or f.name == "config.json")
    files = sorted(f for f in weights if f.is_file())
    return {file.name: _sampled(file) for file in files}


def have_changed(before: object, now: dict[str, str]) -> bool:
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
    if not {values.get(name) for name in ("rope_type", "type")} & {'"dynamic"', '"longrope"'}:
        values = {name: value for name, value in values.items() if not name.endswith("max_position_embeddings")}
    return {_SETTING + name: value for name, value in sorted(values.items())}


def _plain(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; what turns positions stands in a section of its own, of several names, since transformers 5."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _plain(value, "" if name.startswith("rope_") else f"{above}{name}.")
        elif isinstance(value, str | int | float | list) and not _NO_MODEL.fullmatch(name):
            told = json.dumps([_number(v) for v in value] if isinstance(value, list) else _number(value))
            yield above + name, told if len(told) < 80 else hashlib.sha256(told.encode()).hexdigest()[:16]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _tensors_in(folder: Path) -> dict[str, str]:
    """Prints of what safetensors files hold, whatever their shards: a layer's tensors together, others alone.

    A layer under the end of its name: `transformer.h.0` of a model with a head is `h.0` of the model without.
    """
    held: dict[str, Callable[[], str]] = {}
    only = folder / "model.safetensors"  # what transformers reads where it is there
    for file in [only] if only.is_file() else sorted(folder.glob("*.safetensors")):
        with suppress(*_DAMAGED):  # the loader says it
            held |= _tensors_of(file)
    layers: dict[str, list[str]] = {}
    for name in held:
        layer = _LAYER.match(name)
        if layer is None or not _BUFFER.search(name):
            layers.setdefault(layer[1] if layer else name, []).append(name)
    ends = Counter(_end(part) for part in layers if part not in held)
    chosen = sorted(layers, key=lambda n: (not re.search("embed|head", n), _drawn(n)))[:PARTS]
    return {
        _end(part) if ends[_end(part)] == 1 else part: _print_of_layer(part, {n: held[n] for n in layers[part]})
        for part in sorted(chosen)
    }


def _print_of_layer(part: str, tensors: dict[str, Callable[[], str]]) -> str:
    own = {name[len(part) - len(_end(part)) :]: sample for name, sample in tensors.items()}
    chosen = sorted(own, key=lambda n: ("expert" in n, _drawn(n)))[:TENSORS]  # in every layer others
    return hashlib.sha256(" ".join(f"{name} {own[name]()}" for name in chosen).encode()).hexdigest()[:8]


def _tensors_of(file: Path) -> dict[str, Callable[[], str]]:
    """What reads samples of each tensor of a file. Raises one of `_DAMAGED` for a file that is no such one."""
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
        read[name] = partial(_sampled, file, 4, 1024, first, last, f"{at['dtype']} {at['shape']}")
    return read


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _drawn(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _folder_here(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a hub would have
        return None
    return Path(file).parent if isinstance(file, str) else None


def _sampled(
    file: Path, samples: int = 64, size: int = 4096, first: int = 0, last: int | None = None, told: str = ""
) -> str:
    """A print of the size of a file, or of the bytes from `first` to `last` in it, and of parts spread over them."""
    whole = (file.stat().st_size if last is None else last) - first
    print_of = hashlib.sha256((told or str(whole)).encode())
    with file.open("rb") as held:
        for k in range(samples):
            held.seek(first + max(0, whole - size) * k // (samples - 1))
            print_of.update(held.read(min(size, whole)))
    return print_of.hexdigest()[:16]
