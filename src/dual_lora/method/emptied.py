"""Counts of a model that FSDP2's preparation empties: its tensors go to the meta device, are sharded there and filled.

accelerate (`fsdp_cpu_ram_efficient_loading`) takes everything in the state for a shard. The warm-up's count is a whole
number that every process has: it stays out of the state of an emptied layer, and comes back from what the layer knows
by heart.
"""

from __future__ import annotations

from typing import Any

import torch

from .sharded import is_sharded


def leave_out_counts(layer: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """After state_dict() of a layer that was emptied and sharded: without its counts."""
    for adapter in layer.adapter_names():
        if layer.dual_lora_left[adapter].is_meta and is_sharded(layer.dual_lora_A[adapter]):
            state.pop(f"{prefix}dual_lora_left.{adapter}", None)


def put_counts_in(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before load_state_dict() into such a layer: with the counts that it had."""
    for adapter in layer.adapter_names():
        left, factor = layer.dual_lora_left[adapter], state.get(f"{prefix}dual_lora_A.{adapter}")
        if left.is_meta and factor is not None and is_sharded(factor):
            known = torch.tensor(layer._read[adapter].left, dtype=left.dtype, device=factor.device)
            state.setdefault(f"{prefix}dual_lora_left.{adapter}", known)
