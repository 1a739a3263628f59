"""The base class of a recipe's sections, and the origin of its settings."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

MOST = 10_000_000  # tokens of a text, rows of a batch: more is a slip or a trap


class Section(BaseModel):
    """A part of a recipe: unknown fields are errors, so that a typing mistake never runs silently."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    in_place: ClassVar[tuple[tuple[str, str], ...]] = ()  # (given, other): a setting in whose place another is given

    @classmethod
    def merged(cls, values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        """Lay settings over others, mapping by mapping, both as they are written in a file."""
        result = laid_over(values, over)
        for given, other in cls.in_place:
            if over.get(given) and other not in over:
                result.pop(other, None)
        return result


def laid_over(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another, mapping by mapping."""
    both = {key: (values[key], value) for key, value in over.items() if key in values}
    mappings = {k: laid_over(a, b) for k, (a, b) in both.items() if isinstance(a, dict) and isinstance(b, dict)}
    return values | over | mappings


class Origin(Section):
    """The origin of a recipe's settings, and which figures others report for the same run."""

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
