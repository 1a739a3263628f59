"""The reason why a run stopped, in one sentence, with what is left to go on from."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dual_lora.lab.errors import NotFinite, UserError, is_disk_full, memory_full
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_json
from dual_lora.lab.interrupt import Stopped
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.record import peak_memory, total_memory
from dual_lora.lab.terminal import size


class Diverged(UserError):
    """Training stopped because the loss or a weight was no number any more."""


def check_finite(model: Any, step: int) -> None:
    """Raise NotFinite if a trained weight holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NotFinite(f"The weight {name} holds NaN or infinity after step {step}.")


@contextmanager
def clear_failures(folder: RunFolder, recipe: Recipe) -> Iterator[None]:
    """Failures of training in one sentence, with what is left to go on from."""
    try:
        yield
    except UserError:
        raise
    except NotFinite as error:
        way_out = "Lower train.learning_rate, or use bfloat16 or float32 instead of float16."
        raise Diverged(f"{error} Training stopped. {_kept_checkpoint(folder)} {way_out}") from error
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        raise Stopped(number, f"Interrupted. {_kept_checkpoint(folder)}") from None
    except Exception as error:
        if message := memory_full(error):
            raise UserError(f"{message} {_less_memory(recipe)}") from error
        if not is_disk_full(error):
            raise
        failed = f"The disk is full, writing {folder.path} failed: make room, or begin anew in another --out."
        raise UserError(f"{failed} {_kept_checkpoint(folder)}") from error


def _less_memory(recipe: Recipe) -> str:
    """Say how much memory the run has taken and how much there is, and which settings would take less, the cheapest
    first."""
    part, taken = recipe.train, f"The run had taken {size(peak_memory())} at its peak"
    there = f" of {size(total)}" if (total := total_memory()) else ""
    ways = []
    if part.batch_size > 1:
        fewer = next(n for n in range(part.batch_size // 2, 0, -1) if part.batch_size % n == 0)
        times = part.accumulate * part.batch_size // fewer
        ways.append(f"train.batch_size: {fewer} with train.accumulate: {times} (the same steps)")
    if not part.gradient_checkpointing:
        ways.append("train.gradient_checkpointing: true (some 30 % slower)")
    if recipe.model.dtype == "float32":
        ways.append("model.dtype: bfloat16 (half the base)")
    ways.append(f"a smaller data.max_length (now {recipe.data.max_length})")
    return f"{taken}{there}. What helps: {'; '.join(ways)}. `dual-lora estimate` says how much each needs."


def _kept_checkpoint(folder: RunFolder) -> str:
    _, last = folder.last_checkpoint()
    if last is None:
        return "There is no checkpoint yet."
    return f"The last good checkpoint is {last}; `{folder.resume_command}` goes on from it."


def note_failure(folder: RunFolder, error: BaseException) -> None:
    """Write to record.json that the run stopped, and why."""
    with suppress(OSError, ValueError):
        record = read_object(folder.record)
        if record["state"] == "running":
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            record |= {"state": state, "error": str(error) or type(error).__name__}
            write_json(folder.record, record)
