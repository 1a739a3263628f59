"""Rewards of GRPO that a recipe can name. Each gives 1 or 0 for one answer; none runs code of a recipe's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dual_lora.lab.patterns import Pattern
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.scoring import answer_in, same_answer

Rule = Callable[[str, str], bool]  # text, expected answer


def rewards_of(recipe: Recipe) -> list[Callable[..., list[float]]]:
    """The recipe's rewards as TRL calls them, each by its name, which the metrics have."""
    spec = recipe.evaluate
    pattern = Pattern(recipe.objective.pattern, "objective.pattern") if recipe.objective.pattern else None

    def exact_match(text: str, expected: str) -> bool:
        found = answer_in(text, spec.extract, expected) if spec.extract else text.strip()
        return same_answer(found, expected.strip(), spec.compare)

    def contains(text: str, expected: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(expected.strip())}(?!\w)", text) is not None

    def matches(text: str, _: str) -> bool:
        return pattern is not None and pattern.search(text) is not None

    def is_json(text: str, _: str) -> bool:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
        return True

    rules: dict[str, Rule] = {
        "exact_match": exact_match,
        "contains": contains,
        "pattern": matches,
        "json": is_json,
    }
    return [_reward(name, rules[name]) for name in recipe.objective.rewards]


def _reward(name: str, rule: Rule) -> Callable[..., list[float]]:
    def reward(completions: Sequence[Any], expected: Sequence[str], **_: Any) -> list[float]:
        return [
            float(rule(_completion_text(completion), answer))
            for completion, answer in zip(completions, expected, strict=True)
        ]

    reward.__name__ = name
    return reward


def _completion_text(completion: Any) -> str:
    """Return the text of a completion; of a conversation, its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
