"""The tokens that the weight's gradient G = Σ_t dy_t x_tᵀ is computed from: those that are not zero, or a sample.

Rows of dy that are zero (padding, tokens without a loss in the last block) add nothing: leaving them out is exact.

A sample of n tokens is drawn with inclusion probabilities π by their leverage ‖dy_t‖ · ‖x_t‖, which is the norm of
what a token adds, and weighed by 1/π: Ĝ = Σ dy_t x_tᵀ / π_t has the expectation G. π = min(1, c · leverage), with c
such that Σ π = n (water-filling), and the sampling is systematic: one uniform number for all, and n tokens whatever it
is. As in VCAS (Wang et al., arXiv 2402.17227) and WTA-CRS (Liu et al., arXiv 2305.15265).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EXACT, AUTO = 1.0, 0.0
"""Shares of the tokens with a special meaning: all tokens, and as few as `VARIANCE_BOUND` allows."""

MIN_TOKENS = 64
"""Tokens below which nothing is sampled or left out."""

VARIANCE_BOUND = 0.05
"""Variance that `AUTO` may add, as a share of the variance between the batch's sequences."""

PROBES = 4
MIN_ZERO_SHARE = 0.05
"""Share of the rows that have to be zero before they are left out."""

_HUGE = 1e150  # the leverage of NaN and infinity, so that a sample contains them and the result shows them


class WaterFilling(NamedTuple):
    """Leverages in descending order, with the sums of all from each position on, and of their squares."""

    scores: Tensor  # [T], fp64, as the tokens stand
    ordered: Tensor
    rest: Tensor
    rest_squared: Tensor

    def level(self, n: int) -> tuple[Tensor, Tensor]:
        """Return k, the number of tokens with π = 1, and R of the others' π = (n - k) · score / R, for n tokens."""
        n = min(n, len(self.ordered))
        certain = torch.arange(n, device=self.ordered.device)
        enough = (n - certain) * self.ordered[:n] <= self.rest[:n]
        k = enough.to(torch.uint8).argmax().view(1)
        return k, self.rest.gather(0, k)

    def probabilities(self, n: int) -> Tensor:
        """Return π of each token, [T]."""
        k, rest = self.level(n)
        return ((n - k) * self.scores / rest.clamp(min=1e-300)).clamp(max=1.0)

    def added_variance(self, n: int) -> Tensor:
        """Return Σ (1/π - 1) · score², which independent draws with these π would add to E‖Ĝ - G‖²."""
        k, rest = self.level(n)
        return rest.square() / (n - k) - self.rest_squared.gather(0, k)

    def shift(self) -> Tensor:
        """Return a number in [0, 1) that depends on these tokens; it is added to the draw.

        So processes with one seed and different data draw different samples, and processes with the same data, such as
        the replicas of a layer under tensor parallelism, draw the same one.
        """
        return (self.rest[0].view(torch.int64) % 1_000_003).double() / 1_000_003

    def draw(self, n: int, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a systematic sample: the indices of n tokens, and the weight 1/π of each."""
        chances = self.probabilities(n)
        ends = chances.cumsum(0)
        at = torch.searchsorted(ends, draw.double() + torch.arange(n, device=ends.device), right=True)
        # Fewer than n tokens may have a leverage above zero: the rest of the sample gets the weight 0.
        beyond = at >= len(ends)
        at = at.clamp(max=len(ends) - 1)
        return at, torch.where(beyond, 0.0, chances[at].clamp(min=1e-300).reciprocal())


def water_filling(scores: Tensor) -> WaterFilling:
    """Order the leverages [T], or those of each token's parts [T, parts], whose squares are added."""
    scores = torch.nan_to_num(scores.double(), nan=_HUGE, posinf=_HUGE)
    if scores.ndim > 1:
        scores = torch.linalg.vector_norm(scores, dim=1)
    ordered = scores.sort(descending=True).values
    rest, squared = (v.flip(0).cumsum(0).flip(0) for v in (ordered, ordered.square()))
    return WaterFilling(scores, ordered, rest, squared)


def leverage(dy: Tensor, x: Tensor) -> Tensor:
    """Return ‖dy_t‖ · ‖x_t‖, [..., T], for the rows of dy [..., T, O] and x [..., T, I]."""
    return norms(dy).double() * norms(x).double()


def sample(dy: Tensor, x: Tensor, n: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Sample n rows of dy, weighted, and of x; the expectation of their product is dyᵀ x.

    draw: one number, uniform in [0, 1).
    """
    return weighted_rows(dy, x, water_filling(leverage(dy, x)).draw(n, draw))


def weighted_rows(dy: Tensor, x: Tensor, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Select the drawn rows of dy [T, O], multiplied by their weights, and of x [T, I]."""
    at, weights = drawn
    return weighted(dy.index_select(0, at), weights), x.index_select(0, at)  # faster than dy[at]


def weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiply rows [n, …] by their weights [n], and round once: a weight may lie beyond fp16, its product does not."""
    weights = weights.to(torch.promote_types(rows.dtype, torch.float32))
    return (rows * weights.view(-1, *(1,) * (rows.ndim - 1))).to(rows.dtype)


def sample_size(T: int, share: float, made: WaterFilling, variance: Callable[[], Tensor]) -> int:
    """Return the size of the sample, T for all tokens. variance: computes that of G itself, for `AUTO`."""
    if share != AUTO:
        return min(T, max(MIN_TOKENS, round(share * T)))
    allowed = VARIANCE_BOUND * variance()
    for part in (16, 8, 4, 3, 2):
        n = max(MIN_TOKENS, T // part)
        if n < T and bool(made.added_variance(n) <= allowed):
            return n
    return T


def choose_tokens(
    scores: Tensor, share: float, draw: Tensor, variance: Callable[[WaterFilling, Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Draw a sample by the leverages [T]: indices and weights; None to use all tokens unweighted.

    variance: computes that of G itself, for these tokens and this draw.
    """
    T = len(scores)
    if T <= MIN_TOKENS:
        return None
    made = water_filling(scores)
    draw = (draw + made.shift()) % 1
    n = sample_size(T, share, made, lambda: variance(made, draw))
    return None if n >= T else made.draw(n, draw)


def probes(draw: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return Gaussian directions [shape], seeded by the draw; gradients are compared by their projections on them."""
    generator = torch.Generator().manual_seed(int(draw * 2**53))
    return torch.randn(*shape, generator=generator).to(like.device, torch.float32)


def variance_between_sequences(projected: Tensor) -> Tensor:
    """Estimate the variance of G, a sum over S sequences, from each sequence's G projected on the probes, [S, …]."""
    S = len(projected)
    return (projected - projected.mean(0)).double().square().sum() / PROBES * S / (S - 1)


def gradient_variance(dy: Tensor, x: Tensor, sequences: int, made: WaterFilling, draw: Tensor) -> Tensor:
    """Estimate the variance of G = dyᵀ x between the sequences of a batch.

    For a single sequence, the variance of independent tokens, which is smaller.
    """
    if sequences < 2:
        return made.rest_squared[:1]
    seen = (x.float() @ probes(draw, (x.shape[1], PROBES), x)).view(sequences, -1, PROBES)
    return variance_between_sequences(dy.float().view(sequences, -1, dy.shape[1]).mT @ seen)


def gradient_rows(
    dy: Tensor, x: Tensor, sequences: int, share: float, draw: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Sample the rows of dy and x that G is estimated from; None to use all rows as they are."""
    if draw is None or len(x) <= MIN_TOKENS:
        return None
    drawn = choose_tokens(
        leverage(dy, x), share, draw, lambda made, draw: gradient_variance(dy, x, sequences, made, draw)
    )
    return None if drawn is None else weighted_rows(dy, x, drawn)


def nonzero_rows(dy: Tensor) -> Tensor | None:
    """Return the indices of the rows of dy [T, O] that are not zero; None to use all rows.

    All rows are used where few are zero, and on GPUs, which would have to synchronise.
    """
    if dy.device.type != "cpu" or dy.shape[0] <= MIN_TOKENS:
        return None
    zero = norms(dy) == 0
    # The square of a small number may be zero where the number is not.
    if int(zero.sum()) <= MIN_ZERO_SHARE * len(dy) or bool(dy[zero].any()):
        return None
    return zero.logical_not_().nonzero().view(-1)


def norms(rows: Tensor) -> Tensor:
    """Return the norm of each row, in fp32 or wider."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
