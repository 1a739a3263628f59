"""Whether a tensor of an adapter, of any method of PEFT, holds finite numbers alone."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; in floats of eight bits as well, which `isfinite` does not know."""
    return bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all())
