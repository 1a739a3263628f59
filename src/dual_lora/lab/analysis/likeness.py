"""The likeness of two updates of the same weight, and DoRA's view of an update as magnitude and direction.

An update of 16 million entries has a cosine near 0 with any other by chance alone (its spread is 1/√(O I)), and two
subspaces of k among n directions overlap by k/n by chance: both are given with the figures.
"""

import math
import statistics

import torch
from torch import Tensor

from dual_lora.lab.analysis.matrices import Matrix, blocks, row_spans
from dual_lora.lab.analysis.measures import threshold_of_largest

LARGEST = (0.01, 0.1)  # shares of the target's entries whose signs are compared
SUBSPACE = 8  # singular directions compared on either side


def likeness(update: Matrix, target: Matrix) -> dict[str, float]:
    """Measure the likeness of `update` to `target` (full fine-tuning's, say).

    cosine: of the two as vectors. norm_relative: ‖update‖ / ‖target‖. On the target's largest 1 % and 10 % of entries:
    agree_1 (moved the same way), disagree_1, rest_1 (not moved), agree_10 and so on; agreement_1 is agree over agree +
    disagree, 0.5 by chance. overlap_left, overlap_right: ‖UᵀU'‖²/k of the leading k singular subspaces, 1 for equal
    ones, overlap_*_chance by chance; angle_left, angle_right: smallest principal angle in degrees.
    """
    return entry_likeness(update, target) | _subspaces(update, target, SUBSPACE)


def entry_likeness(update: Matrix, target: Matrix) -> dict[str, float]:
    """The part of `likeness` that looks at entries alone."""
    if update.shape != target.shape:
        raise ValueError(f"Updates of shapes {update.shape} and {target.shape} belong to different layers.")
    dots = own = other = 0.0
    limits = {share: threshold_of_largest(target, share) for share in LARGEST}
    counts = {share: [0.0, 0.0, 0.0] for share in LARGEST}
    for a, b in blocks(update, target):
        dots += float((a.double() * b.double()).sum())
        own += float(a.double().square().sum())
        other += float(b.double().square().sum())
        signs = torch.sign(a) * torch.sign(b)
        for share, limit in limits.items():
            chosen = signs[(b.abs() >= limit) & (b != 0)]
            for row, sign in enumerate((1, -1, 0)):
                counts[share][row] += float((chosen == sign).sum())
    result = {
        "cosine": _ratio(dots, math.sqrt(own * other)),
        "cosine_chance": 1 / math.sqrt(update.shape[0] * update.shape[1]),
        "norm_relative": _ratio(math.sqrt(own), math.sqrt(other)),
    }
    for share, (agree, disagree, rest) in counts.items():
        label, total = f"{share * 100:g}", agree + disagree + rest
        result |= {
            f"agree_{label}": _ratio(agree, total),
            f"disagree_{label}": _ratio(disagree, total),
            f"rest_{label}": _ratio(rest, total),
            f"agreement_{label}": _ratio(agree, agree + disagree),
        }
    return result


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _subspaces(update: Matrix, target: Matrix, k: int) -> dict[str, float]:
    k = min(k, *update.shape)
    (U, V), (U2, V2) = leading_subspaces(update, k), leading_subspaces(target, k)
    result: dict[str, float] = {"subspace": k}
    for side, first, second, n in (("left", U, U2, update.shape[0]), ("right", V, V2, update.shape[1])):
        cosines = torch.linalg.svdvals(first.t() @ second).clamp_(0, 1)
        result[f"overlap_{side}"] = float(cosines.square().sum()) / k
        result[f"overlap_{side}_chance"] = k / n
        result[f"angle_{side}"] = math.degrees(math.acos(float(cosines[0])))
    return result


def leading_subspaces(matrix: Matrix, k: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the k leading left and right singular subspaces, fp64 [O, k] and [I, k].

    Subspace iteration with twice as many directions, by blocks of rows; the same start at every call. A gap between
    singular values k and 2k of 10 % leaves an error of 0.9^(2 · 8) ≈ 0.19 of the weakest direction.
    """
    O, I = matrix.shape
    generator = torch.Generator().manual_seed(0)
    width = min(2 * k, O, I)
    V = torch.randn(I, width, generator=generator, dtype=torch.float64).to(matrix.device)
    for _ in range(8):
        V = torch.linalg.qr(_transposed_product(matrix, _product(matrix, torch.linalg.qr(V).Q)))[0]
    U, _, Wt = torch.linalg.svd(_product(matrix, V), full_matrices=False)
    return U[:, :k], (V @ Wt.t())[:, :k]


def _product(matrix: Matrix, V: Tensor) -> Tensor:
    return torch.cat([block.double() @ V for (block,) in blocks(matrix)])


def _transposed_product(matrix: Matrix, Y: Tensor) -> Tensor:
    total = torch.zeros(matrix.shape[1], Y.shape[1], dtype=torch.float64, device=Y.device)
    for start, stop in row_spans(matrix):
        total += matrix.rows(start, stop).double().t() @ Y[start:stop]
    return total


def magnitude_and_direction(update: Matrix, base: Matrix, strength: float = 1.0) -> dict[str, float]:
    """DoRA's two numbers (Liu et al. 2024, eq. 3): how far W = W₀ + ΔW went from W₀, in length and in angle.

    magnitude_change: mean over output neurons of | ‖w‖ - ‖w₀‖ |. direction_change: mean of 1 - cos(w, w₀), 0 for a row
    of zeros (padding), which has no direction. A neuron's vector is a row of [O, I], as in PEFT's DoRA.
    """
    lengths = angles = 0.0
    for change, weight in blocks(update, base):
        before = weight.double()
        after = before + strength * change.double()
        a, b = after.norm(dim=1), before.norm(dim=1)
        lengths += float((a - b).abs().sum())
        turned = 1 - (after * before).sum(1) / (a * b).clamp_min(1e-300)
        angles += float(turned[a * b > 0].sum())
    return {"magnitude_change": lengths / update.shape[0], "direction_change": angles / update.shape[0]}


def correlation(x: list[float], y: list[float]) -> float | None:
    """Pearson's correlation, None where there are fewer than three points or one side does not vary."""
    try:
        return statistics.correlation(x, y) if len(x) > 2 else None
    except statistics.StatisticsError:
        return None
