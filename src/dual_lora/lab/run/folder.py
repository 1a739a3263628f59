"""A run's folder: what lies in it, whose it is at the moment, which of its checkpoints are whole.

recipe.yaml     the recipe with every default written out
record.json     versions, device, times, result
metrics.jsonl   one line per log step
checkpoints/    what --resume goes on from
start/          the adapter before training, for a method whose start lies in the base weights as well (LoRA-GA)
adapter/        the finished adapter (``model/`` for full fine-tuning)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from shlex import quote
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import read_object
from dual_lora.lab.run.write import sync, write_atomically

WHOLE = "complete.json"  # written last into a checkpoint: the names and sizes of its files


class RunFolder:
    """Paths of a run, its lock and its checkpoints."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.record = path / "record.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.start = path / "start"
        self.adapter = path / "adapter"
        self.full_model = path / "model"
        self._lock: Any = None

    @property
    def is_run(self) -> bool:
        return self.recipe.is_file()

    @property
    def result(self) -> Path | None:
        """The finished adapter or model."""
        return next((p for p in (self.adapter, self.full_model) if p.is_dir()), None)

    @property
    def resume_command(self) -> str:
        """What to type to go on with this run."""
        return f"dual-lora train --resume --out {quote(str(self.path))}"

    def open(self, resume: bool, overwrite: bool) -> None:
        """Take the folder for a run. Raises UserError when it is in use, or holds something and nothing was said."""
        if self.path.is_file():
            raise UserError(f"The output {self.path} is a file, expected a folder.")
        # A run that was killed before its recipe stood there has left a lock and half a file: that is still empty.
        filled = self.path.is_dir() and any(p.name != ".lock" and p.suffix != ".part" for p in self.path.iterdir())
        if filled and not resume and not overwrite:
            hint = "--resume to go on, --overwrite to start anew, or " if self.is_run else ""
            raise UserError(f"The output folder {self.path} is not empty: give {hint}another --out.")
        if filled and not self.is_run:
            raise UserError(f"The folder {self.path} is not a run (it holds no recipe.yaml): give another --out.")
        self.path.mkdir(parents=True, exist_ok=True)
        sync(self.path.parent)
        self._take()
        if overwrite and not resume:
            for item in self.path.iterdir():
                if item.name != ".lock":
                    shutil.rmtree(item) if item.is_dir() else item.unlink()

    def _take(self) -> None:
        from filelock import FileLock, Timeout

        # The operating system frees the lock when its holder dies, however that happens.
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"The output folder {self.path} is in use by another run; wait for it or give another --out."
            ) from None

    def close(self) -> None:
        if self._lock is None:
            return
        self._lock.release()
        if not any(p.name != ".lock" for p in self.path.iterdir()):  # nothing came of it
            if self.path.is_symlink():
                (self.path / ".lock").unlink(missing_ok=True)
            else:
                shutil.rmtree(self.path)

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; remains of interrupted writes are removed."""
        for path in sorted(self.checkpoints.glob("checkpoint-*"), key=_step, reverse=True):
            if is_whole(path):
                return path
            shutil.rmtree(path)
        return None

    def keep_newest(self, count: int) -> None:
        """Remove all but the ``count`` newest whole checkpoints."""
        whole = [p for p in sorted(self.checkpoints.glob("checkpoint-*"), key=_step) if is_whole(p)]
        for path in whole[:-count]:
            (path / WHOLE).unlink()  # first: a half-removed checkpoint must not look whole
            shutil.rmtree(path)


def mark_whole(checkpoint: Path) -> None:
    """Declare a checkpoint complete, once all its files have reached the disk."""
    sizes = {}
    for file in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != WHOLE):
        sync(file)
        sizes[str(file.relative_to(checkpoint))] = file.stat().st_size
    for folder in (*(p for p in checkpoint.rglob("*") if p.is_dir()), checkpoint.parent, checkpoint.parent.parent):
        sync(folder)
    write_atomically(checkpoint / WHOLE, json.dumps(sizes, indent=1))


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that was written is there in its full size."""
    try:
        sizes = read_object(checkpoint / WHOLE)
    except (OSError, ValueError):
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def _step(checkpoint: Path) -> int:
    digits = checkpoint.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
