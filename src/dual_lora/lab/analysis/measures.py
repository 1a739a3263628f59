"""Zeros, signs and sizes of one update, and what changed between two, in one pass over blocks of rows."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dual_lora.lab.analysis.matrices import Factored, Matrix, blocks


def measure(update: Matrix, base: Matrix | None = None, strength: float = 1.0) -> dict[str, float]:
    """Shares of all entries and norms.

    zero, positive, negative: shares of the update's entries. direction_positive: share of Sign(DC) = +1, moved or not
    (Dual LoRA). norm: Frobenius norm; rms, largest: of the entries. norm_ratio, largest_ratio: the same against the
    base weight's norm and root mean square. Norms are multiplied by `strength` (λ), shares are not.
    """
    positive = negative = squares = 0.0
    largest = torch.zeros((), device=update.device)
    for (block,) in blocks(update):
        positive += float((block > 0).sum())
        negative += float((block < 0).sum())
        squares += float(block.double().square().sum())
        largest = torch.maximum(largest, block.abs().max())
    O, I = update.shape
    entries = O * I
    norm = strength * math.sqrt(squares)
    result = {
        "zero": 1 - (positive + negative) / entries,
        "positive": positive / entries,
        "negative": negative / entries,
        "norm": norm,
        "rms": norm / math.sqrt(entries),
        "largest": strength * float(largest),
    }
    base_squares = 0.0 if base is None else squared_norm(base)
    if base_squares:
        result["norm_ratio"] = norm / math.sqrt(base_squares)
        result["largest_ratio"] = result["largest"] / math.sqrt(base_squares / entries)
    if isinstance(update, Factored) and update.adapter.form.direction == "sign":
        signs = update.group("direction")
        result["direction_positive"] = sum(float((block > 0).sum()) for (block,) in blocks(signs)) / entries
    return result


def measured(
    update: Matrix, base: Matrix | None, strength: float, earlier: Mapping[str, Matrix | None]
) -> dict[str, float]:
    """A layer's row: its shape, `measure`, and `changes` since earlier updates, under their names (start_flipped)."""
    O, I = update.shape
    row = {"O": O, "I": I, "strength": strength, **measure(update, base, strength)}
    for name, before in earlier.items():
        if before is not None:
            row |= {f"{name}_{key}": share for key, share in changes(before, update).items()}
    return row


def squared_norm(matrix: Matrix) -> float:
    """‖·‖²_F."""
    return sum(float(block.double().square().sum()) for (block,) in blocks(matrix))


def changes(old: Matrix, new: Matrix) -> dict[str, float]:
    """Measure the changes from one update to another, as shares of all entries.

    flipped: moved before and after, in opposite directions. switched_on, switched_off: zero before, not zero after,
    and the reverse (for Dual LoRA: ReLU opened or closed). direction_flipped: Sign(DC) changed, moved or not.
    An entry that went and came back between the two is not seen.
    """
    counts = {"flipped": 0.0, "switched_on": 0.0, "switched_off": 0.0}
    for before, after in blocks(old, new):
        before, after = torch.sign(before), torch.sign(after)
        counts["flipped"] += float((before * after < 0).sum())
        counts["switched_on"] += float(((before == 0) & (after != 0)).sum())
        counts["switched_off"] += float(((before != 0) & (after == 0)).sum())
    entries = new.shape[0] * new.shape[1]
    result = {name: count / entries for name, count in counts.items()}
    if isinstance(old, Factored) and isinstance(new, Factored) and new.adapter.form.direction == "sign":
        signs = old.group("direction"), new.group("direction")
        result["direction_flipped"] = sum(float((a != b).sum()) for a, b in blocks(*signs)) / entries
    return result


def threshold_of_largest(matrix: Matrix, share: float) -> float:
    """The absolute value that the largest `share` of the entries reach, to one part in 2,000.

    Counted in bins of the leading bits of a float, which order positive numbers; nothing is sorted or kept.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0 and up to 1.")
    shift = 12  # keeps the exponent and 11 bits of the mantissa
    counts = torch.zeros(1 << (31 - shift), dtype=torch.int64)
    for (block,) in blocks(matrix):
        bits: Tensor = block.abs().contiguous().view(torch.int32) >> shift
        counts += torch.bincount(bits.flatten().cpu(), minlength=len(counts))
    wanted = max(1, round(share * matrix.shape[0] * matrix.shape[1]))
    reached = counts.flip(0).cumsum(0)
    bin_number = len(counts) - 1 - int((reached >= wanted).nonzero()[0])
    return float(torch.tensor(bin_number << shift, dtype=torch.int32).view(torch.float32))
