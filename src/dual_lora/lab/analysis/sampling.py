"""The cost of estimating the weight's gradient from a sample of the tokens: variance, layer by layer.

With K = (dy dyᵀ) ⊙ (x xᵀ), T × T over the tokens of a micro-batch, ‖Σ_t w_t dy_t x_tᵀ‖² = wᵀ K w for any weights w. So
the error of a draw is exact, and nothing of the weight's size is made.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dual_lora.core.tokens import AUTO, WaterFilling, gradient_variance, leverage, sample_size, water_filling
from dual_lora.lab.analysis.gradients import Batch, Call, LossOf, evaluating, watched
from dual_lora.lab.analysis.updates import adapted_layers

SHARES = (0.5, 0.25, 0.1)
DRAWS = 16  # evenly spread: a draw is one number in [0, 1)
ROWS = 1024  # of K at a time


def sampling_pass(
    model: Any, batches: list[Batch], loss_of: LossOf, names: Collection[str] | None = None
) -> dict[str, dict[str, float]]:
    """Return means over the micro-batches, by linear layer (all, or those named).

    tokens: of a micro-batch; zero_rows: share of them whose dy is zero, which are left out anyway. added_50, added_25,
    added_10: variance that a sample of this share adds to G, over the variance that G has already as the sum over the
    batch's sequences (of a single sequence: as if its tokens were independent); uniform_25: the same for a quarter
    drawn without looking. auto_share: share of the tokens that `token_sampling="auto"` takes; auto_added: what it adds.

    The shares are taken as they are: an adapter with `token_sampling` never takes fewer than 64 tokens. The model is
    left without gradients.
    """
    layers = {n: layer for n, layer in adapted_layers(model).items() if names is None or n in names}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)

    def see(name: str, call: Call) -> None:
        x, dy = (t.detach() for t in call)
        sequences = x.shape[0] if x.ndim > 2 else 1
        found[name].append(_figures(dy.flatten(0, -2), x.flatten(0, -2), sequences))

    model.zero_grad(set_to_none=True)
    with evaluating(model), watched(layers, see), torch.enable_grad():
        for batch in batches:
            loss_of(model, batch).backward()
    model.zero_grad(set_to_none=True)
    return {name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} for name, rows in found.items()}


def _figures(dy: Tensor, x: Tensor, sequences: int) -> dict[str, float]:
    T, made = len(x), water_filling(leverage(dy, x))
    draws = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    taken = {f"{share:.0%}".strip("%"): [max(1, round(share * T))] * DRAWS for share in SHARES}
    taken["auto"] = [
        sample_size(T, AUTO, made, partial(gradient_variance, dy, x, sequences, made, draw)) for draw in draws
    ]
    errors = [_error_weights(made, counts, draws, T) for counts in taken.values()]
    each = torch.eye(sequences, device=x.device).repeat_interleave(T // sequences, dim=0) - 1 / sequences
    squares = squared_sums(dy, x, torch.cat([torch.ones(T, 1, device=x.device), each, *errors], dim=1))
    whole, spread, *others = squares.split([1, sequences, *[DRAWS] * len(taken)])
    tokens = float(made.rest_squared[0])
    own = float(spread.sum()) * sequences / (sequences - 1) if sequences > 1 else tokens
    quarter = max(1, round(T / 4))
    uniform = T * (T - quarter) / quarter / max(T - 1, 1) * (tokens - float(whole) / T)
    row = {"tokens": float(T), "zero_rows": float((made.scores == 0).double().mean())}
    row |= {f"added_{name}": _over(float(error.mean()), own) for name, error in zip(taken, others, strict=True)}
    row["auto_added"] = row.pop("added_auto")
    return row | {"uniform_25": _over(uniform, own), "auto_share": sum(taken["auto"]) / DRAWS / T}


def squared_sums(dy: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """‖Σ_t w_t dy_t x_tᵀ‖² for each column w of `weights` [T, n]; dy [T, O], x [T, I]; fp64 [n]."""
    dy, x, weights = dy.double(), x.double(), weights.double()
    total = weights.new_zeros(weights.shape[1])
    for dy_rows, x_rows, rows in zip(dy.split(ROWS), x.split(ROWS), weights.split(ROWS), strict=True):
        K = (dy_rows @ dy.t()) * (x_rows @ x.t())
        total += (rows * (K @ weights)).sum(0)
    return total


def _error_weights(made: WaterFilling, counts: Sequence[int], draws: Tensor, T: int) -> Tensor:
    """Return the error of each draw's estimate of G, as weights of the tokens, [T, draws]."""
    wrong = torch.full((T, len(draws)), -1.0, dtype=torch.float64, device=made.scores.device)
    for column, (n, draw) in enumerate(zip(counts, draws, strict=True)):
        if n >= T:
            wrong[:, column] = 0
        else:
            wrong[:, column].index_add_(0, *made.draw(n, draw.to(wrong.device)))
    return wrong


def _over(value: float, own: float) -> float:
    return max(value, 0.0) / own if own else 0.0
