"""How fast is a card that is not here? By its maker's published figures (cards.yaml), and two assumptions.

No time that follows from these was measured: they serve to plan a study, not to compare methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from dual_lora.lab.cost.calibrate import Cost
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import parse_yaml

SHARE = (
    0.2  # of the published products that small batches of a few thousand tokens reach: an assumption, on the low side
)
PASSES = 16.0  # bytes moved a step for each adapted or trained weight: composing, gradients, the optimizer's state
DECODE_SECONDS = (
    0.04  # of one generated token of a batch: Python starts some thousand kernels for it. An assumption too
)


@dataclass(frozen=True)
class Card:
    """A GPU. flops a second (bf16), bytes a second and of memory, as its maker states them in `source`."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str

    @property
    def cost(self) -> Cost:
        """Its speed in training, in the form of a calibration."""
        return Cost(0, SHARE * self.flops, PASSES / self.bandwidth)

    @property
    def basis(self) -> str:
        """What an estimate for it follows from, in words."""
        return (
            f"arithmetic for {self.name} by its published figures ({self.flops / 1e12:,.0f} TFLOP/s bf16, "
            f"{self.bandwidth / 1e12:.2f} TB/s; {self.source}), of which training is taken to reach {SHARE:.0%}; "
            "nothing was measured"
        )


def cards() -> dict[str, Card]:
    """The cards that are known, by name."""
    written = parse_yaml(files(__package__).joinpath("cards.yaml").read_text(encoding="utf-8"), "cards.yaml")
    return {
        name: Card(name, 1e12 * row["tflops"], 1e9 * row["bandwidth"], 1e9 * row["memory"], row["source"])
        for name, row in written.items()
    }


def card(name: str) -> Card:
    """The card of this name. Raises UserError for one that is not known."""
    known = cards()
    if name.lower() not in known:
        raise UserError(f"There is no card {name!r}.{suggest(name.lower(), known)}")
    return known[name.lower()]
