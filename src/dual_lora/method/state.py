"""What a layer knows of one of its adapters."""

from dataclasses import dataclass

from ..core.reference import Form, scaling
from ..core.tokens import EXACT
from .lora_fields import LORA_ALPHA


@dataclass
class AdapterState:
    """A layer's settings of one adapter.

    r2: 0 for a frozen direction, which has no factors C and D.
    warmup: optimizer steps of the paper's warm-up; below 1, a share of a run whose length is not known yet; 0 for none.
    share: the share of the tokens that gradients are estimated from.
    frozen: whether a seed stands for C and D. (r2 may change by a hot-swap.)
    """

    r1: int
    r2: int
    alpha: float
    form: Form
    warmup: float = 0
    share: float = EXACT

    def __post_init__(self) -> None:
        self.frozen = self.form.direction == "frozen"  # no property, which is a call in each pass

    @property
    def strength(self) -> float:
        """α/√(r1 r2)."""
        return scaling(self.alpha, self.r1, self.r2)

    @property
    def r(self) -> int:
        """LoRA's rank with as many parameters."""
        return self.r1 + self.r2

    @property
    def lora_alpha(self) -> float:
        """LoRA's `lora_alpha` at equal strength."""
        return self.alpha / LORA_ALPHA

    @property
    def scaling(self) -> float:
        """LoRA's `lora_alpha`/r at equal strength."""
        return self.lora_alpha / self.r
