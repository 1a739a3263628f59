"""Working memory that calls on a CPU share.

What a call allocates anew, the system may hand over page by page, each of them zeroed first: for weights of 384² to
1,536² that took longer than the arithmetic (docs/explanation/performance-notes.md). So each thread keeps the buffers of
its last calls, some 20 MB. Nothing that a caller gets lies in them, and one call at a time uses them: none of `core`
calls another while it works on its buffers.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST, LARGEST = 1 << 17, 32 << 20
"""Bytes between which a buffer is kept; smaller ones do not come from the system page by page."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def flat(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `size` numbers, uninitialised, which the next call for this name and dtype gets as well."""
    if device.type != "cpu" or not SMALLEST < size * dtype.itemsize <= LARGEST:
        return torch.empty(size, dtype=dtype, device=device)
    found = _kept.buffers.get((name, dtype))
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            found = _kept.buffers[name, dtype] = torch.empty(size, dtype=dtype)
    return found[:size]


def matrices(rows: int, cols: int, dtype: torch.dtype, device: torch.device, names: Sequence[str]) -> list[Tensor]:
    """The same as matrices [rows, cols], one for each name."""
    size = rows * cols
    if size * dtype.itemsize <= SMALLEST:
        return list(torch.empty(len(names), rows, cols, dtype=dtype, device=device).unbind())
    return [flat(name, size, dtype, device).view(rows, cols) for name in names]
