"""A diagnosis of a candidate, by its tokens' log-probabilities c, those of base b and of adapter a. Numbers only.

The strength is the projection t = ⟨c − b, a − b⟩ / ‖a − b‖²: 0 is off, 1 is on, 2 is merged twice. Rounding and other
adapters leave a residual c − a. A fault is named only where a really computed model with that fault explains what was
found: it has to lie within the rounding, or to leave less than half of the residual and not clearly more than
four bits leave. Rounding is no fault.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

Word = Literal[
    "on", "rounded", "off", "merged twice", "λ below 1", "other scale", "layers dropped", "another adapter",
    "wrong chat template", "other tokenizer", "undecided",
]  # fmt: skip
GOOD: tuple[Word, ...] = ("on", "rounded")
Cut = Callable[[Tensor], Tensor]  # a pattern at the tokens that were asked for, no lower than what the server tells

# A residual of so many times the rounding's own root mean square is still rounding: two roundings in different orders
# differ by √2, and few tokens carry most of it.
ROUNDINGS = 3.0
FP32 = 1 / 32  # fp32's own noise is 2⁻¹⁶ of bf16's; the rest is room for another order of sums and for TF32
ERRORS = 5.0  # standard errors of the strength
STRENGTH = 0.05  # a smaller deviation of the strength is never taken for a fault by its projection alone
UNSURE = 0.08  # standard error of the strength above which on and off are not told apart
EXPLAINED = 0.5  # a fault leaves at most so much of the residual and of the effect, and no more than four bits do,
MATTERS = 0.7  # or it lies within the rounding and leaves at most so much of the residual
CLEARLY = 0.75  # four bits explain more than a fault does where they leave less than this share of what it leaves;
# where they have the strength that was found, already where they leave less
COARSE = 2.0  # times what rounding to four bits does here
KEPT = 0.25  # rounding changes the strength by no more, unless four bits do here
TWICE = 0.12  # this far from 2 is still "twice": the scale is found by a search
LARGEST = 8.0  # strength that is sought
STRENGTHS = 0.1, 0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0, 6.0


class Guesses(Protocol):
    """The adapter with a fault, really computed. Each is log-probabilities of the same tokens."""

    def scaled(self, strength: float) -> Tensor | None: ...
    def parts(self) -> Iterator[tuple[str, Tensor]]: ...
    def coarse(self) -> Mapping[str, Tensor]: ...


@dataclass
class Known:
    """Log-probabilities [tokens] of base and adapter, the prompt that each token belongs to, and the root mean square
    and the strength that bf16's rounding leaves of them. warms_up: the method has a λ that may be below 1. unit, asks:
    what stands for tokens and prompts (a classifier's classes and texts)."""

    base: Tensor
    tuned: Tensor
    rows: Tensor
    rounding: float
    rounded_strength: float = 1.0
    warms_up: bool = False
    unit: str = "token"
    asks: str = "prompts"


@dataclass
class Finding:
    """A verdict with its figures: natural log-probabilities, root mean squares over the tokens."""

    word: Word
    cause: str
    strength: float | None = None
    strength_error: float | None = None
    residual: float | None = None  # of the candidate from the adapter
    effect: float | None = None  # of the adapter from its base
    rounding: float | None = None  # what bf16 does to these tokens
    tokens: int = 0
    prompts: int = 0
    left: dict[str, float] = field(default_factory=dict)  # hypothesis: the residual that it leaves

    @property
    def good(self) -> bool:
        return self.word in GOOD


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if len(x) else 0.0


def projection(x: Tensor, direction: Tensor, rows: Tensor) -> tuple[float, float]:
    """⟨x, d⟩/‖d‖² and its standard error, by leaving out one prompt after the other."""
    products, squares = x * direction, direction.square()
    total, length = products.sum(), squares.sum()
    if not length > 0:
        return 0.0, float("inf")
    count = int(rows.max()) + 1
    own = torch.zeros(2, count, dtype=x.dtype).index_add_(1, rows, torch.stack([products, squares]))
    rest = length - own[1]
    left_out = ((total - own[0]) / rest)[rest > 1e-9 * length]
    error = ((len(left_out) - 1) * left_out.var(unbiased=False)).sqrt() if len(left_out) > 1 else torch.tensor(0.0)
    return float(total / length), float(error)


def judge(
    found: Tensor,
    known: Known,
    guesses: Guesses,
    exact: bool = False,
    kept: list[int] | None = None,
    floors: Tensor | None = None,
    unpacked: bool = False,
) -> Finding:
    """Name what `found`, the candidate's log-probabilities, comes from.

    exact: the candidate computes in fp32, so that less than bf16's rounding counts. kept: the tokens that were asked
    for, where these are not all. floors [tokens]: what a server tells at the least; below it nothing is known, and
    every pattern is cut there. unpacked: nothing of it can have been rounded to four bits, as it is an adapter in fp32
    on the very base.
    """

    def cut(pattern: Tensor) -> Tensor:
        pattern = pattern if kept is None else pattern[kept]
        return pattern if floors is None else torch.maximum(pattern, floors)

    rows = known.rows if kept is None else torch.unique(known.rows[kept], return_inverse=True)[1]
    known = replace(known, base=cut(known.base), tuned=cut(known.tuned), rows=rows)
    prompts = len(set(rows.tolist()))
    if not bool(torch.isfinite(found).all()):
        broken = "it gives log-probabilities that are no numbers"
        return Finding("another adapter", broken, tokens=len(found), prompts=prompts)
    found = found if floors is None else torch.maximum(found, floors)
    base, tuned = known.base, known.tuned
    direction = tuned - base
    noise = known.rounding * (FP32 if exact else 1.0)
    bound = ROUNDINGS * noise
    effect, residual, off = rms(direction), rms(found - tuned), rms(found - base)
    finding = Finding("on", "", None, None, residual, effect, known.rounding, len(found), prompts)
    finding.left = {"on": residual, "off": off}

    def as_(word: Word, cause: str) -> Finding:
        finding.word, finding.cause = word, cause
        return finding

    unsure = f"on these {known.asks} the adapter changes no more than rounding does: give others (--prompts FILE)"
    if not effect:
        return (
            as_("undecided", unsure) if residual <= bound else as_("another adapter", "it differs from the base, too")
        )
    strength, error = projection(found - base, direction, known.rows)
    error = max(error, noise / (effect * len(found) ** 0.5))
    finding.strength, finding.strength_error = strength, error
    room = STRENGTH + ERRORS * error + abs(1 - known.rounded_strength)

    coarse = _Coarse(cut, known, guesses, effect)

    def explains(left: float) -> bool:
        if left <= bound:
            return left <= MATTERS * residual
        enough = left <= EXPLAINED * min(residual, effect) and left <= coarse.limit
        return enough and (unpacked or not coarse.explains(found, left, strength))

    on = residual <= bound and abs(strength - 1) <= room
    nothing = explains(off) or (off <= bound and abs(strength) <= room)
    if (on or nothing) and (error > UNSURE or on == nothing):
        return as_("undecided", unsure)
    if on:
        return as_("on", "it gives the adapter's own log-probabilities, to the rounding")
    if nothing:
        return as_("off", "it gives the base's log-probabilities: the adapter is not there, or was not applied")

    scale = _best_scale(found, cut, guesses, strength)
    if scale is not None:
        finding.left["scale"] = scale[1]
    lost: dict[str, float] = {}
    if scale is None or scale[1] > bound:
        for name, pattern in guesses.parts():
            lost[name] = rms(found - cut(pattern))
            if lost[name] <= bound:
                break
    part = min(lost, key=lost.__getitem__, default="")
    if part:
        finding.left[part] = lost[part]
    if part and (scale is None or lost[part] < scale[1]) and explains(lost[part]):
        return as_("layers dropped", f"it gives what the adapter gives without {part}")
    if scale is not None and explains(scale[1]) and abs(scale[0] - 1) > min(room, KEPT):
        return as_(*_named_scale(scale[0], known.warms_up))
    as_(*_rest(known, finding, coarse, unpacked, coarse.explains(found, residual, strength)))
    if finding.word == "rounded" and scale is not None and scale[1] <= EXPLAINED * residual:
        finding.cause += f", though {scale[0]:.2f} of its strength would explain as much"
    return finding


def _best_scale(found: Tensor, cut: Cut, guesses: Guesses, start: float) -> tuple[float, float] | None:
    """The strength whose log-probabilities come nearest, and the residual that it leaves."""
    from scipy.optimize import minimize_scalar

    seen: dict[float, float] = {}

    def left(strength: float) -> float:
        strength = round(float(strength), 3)
        if strength not in seen:
            pattern = guesses.scaled(strength)
            assert pattern is not None
            seen[strength] = rms(found - cut(pattern))
        return seen[strength]

    if guesses.scaled(2.0) is None:
        return None
    # A first look at all of them: far from 1 the effect saturates, and the way down is not one valley.
    near = min((*STRENGTHS, start if 0 < start < LARGEST else 0.5), key=left)
    low, high = max(0.0, near / 1.4), min(LARGEST, near * 1.4)
    minimize_scalar(left, bounds=(low, high), method="bounded", options={"xatol": 0.005, "maxiter": 12})
    return min(seen.items(), key=lambda pair: pair[1])


def _named_scale(scale: float, warms_up: bool) -> tuple[Word, str]:
    if abs(scale - 2) <= TWICE:
        return "merged twice", f"it acts with {scale:.2f} times its strength: merged twice, or α is doubled"
    if scale < 1 and warms_up:
        return "λ below 1", f"it acts with {scale:.2f} of its strength: its warm-up had not ended, or α is smaller"
    return (
        "other scale",
        f"it acts with {scale:.2f} times its strength: another α, or another rank in the scale's formula",
    )


class _Coarse:
    """The effect of rounding to four bits on these tokens, before a merge and after it; computed when first asked
    for."""

    def __init__(self, cut: Cut, known: Known, guesses: Guesses, effect: float):
        self.cut, self.known, self.guesses, self.effect = cut, known, guesses, effect

    @cached_property
    def _patterns(self) -> list[tuple[Tensor, float, float]]:
        """Return each pattern with its distance from the adapter, and the strength that it keeps."""
        base, tuned = self.known.base, self.known.tuned
        patterns = map(self.cut, self.guesses.coarse().values())
        return [(p, rms(p - tuned), projection(p - base, tuned - base, self.known.rows)[0]) for p in patterns]

    def explains(self, found: Tensor, left: float, strength: float) -> bool:
        """Whether one explains what was found, of this strength, better than a fault that leaves so much."""
        return any(
            rms(found - pattern) < left * (1.0 if abs(strength - kept) <= STRENGTH else CLEARLY)
            for pattern, _, kept in self._patterns
        )

    @property
    def limit(self) -> float:
        distances = [distance for _, distance, _ in self._patterns]
        return max(COARSE * max(distances, default=self.effect / 3 / COARSE), ROUNDINGS * self.known.rounding)

    @property
    def room(self) -> float:
        return max(KEPT, *(2 * abs(1 - kept) for _, _, kept in self._patterns))


def _rest(known: Known, finding: Finding, coarse: _Coarse, unpacked: bool, looks: bool) -> tuple[Word, str]:
    """Name what no fault explains: rounding, if it is no more than four bits do (unpacked: than sixteen) and the
    strength is kept; else another adapter. Where four bits do half of what the adapter does, it has to look like theirs
    (`looks`).
    """
    residual, strength = finding.left["on"], finding.strength or 0.0
    if unpacked:
        bits, limit, room = "sixteen", ROUNDINGS * known.rounding, KEPT
    else:
        bits, limit, room = "four", coarse.limit, coarse.room
    finding.left[f"{bits} bits"] = limit
    size = f"{residual:.3f} nats a {known.unit}, {residual / known.rounding:.1f} times what bf16 does"
    if residual <= limit and abs(strength - 1) <= room and strength >= KEPT:
        if unpacked or looks or residual <= EXPLAINED * coarse.effect:
            return "rounded", f"it differs from the adapter by {size}: rounding, at most to {bits} bits"
        return "undecided", (
            f"it differs from the adapter by {size}. Four bits do as much here, and another adapter might: "
            "compare the files (--against, --adapter), or give prompts on which the adapter does more (--prompts FILE)"
        )
    if min(finding.left["off"], finding.left.get("scale", float("inf"))) <= limit and strength < KEPT:
        return "off", f"it is nearest to the base, rounded ({finding.left['off']:.3f} nats a {known.unit})"
    return "another adapter", (
        f"it differs from the adapter by {size}, and no scale, lost layers or rounding explains it: another adapter, "
        "one that was altered, or another base"
    )
