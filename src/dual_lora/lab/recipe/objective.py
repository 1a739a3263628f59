"""What training makes better: the answers that records give, preferred answers (DPO), or rewards (GRPO)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dual_lora.lab.patterns import compiled
from dual_lora.lab.recipe.section import MOST, Section

Reward = Literal["exact_match", "contains", "pattern", "json"]


class ObjectiveSection(Section):
    name: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="sft: the records' answers; dpo: records with prompt, chosen and rejected; grpo: answers that the "
        "model writes, by their rewards. dpo and grpo are TRL's trainers.",
    )
    beta: float | None = Field(
        None, ge=0, description="dpo, grpo: how near the model stays to its base. Left out: 0.1 for dpo, 0 for grpo."
    )
    rewards: list[Reward] = Field(
        ["exact_match"],
        min_length=1,
        description="grpo: 1 or 0 each, added up. exact_match: the text, or what evaluate.extract takes of it, is the "
        "record's answer; contains: the answer is a word in it; pattern: `pattern` is in it; json: it is JSON.",
    )
    pattern: str | None = Field(None, description="grpo, reward pattern: regular expression.")
    completions: int = Field(8, ge=2, le=1000, description="grpo: answers that are written to one prompt.")
    max_new_tokens: int = Field(128, ge=1, le=MOST, description="grpo: longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="grpo: of the answers that are drawn.")

    @field_validator("rewards", mode="before", json_schema_input_type=Reward | list[Reward])
    @classmethod
    def _one_reward_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("pattern")
    @classmethod
    def _can_be_searched_for(cls, value: str | None) -> str | None:
        compiled(value or "")
        return value

    @model_validator(mode="after")
    def _the_reward_pattern_has_one(self) -> ObjectiveSection:
        if ("pattern" in self.rewards) != (self.pattern is not None):
            raise ValueError("the reward pattern and the field pattern go together: give both or none")
        return self
