"""W + ΣΔW to be used, kept, merged or cached, by whom the layer's forward is computed as well."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .blocked import Adapter, RowSource


def compose(
    weight: Tensor | RowSource | None, adapters: Sequence[Adapter], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """W + ΣΔW, [O, I]: the rounding to `dtype` of the fp32 sum. `out` may be the weight itself."""
    device = adapters[0].scale.device
    with dispatch.without_autocast(device):
        return dispatch.implementation(device, dtype, weight, adapters).compose(weight, adapters, dtype, out)
