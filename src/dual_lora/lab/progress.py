"""What is seen while a run goes on: a bar on a terminal, plain lines in a log. Always on standard error."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class Bar:
    """A progress display over ``total`` units with a changing note. Use as a context manager."""

    def __init__(self, what: str, total: int, shown: bool = True, start: int = 0):
        self.what, self.total, self.done, self.shown = what, total, start, shown
        self._lines = shown and not console.is_terminal
        self._next_line = 0.0
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),  # a folder's name may look like markup
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._lines,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.stop()

    def to(self, done: int, note: str | None = None) -> None:
        """Set the number of finished units and, if given, the note beside it."""
        self.done = done
        if note is None:
            self._bar.update(self._task, completed=done)
        else:
            self._bar.update(self._task, completed=done, note=note)
        if self._lines and note and done >= self._next_line:
            self._next_line = done + self.total / 10
            print(f"{self.what} {done}/{self.total} {note}", file=sys.stderr, flush=True)

    def advance(self, units: int = 1) -> None:
        self.to(self.done + units)


def in_words(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
