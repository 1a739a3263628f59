"""Files that PyTorch writes (.bin, .pt, .pth): the checks before they are read, by its reader of weights.

Such a file is a zip archive of plain entries. One that is packed as well may unpack to a thousand times its size, and a
tensor may be a view of one number, which becomes whole as soon as it is copied.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dual_lora.lab.errors import UserError, memory_full
from dual_lora.lab.read import regular

LARGEST = 10**13  # bytes
MOST_VALUES = 5_000_000  # an optimizer's state has a few for each tensor


def check_unpacked(file: Path) -> None:
    """Raise UserError for an archive with packed entries, which PyTorch never writes, and for what is no regular file.

    One of another kind, or damaged, is left to whoever reads it.
    """
    try:
        regular(file, LARGEST)
        with zipfile.ZipFile(file) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, NotImplementedError, RecursionError):
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if packed:
        raise UserError(
            f"{file} holds a packed entry, {packed[0].filename[:100]!r}, which would unpack to "
            f"{packed[0].file_size:,} bytes. PyTorch writes none: nothing was read."
        )


def check_weights(files: Iterable[Path]) -> None:
    """Raise UserError for weights of a model or an adapter that would take more memory than their file has.

    One that is damaged, or holds no weights, is left to whoever reads it.
    """
    for file in files:
        check_unpacked(file)
        try:
            held = _load_file(file)
        except Exception as error:
            if memory_full(error):
                raise
            continue
        _check_plain(held, file)


def check_no_views(file: Path) -> None:
    """Raise UserError for a file, which `check_unpacked` let pass, with a tensor of more numbers than it holds."""
    load_whole(file)


def load_whole(file: Path) -> Any:
    """Return the contents of such a file, tensors that are not copied. Raises UserError as `check_no_views` does."""
    held = _load_file(file)
    _check_plain(held, file)
    return held


def _load_file(file: Path) -> Any:
    """Return the contents of a file; of an archive nothing is copied."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _check_plain(held: Any, file: Path) -> None:
    try:
        for number, value in enumerate(_values_in(held)):
            if number > MOST_VALUES:
                raise UserError(f"{file} holds more than {MOST_VALUES:,} values, what it repeats counted again.")
            if not isinstance(value, torch.Tensor):
                continue
            if value.layout != torch.strided or value.is_meta:
                raise UserError(f"{file} holds a tensor that is not plain ({value.layout}, on {value.device}).")
            if value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise UserError(f"{file} holds a tensor of {value.numel():,} numbers, of which it has fewer.")
    except RecursionError:
        raise UserError(f"{file} is nested too deeply.") from None


def _values_in(value: Any) -> Iterator[Any]:
    """The value and all inside it. What stands in it often, as a list of lists may, comes as often."""
    yield value
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _values_in(each)
