"""Files that PyTorch writes (.bin, .pt, .pth): what is asked of them before they are read, by its reader of weights.

Such a file is a zip archive of plain entries. One that is packed as well may unpack to a thousand times its size, and a
tensor may be a view of one number, which becomes whole as soon as it is copied.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import regular

LARGEST = 10**13  # bytes


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


def check_no_views(file: Path) -> None:
    """Raise UserError for a file, which `check_unpacked` let pass, with a tensor of more numbers than it holds. Nothing
    of it is copied."""
    held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for tensor in _tensors_in(held):
        if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise UserError(f"{file} holds a tensor of {tensor.numel():,} numbers, of which it has fewer.")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)
