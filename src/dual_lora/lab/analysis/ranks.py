"""The number of directions of an update: effective, stable and numerical rank, and what ReLU and Sign may do to a rank.

The honest bound. BA has rank r1 and DC has rank r2, but an element-wise function keeps no rank: it may raise it or
lower it (`rank_examples` shows both). With r ≥ 2 nothing better than min(O, I) holds for ReLU(BA), for Sign(DC), or
for their product; only rank-1 factors bound it. rank(X ⊙ Y) ≤ rank X · rank Y (Schur) gives no more.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dual_lora.core.reference import Form, direction, magnitude
from dual_lora.lab.analysis.matrices import Matrix, row_spans


def singular_values(matrix: Matrix) -> Tensor:
    """All singular values, falling, fp64 [min(O, I)].

    From the Gram matrix of the smaller side, summed in fp64: good down to 1e-8 of the largest value, and the rank
    of an fp32 matrix is decided above that. Holds min(O, I)² numbers of 8 bytes.
    """
    O, I = matrix.shape
    gram = torch.zeros(min(O, I), min(O, I), dtype=torch.float64, device=matrix.device)
    for start, stop in row_spans(matrix):
        block = matrix.rows(start, stop).double()
        if O > I:
            gram.addmm_(block.t(), block)
            continue
        for low, high in row_spans(matrix):
            if low <= start:  # of the symmetric matrix the lower half, which is all that eigvalsh reads
                gram[start:stop, low:high] = block @ matrix.rows(low, high).double().t()
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp_(min=0).sqrt().flip(0)


def ranks(matrix: Matrix) -> dict[str, float]:
    """Three measures of rank, and how many directions hold 90 % and 99 % of the squared norm.

    rank_effective: exp of the entropy of the normalised singular values (Roy and Vetterli 2007). rank_stable:
    ‖·‖²_F / σ₁². rank_numerical: singular values above max(O, I) · ε(fp32) · σ₁.
    """
    values = singular_values(matrix)
    if not values[0] > 0:
        return dict.fromkeys(
            ("rank_effective", "rank_stable", "rank_numerical", "rank_90", "rank_99", "largest_singular_value"), 0.0
        )
    share = values / values.sum()
    share = share[share > 0]
    squares = values.square()
    held = squares.cumsum(0) / squares.sum()
    limit = max(matrix.shape) * torch.finfo(torch.float32).eps * values[0]
    return {
        "rank_effective": float(torch.exp(-(share * share.log()).sum())),
        "rank_stable": float(squares.sum() / squares[0]),
        "rank_numerical": float((values > limit).sum()),
        "rank_90": float((held < 0.9).sum() + 1),
        "rank_99": float((held < 0.99).sum() + 1),
        "largest_singular_value": float(values[0]),
    }


def rank_bound(r1: int, r2: int, form: Form, shape: tuple[int, int]) -> int:
    """The largest rank that ΔW can have at these ranks, for any factors.

    ReLU(u vᵀ) = ReLU(u) ReLU(v)ᵀ + ReLU(-u) ReLU(-v)ᵀ has rank 2 at most; Sign(u vᵀ) lies in the span of three row
    patterns (one for each sign of u). From rank 2 on, ReLU and Sign can reach full rank.
    """
    full = min(shape)
    if form.direction == "frozen":
        return full
    first = r1 if form.magnitude == "identity" else (2 if r1 == 1 else full)
    second = r2 if form.direction == "identity" else (3 if r2 == 1 else full)
    return min(full, first * second)


class RankExample(NamedTuple):
    """A small matrix, what is done to it, and the rank before and after."""

    what: str
    operation: str
    before: int
    after: int
    size: int


def rank_examples(size: int = 16) -> list[RankExample]:
    """Matrices whose rank ReLU or Sign raises or lowers, computed with `core`'s own functions.

    [size, size], fp64. `size` is also the rank that the best case reaches.
    """
    i = torch.arange(size, dtype=torch.float64)
    ramp, other = i[:, None] - i[None], i[:, None] + i[None] - size  # rank 2 each
    low = torch.tensor([[1.0, -1.0], [1.0, -2.0]], dtype=torch.float64)
    positive = 1 + torch.diag(torch.ones(size, dtype=torch.float64))
    outer = torch.where(i % 2 == 0, 1.0, -1.0).double()[:, None] * (i + 1)[None]
    form = Form()
    cases = [
        ("i - j", "ReLU", ramp, magnitude(ramp, form)),
        ("i - j", "Sign", ramp, direction(ramp, form)),
        ("i - j and i + j - n", "ReLU ⊙ Sign", ramp, magnitude(ramp, form) * direction(other, form)),
        ("u vᵀ, u of both signs, v positive", "ReLU", outer, magnitude(outer, form)),
        ("u vᵀ, u of both signs, v positive", "Sign", outer, direction(outer, form)),
        ("[[1, -1], [1, -2]]", "ReLU", low, magnitude(low, form)),
        ("1 + identity", "Sign", positive, direction(positive, form)),
        ("-(1 + identity)", "ReLU", -positive, magnitude(-positive, form)),
    ]
    return [
        RankExample(what, operation, _rank(before), _rank(after), len(before))
        for what, operation, before, after in cases
    ]


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix))
