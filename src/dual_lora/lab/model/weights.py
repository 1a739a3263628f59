"""Which weights a base or an adapter has, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from dual_lora.lab.model.load import locate

if TYPE_CHECKING:
    from dual_lora.lab.recipe.schema import ModelSection


def print_of_weights(part: ModelSection) -> dict[str, str]:
    """What the base's files hold, by their sizes and samples of them: whole ones may take minutes to read.

    Of a model on the hub those that are here; nothing where none is.
    """
    location = locate(part.path, part.revision)
    if location.gguf_file:
        return {location.gguf_file: _sampled(Path(location.name) / location.gguf_file)}
    here = Path(location.name)
    folder = here if here.is_dir() else _folder_here(location.name, location.revision)
    return print_of_folder(folder) if folder else {}


def print_of_folder(folder: Path) -> dict[str, str]:
    """What a model's or an adapter's folder holds: its weights, by files' sizes and samples, and its configuration."""
    weights = (f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin") or f.name == "config.json")
    files = sorted(f for f in weights if f.is_file())
    return {file.name: _sampled(file) for file in files}


def have_changed(before: object, now: dict[str, str]) -> bool:
    """Whether a print says that other weights are there by now.

    What one of two prints alone has tells nothing: a copy may be in other shards, and a folder may hold more.
    """
    return isinstance(before, dict) and any(before[name] != now[name] for name in before.keys() & now.keys())


def _folder_here(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a hub would have
        return None
    return Path(file).parent if isinstance(file, str) else None


def _sampled(file: Path, samples: int = 64, size: int = 4096) -> str:
    """A print of a file's size and of parts that are spread over it."""
    whole = file.stat().st_size
    print_of = hashlib.sha256(str(whole).encode())
    with file.open("rb") as held:
        for k in range(samples):
            held.seek(max(0, whole - size) * k // (samples - 1))
            print_of.update(held.read(size))
    return print_of.hexdigest()[:16]
