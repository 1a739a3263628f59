"""Working memory that calls on a CPU share.

The system hands over newly allocated memory page by page and zeroes each page first. For weights of 384² to 1,536²
that took longer than the arithmetic (docs/explanation/performance-notes.md). So each thread keeps the buffers of its
last calls, some 20 MB. No result that a caller gets lies in them, and no function of `core` calls another one while it
uses them.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST, LARGEST = 1 << 17, 32 << 20
"""Bytes between which a buffer is kept; the allocator serves smaller ones without new pages."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def flat(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory for `size` numbers; the next call for this name and dtype gets the same memory."""
    if device.type != "cpu" or not SMALLEST < size * dtype.itemsize <= LARGEST:
        return torch.empty(size, dtype=dtype, device=device)
    found = _buffers.buffers.get((name, dtype))
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            found = _buffers.buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return found[:size]


def matrices(rows: int, cols: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> list[Tensor]:
    """Return uninitialised matrices [rows, cols] like `flat`, one for each name."""
    size = rows * cols
    if size * dtype.itemsize <= SMALLEST:
        return list(torch.empty(len(names), rows, cols, dtype=dtype, device=device).unbind())
    return [flat(name, size, dtype, device).view(rows, cols) for name in names]
