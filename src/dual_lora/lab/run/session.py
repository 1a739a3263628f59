"""What a session of a run finds of the sessions before it, and writes when it begins."""

from contextlib import suppress
from typing import Any

from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.folder import RunFolder
from dual_lora.lab.run.record import read_metrics
from dual_lora.lab.run.watch import SECONDS
from dual_lora.lab.run.write import json_text, write_atomically, write_json


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
