"""Which tokens the weight's gradient G = Σ_t dy_t x_tᵀ is made of: those that carry it, or a sample of them.

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
"""Shares of the tokens with a meaning of their own; one between them is meant as it is."""

FEWEST = 64
"""Tokens below which nothing is sampled or left out."""

BOUND = 0.05
"""Variance that `AUTO` may add, over that between the batch's sequences."""

PROBES = 4
WORTH = 0.05
"""Share of the rows that have to be zero before they are left out."""

_HUGE = 1e150  # the leverage of what is not finite: it has to reach the result


class Water(NamedTuple):
    """Leverages in descending order, and the sums of those from each on, of them and of their squares."""

    scores: Tensor  # [T], fp64, as the tokens stand
    ordered: Tensor
    rest: Tensor
    rest_squared: Tensor

    def level(self, n: int) -> tuple[Tensor, Tensor]:
        """How many tokens are certain, and what the others share, for n tokens: π = (n - k) · score / R."""
        n = min(n, len(self.ordered))
        certain = torch.arange(n, device=self.ordered.device)
        enough = (n - certain) * self.ordered[:n] <= self.rest[:n]
        k = enough.to(torch.uint8).argmax().view(1)
        return k, self.rest.gather(0, k)

    def probabilities(self, n: int) -> Tensor:
        """π of each token, [T]."""
        k, rest = self.level(n)
        return ((n - k) * self.scores / rest.clamp(min=1e-300)).clamp(max=1.0)

    def added_variance(self, n: int) -> Tensor:
        """Σ (1/π - 1) · score²: what independent draws with these π would add to E‖Ĝ - G‖²."""
        k, rest = self.level(n)
        return rest.square() / (n - k) - self.rest_squared.gather(0, k)

    def shift(self) -> Tensor:
        """A number in [0, 1) of these tokens, added to the draw: processes with one seed but other data draw others.

        And those with the same data, such as the replicas of a layer under tensor parallelism, draw the same.
        """
        return (self.rest[0].view(torch.int64) % 1_000_003).double() / 1_000_003

    def draw(self, n: int, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Which n tokens a systematic sample takes, and the weight 1/π of each."""
        chances = self.probabilities(n)
        ends = chances.cumsum(0)
        at = torch.searchsorted(ends, draw.double() + torch.arange(n, device=ends.device), right=True)
        # Fewer tokens than n may have a leverage at all: the rest of the sample weighs nothing.
        beyond = at >= len(ends)
        at = at.clamp(max=len(ends) - 1)
        return at, torch.where(beyond, 0.0, chances[at].clamp(min=1e-300).reciprocal())


def water(scores: Tensor) -> Water:
    """Of leverages [T], or of parts of each token [T, parts], whose squares are added."""
    scores = torch.nan_to_num(scores.double(), nan=_HUGE, posinf=_HUGE)
    if scores.ndim > 1:
        scores = torch.linalg.vector_norm(scores, dim=1)
    ordered = scores.sort(descending=True).values
    rest, squared = (v.flip(0).cumsum(0).flip(0) for v in (ordered, ordered.square()))
    return Water(scores, ordered, rest, squared)


def leverage(dy: Tensor, x: Tensor) -> Tensor:
    """‖dy_t‖ · ‖x_t‖ of the rows of dy [..., T, O] and x [..., T, I]."""
    return norms(dy).double() * norms(x).double()


def sample(dy: Tensor, x: Tensor, n: int, draw: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of dy, weighed, and of x, n of each, whose product has the expectation dyᵀ x.

    draw: one number, uniform in [0, 1).
    """
    return weighed(dy, x, water(leverage(dy, x)).draw(n, draw))


def weighed(dy: Tensor, x: Tensor, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The drawn rows of dy [T, O], each by its weight, and of x [T, I]."""
    at, weights = drawn
    return dy[at] * weights.to(dy.dtype).unsqueeze(1), x[at]


def count(T: int, share: float, made: Water, variance: Callable[[], Tensor]) -> int:
    """How many tokens a sample takes; T for all of them. variance: G's own, which `AUTO` adds to."""
    if share != AUTO:
        return min(T, max(FEWEST, round(share * T)))
    allowed = BOUND * variance()
    for part in (16, 8, 4, 3, 2):
        n = max(FEWEST, T // part)
        if n < T and bool(made.added_variance(n) <= allowed):
            return n
    return T


def chosen(
    scores: Tensor, share: float, draw: Tensor, variance: Callable[[Water, Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    """Which tokens stand for all, and the weight of each, by their leverages [T]; None for all as they are.

    variance: G's own, for these tokens and this draw.
    """
    T = len(scores)
    if T <= FEWEST:
        return None
    made = water(scores)
    draw = (draw + made.shift()) % 1
    n = count(T, share, made, lambda: variance(made, draw))
    return None if n >= T else made.draw(n, draw)


def probes(draw: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Random directions [shape] of this draw, by which gradients are compared without being made."""
    generator = torch.Generator().manual_seed(int(draw * 2**53))
    return torch.randn(*shape, generator=generator).to(like.device, torch.float32)


def between(projected: Tensor) -> Tensor:
    """The variance of G as the sum over S sequences, estimated from G of each, projected on the probes [S, …]."""
    S = len(projected)
    return (projected - projected.mean(0)).double().square().sum() / PROBES * S / (S - 1)


def own_variance(dy: Tensor, x: Tensor, sequences: int, made: Water, draw: Tensor) -> Tensor:
    """The variance of G = dyᵀ x between the sequences of a batch; of a single one, as if its tokens were independent,
    which is less."""
    if sequences < 2:
        return made.rest_squared[:1]
    seen = (x.float() @ probes(draw, (x.shape[1], PROBES), x)).view(sequences, -1, PROBES)
    return between(dy.float().view(sequences, -1, dy.shape[1]).mT @ seen)


def carriers(dy: Tensor, x: Tensor, sequences: int, share: float, draw: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Rows of dy and x whose product stands for dyᵀ x; None for all of them as they are."""
    if draw is None or len(x) <= FEWEST:
        return None
    drawn = chosen(leverage(dy, x), share, draw, lambda made, draw: own_variance(dy, x, sequences, made, draw))
    return None if drawn is None else weighed(dy, x, drawn)


def not_zero(dy: Tensor) -> Tensor | None:
    """The rows of dy [T, O] that are not zero; None where nearly none is, or on a device that would have to wait."""
    if dy.device.type != "cpu" or dy.shape[0] <= FEWEST:
        return None
    zero = norms(dy) == 0
    # The square of a small number may be zero where the number is not.
    if int(zero.sum()) <= WORTH * len(dy) or bool(dy[zero].any()):
        return None
    return zero.logical_not_().nonzero().view(-1)


def norms(rows: Tensor) -> Tensor:
    """‖row‖ of each row, at least in fp32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
