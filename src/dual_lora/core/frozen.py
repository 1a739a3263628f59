"""Signs of a fixed random matrix S₀ [O, I], computed entry by entry from two vectors of integers, which a seed gives.

    D [O, 1] = mix(row ⊕ seed's low half) | 1     C [1, I] = mix(column ⊕ seed's high half) | 1     S₀ = Sign(D C)

in int32, where products wrap around: bits that are the same on every device. C and D take the place of the
direction group, so that a part of a weight (a block, a shard, rows of an embedding, an expert) takes the part of S₀
that belongs to it. C and D are odd, so that no product is zero. Means, correlations of rows and of columns, and
singular values are those of independent signs (`tests/core/test_frozen.py`). mix: C. Wellons' "lowbias32", a bijection.
"""

import hashlib

import torch
from torch import Tensor


def seed_of(number: int, name: str) -> int:
    """Derive a layer's seed, a signed 64-bit integer, from the user's number and the layer's name."""
    return int.from_bytes(hashlib.blake2b(f"{number} {name}".encode(), digest_size=8).digest(), "little", signed=True)


def check_seed(seed: Tensor, name: str) -> None:
    """Raise ValueError for a seed that is no integer any more. name: of the tensor, for the message."""
    if seed.is_floating_point():
        raise ValueError(
            f"{name} is {seed.dtype}, expected torch.int64: a cast or an average has rounded the seed, and the frozen "
            "signs would be others. Cast or average floating-point tensors alone, and take the seeds from one of the "
            "states as they are."
        )


def keys(seed: Tensor, O: int, I: int) -> tuple[Tensor, Tensor]:
    """Derive C [1, I] and D [O, 1], int32, from a seed (int64, 0-dim); from seeds [E], with that leading dimension."""
    low, high = ((seed << 32) >> 32).to(torch.int32), (seed >> 32).to(torch.int32)
    rows, columns = (torch.arange(n, dtype=torch.int32, device=seed.device) for n in (O, I))
    C, D = _mix(columns ^ high.unsqueeze(-1)) | 1, _mix(rows ^ low.unsqueeze(-1)) | 1
    return C.unsqueeze(-2), D.unsqueeze(-1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ (x >> 16 & 0xFFFF)
