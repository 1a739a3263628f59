"""Floating-point operations of the operators, for `torch.utils.flop_counter`, to which they would count nothing.

    linear:  2·T·O·I + 2·O·I·(r1 + r2) forward, 4·T·O·I + 6·O·I·(r1 + r2) backward

Backward makes dx, G, P and Q again and four small gradients; without dx or the factors' gradients, less. Shapes come in
the operators' own order.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import compose_op, embedding_op, op, sampled  # noqa: F401 - they define the operators
from .tokens import AUTO, MIN_TOKENS

Shape = Sequence[int]


def linear(T: int, O: int, I: int, ranks: int) -> int:
    """Forward of the layer. ranks: r1 + r2 of all its adapters."""
    return 2 * T * O * I + composition(O, I, ranks)


def linear_backward(T: int, O: int, I: int, ranks: int, need_x: bool = True, need_factors: bool = True) -> int:
    """Its backward: dx, the masked G, P and Q once more, the four small gradients."""
    of_factors = composition(O, I, 2 * ranks) * need_factors
    return 2 * (need_x + need_factors) * T * O * I + composition(O, I, ranks) + of_factors


def composition(O: int, I: int, ranks: int) -> int:
    """P and Q."""
    return 2 * O * I * ranks


def sizes(x: Shape, factors: Sequence[Shape]) -> tuple[int, int, int, int]:
    """T, O, I and the sum of all ranks (every other factor is A or C, [r, I])."""
    return math.prod(x[:-1]), factors[1][-2], factors[0][-1], sum(f[-2] for f in factors[::2])


def register() -> None:
    """Enter the formulas into PyTorch's table, once that has been imported."""
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.dual_lora, name))(formula)


def _linear(x: Shape, weight: Any, bias: Any, factors: Sequence[Shape], *rest: Any, **out: Any) -> int:
    return linear(*sizes(x, factors))


def _linear_backward(
    dy: Shape, x: Shape, weight: Any, factors: Sequence[Shape], scales: Any, mean_squares: Any, forms: Any,
    loss_scale: Any, share: float, draw: Any, need_x: bool, need_weight: bool, need_factors: bool, **out: Any,
) -> int:  # fmt: skip
    T, O, I, ranks = sizes(x, factors)
    spared = T - _sampled(T, share) if draw is not None else 0
    need_G = need_factors or need_weight
    whole = linear_backward(T, O, I, ranks, need_x, need_factors)
    return whole + 2 * T * O * I * (need_G - need_factors) - 2 * spared * O * I


def _weight(weight: Any, factors: Sequence[Shape], *rest: Any, **out: Any) -> int:
    _, O, I, ranks = sizes((1, 1), factors)
    return composition(O, I, ranks) * _experts(factors[0], rest[4])


def _weight_backward(G: Shape, factors: Sequence[Shape], *rest: Any, **out: Any) -> int:
    return 3 * _weight(G, factors, *rest)


def _embedding(indices: Shape, weight: Any, factors: Sequence[Shape], *rest: Any, **out: Any) -> int:
    _, O, I, ranks = sizes((1, 1), factors)
    return composition(min(math.prod(indices), O), I, ranks)  # no more rows than indices


def _embedding_backward(dy: Shape, indices: Shape, factors: Sequence[Shape], *rest: Any, **out: Any) -> int:
    return 3 * _embedding(indices, None, factors)


def _sampled_gradient(dy: Shape, x: Shape, shape: Shape, share: float, *rest: Any, **out: Any) -> int:
    is_convolution = bool(rest[2])
    O, each = (shape[0], math.prod(shape)) if is_convolution else (shape[-2], shape[-2] * shape[-1])  # of one expert
    return 2 * _sampled(math.prod(dy) // O, share) * each


def _through_rows_backward(dy: Shape, weight: Any, I: int, **out: Any) -> int:
    return 2 * math.prod(dy) * I


def _sampled(T: int, share: float) -> int:
    """Tokens of a sample; all of them where they depend on the values."""
    return T if share == AUTO else min(T, max(MIN_TOKENS, round(share * T)))


def _experts(A: Shape, routed: Any) -> int:
    return 1 if len(A) == 2 else A[0] if routed is None else routed[0]


_FORMULAS: dict[str, Any] = {
    "linear": _linear,
    "linear_backward": _linear_backward,
    "weight": _weight,
    "weight_backward": _weight_backward,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "sampled_gradient": _sampled_gradient,
    "through_rows_backward": _through_rows_backward,
}
