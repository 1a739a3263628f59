"""A run's folder: what lies in it, whose it is, which of its checkpoints are whole.

recipe.yaml     the recipe with every default written out
record.json     versions, device, times, result
metrics.jsonl   one line per log step
checkpoints/    what --resume goes on from
start/          the adapter before training, for a method whose start lies in the base weights as well (LoRA-GA)
adapter/        the finished adapter (``model/`` for full fine-tuning)
evaluation/     figures and every item's result           analysis/  what was seen of the update

A run may come from somebody else. Its entries have to be plain files and folders: a link among them could lead what is
written or removed out of the folder that the user named.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.files.write import REMAINS, WHOLE, hold, is_held, listed_in, make_folder, remove_remains, sync
from dual_lora.lab.read import has_second_name, read_object

LOCK = ".lock"
FILES = ("recipe.yaml", "record.json", "metrics.jsonl", LOCK)
ENTRIES = (*FILES, "checkpoints", "start", "adapter", "model", "evaluation", "analysis", "tensorboard")
# The files that a run wrote, as globs: each by its name, or by the list in the same folder.
OWN = (
    *FILES,
    *(f"{folder}/{WHOLE}" for folder in ("checkpoints/checkpoint-*", "start", "adapter", "model")),
    *(f"evaluation/*/{file}" for file in ("items.jsonl", "result.json")),
    *(f"analysis/{file}" for file in ("live.jsonl", "analysis.json")),
    "tensorboard/events.out.tfevents.*",
)


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
        """Whether a run lies here. Raises UserError for one with a link among its entries."""
        if not self.recipe.is_file():
            return False
        check_plain(self.path, ENTRIES)
        return True

    @property
    def result(self) -> Path | None:
        """The finished adapter or model."""
        return next((p for p in (self.adapter, self.full_model) if p.is_dir()), None)

    @property
    def resume_command(self) -> str:
        """Return the command that continues this run."""
        return f"dual-lora train --resume --out {quote(str(self.path))}"

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raise UserError where the folder cannot be taken for a run: it holds something and nothing was said."""
        if self.path.is_file():
            raise UserError(f"The output {self.path} is a file, expected a folder.")
        check_plain(self.path, ENTRIES, single=True)
        # A run that was killed before its record stood there has left a lock and half a file: that is still empty.
        filled = self.path.is_dir() and any(p.name != LOCK and p.suffix != ".part" for p in self.path.iterdir())
        # One that was killed as it began, or was removed, may have a record and no recipe.
        ours = filled and {"state", "method", "versions"} <= self.recorded().keys()
        if filled and not resume:
            others = files_in(self.path, OWN)[1] if ours else [self.recipe]
            if not overwrite:
                overwriting = "" if others else "--overwrite to start from the beginning, "
                hint = f"--resume to go on, {overwriting}or " if ours else ""
                raise UserError(f"The output folder {self.path} is not empty: give {hint}another --out.")
            if others and self.is_run:
                raise UserError(not_ours(self.path, others[0]))
        if filled and not (ours or self.is_run):
            raise UserError(f"The folder {self.path} is not a run (it holds no recipe.yaml): give another --out.")

    def open(self, resume: bool, overwrite: bool) -> None:
        """Take the folder for a run. Raises UserError when it is in use, or holds something and nothing was said."""
        self.check(resume, overwrite)
        make_folder(self.path)
        sync(self.path.parent)
        busy = f"The output folder {self.path} is in use by another run; wait for it or give another --out."
        self._lock = hold(self.path / LOCK, busy)
        try:
            self.check(resume, overwrite)  # another one may have ended meanwhile
        except UserError:
            self.close()
            raise
        remove_remains(self.path)
        if overwrite and not resume:
            remove_own(self.path, OWN, keep=LOCK)

    def recorded(self) -> dict[str, Any]:
        """Return the run's record; {} if there is none that can be read."""
        with contextlib.suppress(OSError, ValueError):
            return read_object(self.record)
        return {}

    def close(self) -> None:
        if self._lock is None:
            return
        self._lock.release()
        if not any(p.name != LOCK for p in self.path.iterdir()):  # nothing came of it
            (self.path / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the user's own link to a folder stays
                self.path.rmdir()

    def whole_checkpoints(self) -> dict[int, Path]:
        """Return the whole checkpoints by their steps, the newest last. What an interrupted write has left is passed
        over."""
        named = [(path.name.removeprefix("checkpoint-"), path) for path in self.checkpoints.glob("checkpoint-*")]
        steps = sorted((int(step), path) for step, path in named if step.isascii() and step.isdigit())
        return {step: path for step, path in steps if (files := listed_in(path).values()) and all(files)}

    def last_checkpoint(self) -> tuple[int, Path | None]:
        """Step and folder of the newest whole checkpoint; (0, None) without one."""
        return max(self.whole_checkpoints().items(), default=(0, None))

    def keep_newest(self, count: int) -> None:
        """Remove all but the ``count`` newest whole checkpoints."""
        for path in list(self.whole_checkpoints().values())[: -count or None]:
            (path / WHOLE).unlink()  # first: a half-removed checkpoint must not look whole
            shutil.rmtree(path)


def run_at(path: str | Path) -> RunFolder:
    """The folder of a run. Raises UserError where there is none."""
    folder = RunFolder(Path(path))
    if not folder.path.exists():
        beside = folder.path.parent
        near = suggest(folder.path.name, [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else [])
        raise UserError(f"There is no run {path}.{near if near.startswith(' Did') else ''}")
    if not folder.is_run:
        raise UserError(f"{path} is not a run: it holds no recipe.yaml. Give a folder that `dual-lora train` made.")
    return folder


def result_of(folder: RunFolder) -> Path:
    """The finished adapter or model of a run. Raises UserError where there is none yet."""
    if folder.result is None:
        if is_held(folder.path / LOCK):
            raise UserError(
                f"The run {folder.path} is still in training: another process writes into it. Wait until it has ended."
            )
        raise UserError(f"The run {folder.path} is not finished: `{folder.resume_command}` goes on with it.")
    return folder.result


def check_plain(folder: Path, names: Iterable[str], single: bool = False) -> None:
    """Raise UserError if one of these entries of a folder, or anything in it, is no plain file and no plain folder.

    single: nor a file that has another name elsewhere, as what is written into it would be there too.
    """
    for top in (folder / name for name in names):
        for path in chain([top] if os.path.lexists(top) else [], top.rglob("*")):  # beyond the top, through no link
            state = path.lstat()
            if single and stat.S_ISREG(state.st_mode) and has_second_name(path):
                raise UserError(
                    f"{path} has a second name elsewhere (a hard link), and training would write into both: copy the "
                    "folder (cp -r), and go on in the copy."
                )
            if stat.S_IFMT(state.st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
                what = f"a link to {path.readlink()}" if path.is_symlink() else "neither a file nor a folder"
                raise UserError(
                    f"{path} is {what}. What a run holds has to be plain files and folders inside it, so that nothing "
                    "outside is read, written or removed: replace it with what belongs there, or use another folder."
                )


def files_in(folder: Path, own: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The files in a folder (links among them): those that we wrote, and the others.

    own: globs of our files. Of a complete.json among them, what it lists is ours as well, while it has that size; so is
    half a file that a killed writer has left.
    """
    ours = {file for pattern in (*own, *REMAINS) for file in folder.glob(pattern)}
    for note in [file for file in ours if file.name == WHOLE]:
        ours |= {file for file, same in listed_in(note.parent).items() if same}
    there = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [path for path in there if path in ours], [path for path in there if path not in ours]


def remove_own(folder: Path, own: Iterable[str], keep: str = "") -> None:
    """Remove the files that we wrote, with their folders; raise UserError and remove nothing if others lie there."""
    ours, others = files_in(folder, own)
    if others:
        raise UserError(not_ours(folder, others[0]))
    # What says that the rest is ours goes last: a list after what it lists, then the files at the top, the record last.
    for file in sorted(ours, key=lambda file: (file.parent == folder, file.name == WHOLE, file.name)):
        if file.name == keep:
            continue
        file.unlink()
        with contextlib.suppress(OSError):  # something else lies in it
            while (file := file.parent) != folder:
                file.rmdir()
    for name in {pattern.partition("/")[0] for pattern in own if "/" in pattern}:
        with contextlib.suppress(OSError):  # made by a run that wrote nothing into it
            (folder / name).rmdir()


def not_ours(folder: Path, other: Path) -> str:
    """Why a folder cannot be overwritten."""
    return (
        f"{folder} holds {other.relative_to(folder)}, which this program has not written, or not to its end, or which "
        "was changed since. Nothing was removed: move it away, or give another --out."
    )
