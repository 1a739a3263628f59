"""A cell is one method on one task with one model: what a study's table is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study.budget import Size, rank_field
from dual_lora.lab.study.study import MethodEntry, rank_rule


@dataclass
class Cell:
    """One method on one task with one model, ready to run."""

    model: str
    task: str
    method: str
    entry: MethodEntry
    recipe: Recipe
    metric: str
    size: Size
    classes: int | None
    rank: int | None = None
    mismatch: float | None = None  # relative, to the budget; None outside a budget
    notes: list[str] = field(default_factory=list)
    overlap: str = ""  # what validation and test records have in common, in a sentence

    @property
    def place(self) -> tuple[str, str]:
        """Model and task: the cells of one place are compared with each other."""
        return self.model, self.task


@dataclass
class Finished:
    """A cell with what came of it. `finals` in the order of the study's seeds; None where a run is missing."""

    cell: Cell
    trials: list[tuple[dict[str, Any], dict[str, Any] | None]]  # job, outcome
    chosen: dict[str, Any] | None
    finals: list[tuple[dict[str, Any], dict[str, Any] | None]]
    doomed: bool = False  # every trial diverged: the finals count as diverged without being run

    @property
    def complete(self) -> bool:
        """Whether every final run has an outcome."""
        return self.doomed or (bool(self.finals) and all(outcome is not None for _, outcome in self.finals))


def place_name(model: str, task: str) -> str:
    """How a task with a model is called in sentences."""
    return f"{task} ({model})" if model else task


def cell_id(cell: Cell) -> str:
    """The cell's name among the study's cells."""
    return json.dumps([cell.model, cell.task, cell.method])


def fields_at(entry: MethodEntry, rank: int | None) -> dict[str, Any]:
    """The fields of the method's PEFT configuration at this rank, rules such as 2r worked out."""
    fields = dict(entry.fields)
    name = rank_field(entry.name)
    if rank is not None and name:
        fields[name] = rank
    return {key: rank_rule(value, rank, f"{entry.name}.{key}") for key, value in fields.items()}
