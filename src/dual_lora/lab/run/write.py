"""The one way to write a file or a folder: whole or not at all, and never through somebody else's file.

The new content goes to a name of its own beside the target: drawn at random, made with O_EXCL and O_NOFOLLOW, so that
it follows no link and meets no other writer. It reaches the disk and takes the target's place in one step. After a
crash at any moment the old content is there or the new one. Nothing that was not made here is removed, but for the
target.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import read_object

WHOLE = "complete.json"  # written last into a folder: the names and sizes of its files
REMAINS = tuple(f"**/.*.{'?' * 16}.part{inside}" for inside in ("", "/**/*"))  # globs of what a killed writer leaves
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new one at every moment. A link at `path` is replaced, not followed."""
    part = _beside(path)
    try:
        with os.fdopen(os.open(part, _EXCLUSIVE, 0o666), "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text. NaN and infinity, which JSON does not have and other programs refuse, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_atomically(path, json_text(value, indent=1) + "\n")


def write_folder_atomically(target: Path, write: Callable[[Path], None], listed: bool = False) -> None:
    """``write(folder)`` fills a folder beside ``target``, which then takes its place. listed: see `mark_whole`."""
    part = _beside(target)
    part.mkdir()
    try:
        write(part)
        if listed:
            mark_whole(part)
        for each in (*part.rglob("*"), part):
            sync(each)
        if target.exists():
            shutil.rmtree(target)
        part.replace(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(target.parent)


def mark_whole(folder: Path) -> None:
    """List a folder's files with their sizes in it, once all of them have reached the disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != WHOLE)
    folders = (*(p for p in folder.rglob("*") if p.is_dir()), folder.parent, folder.parent.parent)
    for each in (*files, *folders):
        sync(each)
    write_json(folder / WHOLE, {str(file.relative_to(folder)): file.stat().st_size for file in files})


def sizes_of(folder: Path) -> dict[Path, Any]:
    """The files that were written into a folder, by its list, with their sizes; none without a list."""
    try:
        return {folder / name: size for name, size in read_object(folder / WHOLE).items()}
    except (OSError, ValueError):
        return {}


def free_folder(out: str | Path) -> Path:
    """Where a folder may be written: one that is not there or empty; of a link, what it names. UserError otherwise."""
    target = Path(out)
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"The output folder {out} is not empty: give another one.")
    return target


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def sync(path: Path) -> None:
    """Have a file or a folder reach the disk."""
    if os.name == "nt" and path.is_dir():
        return
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
