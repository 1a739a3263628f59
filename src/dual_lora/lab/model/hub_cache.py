"""The hub's cache, which may be somebody's archive: its links may not lead out of it.

It holds each file as a blob, named by its hash, and snapshots of links to them. What a link elsewhere shows would be
saved with each run and merged model, and uploaded.
"""

import hashlib
from pathlib import Path

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import has_second_name, regular

WEIGHTS = (".safetensors", ".bin", ".gguf")  # which people link, and which are read as numbers


def check_cached(name: str) -> None:
    """Raise UserError for a model of the hub whose part of the cache shows a file from outside. Reads no weights."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    folder = cache / "--".join(["models", *name.split("/")])
    roots = cache.resolve(), folder.resolve()  # people move single models to another disk
    snapshots = folder / "snapshots"
    for file in [snapshots, *snapshots.rglob("*")]:  # which descends into no link
        if file.suffix in WEIGHTS:
            continue
        if not any(map(file.resolve().is_relative_to, roots)):
            raise UserError(
                f"{file} leads to {file.resolve()}, outside of the hub's cache. It was not read: remove {folder}, and "
                "download the model again."
            )
        if is_a_second_name(file):
            raise UserError(
                f"{file} has a second name elsewhere (a hard link), and its content is not the hub's, so it may be a "
                f"file of yours that an archive was unpacked over. It was not read: remove {folder}, and download the "
                "model again."
            )


def is_a_second_name(file: Path) -> bool:
    """Whether a file of the cache is a hard link, and another one than between two copies of a blob: those have the
    name of their content's hash, git's or SHA-256."""
    blob = file.resolve()
    if not blob.is_file() or not has_second_name(blob):
        return False
    try:
        content = regular(blob).read_bytes()
    except (OSError, ValueError):
        return True
    as_in_git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.name not in (as_in_git.hexdigest(), hashlib.sha256(content).hexdigest())
