"""How wide the factors are drawn at the start, and the signs of the start "aligned": Sign(D C) = d cᵀ, of rank one.

A and B see the gradient G ⊙ Sign(D C). With signs d [O] and c [I] it has the singular values of G itself. Signs of
Gaussian factors would spread them: where G is of low rank, as gradients of real layers nearly are, A could not turn to
its directions, and 20 steps would gain 0.4 to 0.6 of what LoRA's gain (576 wide).
"""

from typing import Any

import torch
from torch import Tensor

STD, OTHER_STD, EARLIER_STD = 0.04, 0.1, 0.02
"""σ by default: of the default start, with aligned signs or none, and of the paper's start and earlier versions."""

GAIN = 1.5
"""Width of A by default, in units of LoRA's. Random signs gain less than LoRA where the gradient is of low rank."""


def std_of(config: Any, default: float) -> float:
    """Return σ of C and D, and with an earlier start of the others. default: of the default start in this layer."""
    if config.init_std is not None or not config.starts_like_lora:
        return config.init_std or EARLIER_STD
    return default if _random_signs(config) else OTHER_STD


def gain_of(config: Any, default: float) -> float:
    """Return how many times as wide as LoRA's A is drawn. default: of the default start in this layer."""
    return config.init_gain or (default if _random_signs(config) else 1.0)


def _random_signs(config: Any) -> bool:
    return config.init_weights is True and config.direction_activation == "sign"


@torch.no_grad()
def give_signs_of_rank_one(factor: Tensor, rank_dimension: int) -> None:
    """Give each column of C [r2, I], or each row of D [O, r2], one random sign, and keep the absolute values.

    rank_dimension: -2 of C, -1 of D.
    """
    one_each = list(factor.shape)
    one_each[rank_dimension] = 1
    factor.abs_().mul_(torch.randint(0, 2, one_each, device=factor.device) * 2 - 1)
