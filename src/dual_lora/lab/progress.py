"""The display while a run goes on: a bar on a terminal, plain lines in a log. Always on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.spinner import Spinner
from rich.text import Text

from dual_lora.lab.terminal import Console

console = Console(stderr=True)
EVERY = 30.0  # seconds between two lines of a log


@contextlib.contextmanager
def lines(said: Callable[[], str], shown: bool = True) -> Iterator[None]:
    """Print, without a terminal, a line of what is `said` every 30 seconds, whether or not anything has moved since."""
    if not shown or console.is_terminal:
        yield
        return
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(EVERY):
            print(said(), file=sys.stderr, flush=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        ended.set()
        speaker.join()


class Working(Live):
    """A spinner and what goes on; in a log one line.

    rich's own takes over standard output and error, through which our guard against control characters would write the
    spinner's as text.
    """

    def __init__(self, what: str):
        self.shown = Spinner("dots", Text(what))
        super().__init__(
            self.shown,
            console=console,
            refresh_per_second=12.5,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self, refresh: bool = False) -> None:
        """Show it on a terminal; a log gets one line, and none of rich's empty ones."""
        if self.console.is_terminal:
            super().start(refresh)
        else:
            print(self.shown.text, file=sys.stderr, flush=True)

    def say(self, what: str) -> None:
        """Change the text of what goes on."""
        self.shown.update(text=Text(what))


@contextlib.contextmanager
def stage(what: str, shown: bool = True) -> Iterator[None]:
    """Say what goes on before or after a bar: a spinner on a terminal, a line in a log."""
    if not shown or os.environ.get("RANK", "0") != "0":
        yield
    else:
        with Working(what):
            yield


class Bar:
    """A progress display over ``total`` units with a changing note. Use as a context manager.

    timed: say how much time is left, by the units done so far; False where the note says it better.
    """

    def __init__(self, what: str, total: int, shown: bool = True, start: int = 0, timed: bool = True):
        self.what, self.total, self.done, self.shown, self.timed = what, total, start, shown, timed
        self._first, self._note, self._began, self._moved = start, "", time.monotonic(), time.monotonic()
        self._also = ""  # what goes on while no unit is done
        self._lines = lines(lambda: self._also or self._line(), shown)
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),  # a folder's name may look like markup
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or not console.is_terminal,
            transient=True,
            redirect_stdout=False,  # rich would obey the colours and links in what others print
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(what, total=total, completed=start, note="")

    def __enter__(self) -> Bar:
        self._began = time.monotonic()
        if not self._bar.disable:
            self._bar.start()
        self._lines.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._lines.__exit__(*error)
        if not self._bar.disable:  # before rich 14 a bar that is not shown ends with an empty line
            self._bar.stop()
        if self.shown and not console.is_terminal and error[0] is None and not self._also:
            print(self._line(), file=sys.stderr, flush=True)

    def to(self, done: int, note: str | None = None) -> None:
        """Set the number of finished units and, if given, its note."""
        self.done, self._moved, self._also = done, time.monotonic(), ""
        if note is not None:
            self._note = note
        self._bar.update(self._task, completed=done, note=self._note)

    def also(self, what: str) -> None:
        """Say what goes on while no unit is done: next to the bar, or in a log after a line of what is done."""
        if not self.shown:
            return
        self._bar.update(self._task, note=what)
        if not console.is_terminal:
            print(f"{self._line()}\n{what}", file=sys.stderr, flush=True)
            self._also = what

    def advance(self, units: int = 1) -> None:
        self.to(self.done + units)

    def _line(self) -> str:
        parts = [f"{self.what} {self.done}/{self.total}", *filter(None, [self._note])]
        if self.timed and self.done < self.total and (units := self.done - self._first):
            pace = (self._moved - self._began) / units  # seconds a unit
            left = pace * (self.total - self.done) - (time.monotonic() - self._moved)
            parts.append(f"about {in_words(max(left, 0.0))} left")
        return " · ".join(parts)


def in_words(seconds: float | None) -> str:
    """A duration as people say it."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
