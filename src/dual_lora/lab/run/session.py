"""A session of a run: what it was asked, what it begins with and what came of its training.

It finds what the sessions before it have left, and writes recipe and record when it begins.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import json_text, write_atomically, write_json
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.best import Best
from dual_lora.lab.run.prepare import Prepared
from dual_lora.lab.run.record import Record, read_metrics
from dual_lora.lab.run.watch import SECONDS, Watch
from dual_lora.verify.callback import VerifyAdapter


@dataclass(frozen=True)
class Session:
    """A requested run. main: whether this is the process that writes."""

    recipe: Recipe
    asked: Recipe  # with `auto` where it says so
    folder: RunFolder
    main: bool
    progress: bool


@dataclass(frozen=True)
class Begun:
    """A run that can be trained. config: PEFT's, None for full fine-tuning; ends: where it was to end before it was
    made longer; earlier: seconds of training in the sessions before."""

    ready: Prepared
    config: Any
    model: Any
    record: Record
    start: int
    checkpoint: Path | None
    ends: list[int]
    earlier: float


@dataclass(frozen=True)
class Fitted:
    """The results of training, before they are saved."""

    trainer: Trainer
    watch: Watch
    best: Best | None
    checks: list[VerifyAdapter]


def begin(recipe: Recipe, folder: RunFolder, record: dict[str, Any], start: int) -> None:
    """Write recipe and record; of the metrics of an earlier session keep those up to the checkpoint."""
    ours = not folder.is_run or folder.record.is_file()  # a recipe alone may be the user's own
    write_json(folder.record, record)  # first, for the same reason
    if ours:  # on resuming too: what may change then (evaluation, rows at once) is what record and adapter say
        write_atomically(folder.recipe, recipe.to_yaml())
    kept = [line for line in read_metrics(folder.metrics) if line["step"] <= start]
    write_atomically(folder.metrics, "".join(json_text(line) + "\n" for line in kept))


def seconds_before(folder: RunFolder, step: int) -> float:
    """Training time up to ``step`` in earlier sessions, as its checkpoint says, or metrics.jsonl tells."""
    times = [line.get("seconds") for line in read_metrics(folder.metrics) if line["step"] <= step]
    with suppress(OSError, ValueError):
        times = [read_object(folder.checkpoints / f"checkpoint-{step}" / SECONDS).get("seconds")]
    return max((float(t) for t in times if isinstance(t, int | float)), default=0.0)
