"""Which weights a base or an adapter has, without reading all of them."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.model.load import locate

if TYPE_CHECKING:
    from dual_lora.lab.recipe.schema import ModelSection


TENSORS = 32  # of a model that are looked at: a merge or a training changes many more, and the note of them stays short
# Of a configuration, what says who wrote it or how to train it, and not what the model computes.
_NO_MODEL = re.compile(
    r"_.*|transformers_version|torch_dtype|dtype|use_cache|model_type|initializer_range|pad_token_id|pretraining_tp"
    r"|max_position_embeddings|.*(dropout|pdrop)"
)
_SETTING = "config "  # begins the name of a value of the configuration


def print_of_weights(part: ModelSection) -> dict[str, str]:
    """What the base's files hold, by parts of some tensors and the numbers of its configuration: all may take minutes.

    By tensors, so that a copy in other shards is the same. Files of other kinds (GGUF, pickled ones) are taken whole.
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
    """The plain values of a configuration."""
    try:
        values = json.loads(config.read_bytes())
    except (OSError, ValueError):
        return {}
    return {_SETTING + name: value for name, value in sorted(_plain(values))} if isinstance(values, dict) else {}


def _plain(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Names and values; what turns positions stands in a section of its own, of several names, since transformers 5."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _plain(value, "" if name.startswith("rope_") else f"{above}{name}.")
        elif isinstance(value, str | int | float) and not _NO_MODEL.fullmatch(name):
            number = isinstance(value, int) and not isinstance(value, bool)
            yield above + name, json.dumps(float(value) if number else value)


def _tensors_in(folder: Path) -> dict[str, str]:
    """Prints of the tensors in safetensors files: of all, or of as many as are looked at, whatever their shards."""
    held: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    only = folder / "model.safetensors"  # what transformers reads where it is there
    for file in [only] if only.is_file() else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened, suppress(ValueError, struct.error):  # a damaged one is the loader's to say
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length)) if length < file.stat().st_size else {}
            held |= {name: (file, 8 + length, at) for name, at in header.items()}
    held.pop("__metadata__", None)
    order = sorted(held, key=lambda n: (not re.search("embed|head", n), hashlib.sha256(n.encode()).digest()))
    return {name: _sampled_tensor(*held[name]) for name in sorted(order[:TENSORS])}


def _sampled_tensor(file: Path, begin: int, at: dict[str, Any]) -> str:
    first, last = at["data_offsets"]
    return _sampled(file, 4, 1024, begin + first, begin + last, f"{at['dtype']} {at['shape']}")[:8]


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
