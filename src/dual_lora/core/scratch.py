"""Working memory that calls on a CPU share.

What a call allocates anew, the system may hand over page by page, each of them zeroed first: for weights of 384² to
1,536² that took longer than the arithmetic (docs/explanation/performance-notes.md). So each thread keeps the buffers of
its last calls, some 20 MB. Nothing that a caller gets lies in them, and one call at a time uses them: none of `core`
calls another while it works on its buffers.
"""

import threading

import torch
from torch import Tensor

SMALLEST, LARGEST = 1 << 17, 32 << 20
"""Bytes between which a buffer is kept; smaller ones do not come from the system page by page."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_kept = _Kept()


def matrices(rows: int, cols: int, dtype: torch.dtype, device: torch.device, *names: str) -> list[Tensor]:
    """Uninitialised matrices [rows, cols], one for each name; the next call for a name and dtype gets its memory."""
    size = rows * cols
    if device.type != "cpu" or not SMALLEST < size * dtype.itemsize <= LARGEST:
        return [torch.empty(rows, cols, dtype=dtype, device=device) for _ in names]
    buffers, found = _kept.buffers, []
    for name in names:
        flat = buffers.get((name, dtype))
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # or it could not be written to outside of it
                flat = buffers[name, dtype] = torch.empty(size, dtype=dtype)
        found.append(flat[:size].view(rows, cols))
    return found
