"""Who holds what on n devices.

| strategy | weights | gradients | optimizer | beside them |
|---|---|---|---|---|
| ddp | whole | whole | whole | buckets as large as the gradients |
| zero1 | whole | whole | 1/n, and fp32 copies of what is trained | a bucket |
| zero2 | whole | 1/n | the same | a bucket |
| zero3 | 1/n | 1/n | the same | up to 10⁹ whole parameters, a bucket |
| fsdp2 | 1/n | 1/n | 1/n | what lies outside the blocks, and three blocks: in use, coming, being unpacked |

Buckets and whole parameters are DeepSpeed's defaults (reduce_bucket_size, stage3_max_live_parameters), which the
shipped accelerate configurations leave as they are. Activations are each device's own: `batch` is that of one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dual_lora.lab.errors import UserError, suggest

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]

BUCKET = 5e8  # elements, DeepSpeed's reduce_bucket_size; allocated whole, however little is trained
MOST_WHOLE = 1e9  # parameters, DeepSpeed's stage3_max_live_parameters
BLOCKS = 3  # that FSDP2 holds whole at a time


@dataclass(frozen=True)
class Shard:
    """Bytes on one device; gradients and updated are shares: of all gradients, and of what its optimizer updates.

    buffers: of the communication, always there; gathered: parameters that are whole during forward and backward;
    in_flight: whole gradients of blocks in backward.
    """

    weights: float
    trained: float
    optimizer: float
    gradients: float = 1.0
    updated: float = 1.0
    buffers: float = 0.0
    gathered: float = 0.0
    in_flight: float = 0.0

    def reducing(self, segment: str) -> float:
        """Whole gradients that wait to be reduced in this part of the step."""
        return self.in_flight if segment.startswith("backward") else 0.0


def shard_of(
    strategy: str,
    n: int,
    *,
    weights: float,
    trained: float,
    optimizer: float,
    block: float,
    block_trained: float,
    layers: int,
    parameters: float,
    item: int,
) -> Shard:
    """The share of one device. weights, trained, optimizer: bytes of the whole; block: bytes of one block's parameters.

    parameters: number of trained ones; item: bytes of one value in the base's dtype.
    Raises UserError for a strategy that is not known or n < 1.
    """
    if strategy not in get_args(Strategy):
        raise UserError(f"strategy is {strategy!r}.{suggest(strategy, get_args(Strategy))}")
    if n < 1:
        raise UserError(f"devices is {n}, expected at least 1.")
    if n == 1:
        return Shard(weights, trained, optimizer)
    if strategy == "ddp":
        return Shard(weights, trained, optimizer, buffers=trained)
    if strategy == "fsdp2":
        outside = max(0.0, weights + trained - layers * block)
        whole = outside + BLOCKS * block
        return Shard(weights / n, trained / n, optimizer / n, 1 / n, 1 / n, gathered=whole, in_flight=2 * block_trained)
    master = (optimizer + 4 * parameters) / n
    bucket = BUCKET * item
    if strategy == "zero1":
        return Shard(weights, trained, master, 1.0, 1 / n, bucket)
    if strategy == "zero2":
        return Shard(weights, trained, master, 1 / n, 1 / n, bucket)
    whole = min(weights + trained, MOST_WHOLE * item + block)
    return Shard(weights / n, trained / n, master, 1 / n, 1 / n, bucket, whole)
