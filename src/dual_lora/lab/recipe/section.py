"""What every part of a recipe is, and where its settings come from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

MOST = 10_000_000  # tokens of a text, rows of a batch: more is a slip or a trap


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors, so that a typing mistake never runs silently."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Origin(Section):
    """Where a recipe's settings come from, and which figures others report for the same run."""

    sources: dict[str, str] = Field(
        default_factory=dict, description="Name of a source: its kind (paper, predecessor, ours) and what it is."
    )
    settings: dict[str, list[str]] = Field(
        default_factory=dict, description="Name of a source: the settings that it gives, e.g. train.learning_rate."
    )
    reported: dict[str, dict[str, float | str]] = Field(
        default_factory=dict, description="Name of a source: metric: the figure that it reports."
    )

    def source_of(self, setting: str) -> str | None:
        """The source of a setting like ``train.learning_rate``; None if it is the laboratory's default."""
        return next((name for name, given in self.settings.items() if setting in given), None)
