"""W + ΣΔW to be kept, merged or cached: by whom the layer's forward is computed as well.

On a GPU that the Triton kernels are right on, forward finds P and Q with them; a merge by other products might find
another sign where Q is within rounding of zero. Small weights of many layers are composed in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocked
from .blocked import Adapter, RowSource
from .op import _triton, without_autocast

SMALL = 1 << 22
"""Entries of a weight that are written before the next launch has left Python: 4 M in bf16 take 5 µs of an H100's
memory traffic (a model, nothing was timed)."""


class Job(NamedTuple):
    """One weight to compose: [O, I], its adapters, and the dtype of the result."""

    weight: Tensor
    adapters: Sequence[Adapter]
    dtype: torch.dtype


def compose(weight: Tensor | RowSource | None, adapters: Sequence[Adapter], dtype: torch.dtype) -> Tensor:
    """W + ΣΔW, [O, I]: the rounding to `dtype` of the fp32 sum."""
    with without_autocast(adapters[0].scale.device):
        if (weight is None or isinstance(weight, Tensor)) and _by_kernel(weight, adapters, dtype):
            from . import triton_compose

            return triton_compose.compose(weight, [a.working() for a in adapters], dtype)
        return blocked.compose(weight, adapters, dtype)


def shares_a_launch(job: Job) -> bool:
    """Whether it pays to compose this weight together with others: a small row-major one, and the kernels take it."""
    weight, adapters, dtype = job
    return weight.numel() <= SMALL and weight.is_contiguous() and _by_kernel(weight, adapters, dtype)


def compose_together(jobs: Sequence[Job]) -> list[Tensor]:
    """The same for weights that share a launch, in as few launches as their ranks, forms and dtypes allow."""
    if not jobs:
        return []
    from . import triton_group

    with without_autocast(jobs[0].weight.device):
        return triton_group.compose_group([job._replace(adapters=[a.working() for a in job.adapters]) for job in jobs])


def _by_kernel(weight: Tensor | None, adapters: Sequence[Adapter], dtype: torch.dtype) -> bool:
    device = adapters[0].scale.device
    if weight is not None and weight.device != device:
        return False
    kernels = _triton() if device.type == "cuda" else None
    return kernels is not None and kernels.knows(device, dtype, weight, adapters)
