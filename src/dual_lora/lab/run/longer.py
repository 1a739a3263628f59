"""A run's continuation for more steps than it was begun with.

Up to the end that it had, a longer run sees the very examples in the very order that it saw; what is added begins a new
pass over the records. The learning rate goes on by the schedule of the whole, longer run, not from where it had ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.progress import console
from dual_lora.lab.recipe.schema import Recipe

FIELDS = ("steps", "epochs", "patience")  # of train: what says how long


def has_other_length(recipe: Recipe, before: Recipe) -> bool:
    """Whether the recipe asks for another length than the run was begun with."""
    return any(getattr(recipe.train, name) != getattr(before.train, name) for name in FIELDS)


def ends_of(record: Mapping[str, Any]) -> list[int]:
    """The numbers of steps that the run was to have so far, by its record."""
    known = record.get("extended") or []
    ends = {*(known if isinstance(known, list) else []), record.get("total_steps")}
    return sorted(end for end in ends if isinstance(end, int))


def check_longer(folder: RunFolder, steps: int, start: int, method: Mapping[str, Any]) -> None:
    """Raise UserError for fewer steps than were made, and for a method that would count its steps anew.

    start: steps of the newest checkpoint. method: its configuration for so many steps.
    """
    if start > steps:
        raise UserError(
            f"The run {folder.path} has already made {start} steps, and you ask for {steps}: give more with "
            "--train.steps or --train.epochs, or give another --out."
        )
    was = folder.recorded()
    before = was.get("method")
    if not start or was.get("total_steps") == steps or not isinstance(before, dict):
        return
    for name in ("warmup_steps", "total_step"):
        if name in before and before[name] != method.get(name):
            raise UserError(
                f"This run cannot get longer. The method's {name} is a share of the run: it was {before[name]} of "
                f"{was.get('total_steps')} steps and would be {method.get(name)} of {steps}, which changes the "
                f"strength of what is trained already. Start again with another --out and --method.{name} "
                f"{before[name]}; that run can get longer."
            )


def already_finished(folder: RunFolder, steps: int, recipe: Recipe) -> str:
    """Say that a run has nothing left to go on with, and how it gets longer."""
    now = f"--train.steps {steps}" if recipe.train.steps is not None else f"--train.epochs {recipe.train.epochs:g}"
    return (
        f"The run {folder.path} was finished before, so nothing was trained now; what follows is its result. To make "
        f"it longer, give more than {now}."
    )


class Longer(TrainerCallback):
    """A callback that sets the learning rate to the longer run's, and says so."""

    def __init__(self, end: int, shown: bool):
        self.end, self.shown = end, shown

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        plain = getattr(lr_scheduler, "scheduler", lr_scheduler)
        shapes = getattr(plain, "lr_lambdas", None)
        if not state.global_step or shapes is None:
            return
        before = optimizer.param_groups[0]["lr"]
        rates = [base * shape(plain.last_epoch) for base, shape in zip(plain.base_lrs, shapes, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        plain._last_lr = rates
        if self.shown:
            console.print(
                f"Continuing from step {state.global_step} to step {state.max_steps} (planned before: {self.end}). The "
                f"learning rate follows the schedule of all {state.max_steps} steps ({args.lr_scheduler_type.value}): "
                f"it was {before:.2g} and continues at {rates[0]:.2g}.",
                soft_wrap=True,
            )


def forget_scores(folder: RunFolder) -> None:
    """Remove the scores of the adapter that a longer run replaces, and its card, which may have been written again."""
    if folder.result is not None:
        (folder.result / "README.md").unlink(missing_ok=True)
    for file in (*folder.path.glob("evaluation/*/items.jsonl"), *folder.path.glob("evaluation/*/result.json")):
        file.unlink()
