"""The objective of training: the answers that records give, preferred answers (DPO), or rewards (GRPO)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from dual_lora.lab.patterns import compiled
from dual_lora.lab.recipe.section import MOST, Section

Reward = Literal["exact_match", "contains", "pattern", "json"]


class ObjectiveSection(Section):
    name: Literal["sft", "dpo", "grpo"] = Field(
        "sft",
        description="sft: train on the records' answers; dpo: on records with prompt, chosen and rejected; grpo: on "
        "answers that the model generates, by their rewards. TRL's trainers run dpo and grpo.",
    )
    beta: float | None = Field(
        None,
        ge=0,
        description="dpo, grpo: weight of the penalty that keeps the model near its base. Left out: 0.1 for dpo, 0 for "
        "grpo.",
    )
    rewards: list[Reward] = Field(
        ["exact_match"],
        min_length=1,
        description="grpo: rewards of 1 or 0, added up. exact_match: the generated text, or its match of "
        "evaluate.extract, is the record's answer; contains: it contains the answer as a word; pattern: it matches "
        "`pattern`; json: it is JSON.",
    )
    pattern: str | None = Field(None, description="grpo: regular expression of the reward pattern.")
    completions: int = Field(8, ge=2, le=1000, description="grpo: answers generated for one prompt.")
    max_new_tokens: int = Field(128, ge=1, le=MOST, description="grpo: longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="grpo: sampling temperature of the answers.")

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
