"""Files that servers read: an adapter's folder as PEFT saves it, and the base model's checkpoint. Headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dual_lora.verify.numbers import check_numbers

FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_BYTES, HEADER_BYTES = 1 << 22, 1 << 24  # largest that are read; the largest real ones have a tenth of that
Shapes = dict[str, tuple[int, ...]]


class AdapterError(ValueError):
    """An adapter that can't be served, in one sentence."""


def _paths(folder: str | Path) -> list[Path]:
    paths = [Path(folder) / name for name in FILES]
    for file in paths:
        try:
            found = file.is_file()
        except (OSError, ValueError) as error:  # a name that is too long, or none
            raise AdapterError(f"No adapter's folder can have the name {str(folder)!r:.100}.") from error
        if not found:
            raise AdapterError(f"{file.name} is missing in {folder}: expected an adapter's folder as PEFT saves it.")
    return paths


def shapes_of(folder: str | Path) -> Shapes:
    """Names and shapes of an adapter's tensors. Raises AdapterError for a file that is missing, half-written or not of
    floating-point numbers."""
    config, weights = _paths(folder)
    try:
        _check_sizes(config, weights)
        _check_kind(json.loads(config.read_text("utf-8")), config)
        with safe_open(str(weights), framework="pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except AdapterError:
        raise
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{folder} is damaged or still being written: {str(error).splitlines()[0]}.") from error
    try:
        check_numbers(kinds, str(folder))
    except ValueError as error:
        raise AdapterError(str(error)) from error
    return shapes


def _check_kind(values: Any, config: Path) -> None:
    kind = values.get("peft_type") if isinstance(values, dict) else values
    if not isinstance(kind, str):
        raise AdapterError(f"{config.name} in {config.parent} names no method as its peft_type: is it an adapter's?")


def _check_sizes(config: Path, weights: Path) -> None:
    """Raise AdapterError for what would be read for seconds, while nothing else runs in the process."""
    size = config.stat().st_size
    if size > CONFIG_BYTES:
        raise AdapterError(f"{config.name} in {config.parent} has {size:,} bytes; at most {CONFIG_BYTES:,} are read.")
    with weights.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < header <= weights.stat().st_size:
        raise AdapterError(
            f"The header of {weights.name} in {weights.parent} has {header:,} bytes; at most {HEADER_BYTES:,} are read."
        )


def version_of(folder: str | Path) -> tuple[tuple[int, ...], ...]:
    """Tells an adapter's files from others that have come in their place. Raises AdapterError if one is missing."""
    return version_of_files(_paths(folder))


def version_of_files(files: Iterable[Path]) -> tuple[tuple[int, ...], ...]:
    states = [file.stat() for file in sorted(files)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states)


def checkpoint_of(folder: str | Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Names of a checkpoint's tensors, with shape and whether they are floating-point; reads headers only."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                part = tensors.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype() in ("F32", "BF16", "F16"))
    if not found:
        raise AdapterError(f"{folder} holds no *.safetensors file: which model is the base?")
    return found
