"""Text for a terminal: amounts as people read them, and text that comes from files as it is, never obeyed.

A recipe's name, a record or a model's answer may hold escape codes, which move the cursor, rename the window, write to
the clipboard or hide a line. Such characters are written as ``\\u001b``; colours come from `Console` alone.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import rich.console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dual_lora.lab.report import blocks

MOODS = {"good": "green", "bad": "red", "same": "cyan", "open": "yellow"}
# All but the tab and the new line; what turns the direction of writing, so that other words seem to stand there; and
# half of a surrogate pair, which no stream takes.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """The text with every control character written out, as JSON writes it."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _written_out(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding has no sign for."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


WRITTEN_OUT = "dual_lora.written_out"
codecs.register_error(WRITTEN_OUT, _written_out)


class Console(rich.console.Console):
    """rich's console, for which square brackets are no markup and control characters are text."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render(self, *given: Any, **more: Any) -> Iterable[Segment]:
        """Only what rich itself has made may control the terminal."""
        for text, style, control in super().render(*given, **more):
            yield Segment(text if control else shown(text), style, control)


class _Stream:
    """A stream whose `write` does something else. All but that is the other stream's."""

    def __init__(self, stream: Any):
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        raise NotImplementedError

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


class _Written(_Stream):
    """What the stream's encoding has no sign for is written as JSON writes it: Windows' pipes and some terminals know
    few letters."""

    def write(self, text: str) -> int:
        encoding = getattr(self.rich_proxied_file, "encoding", None) or "utf-8"
        self.rich_proxied_file.write(text.encode(encoding, WRITTEN_OUT).decode(encoding))
        return len(text)


class _Shown(_Stream):
    """For whatever else prints: our own lines, Python's warnings, the libraries' logs. rich writes to the stream
    below, because its codes are its own."""

    def __init__(self, stream: TextIO):
        super().__init__(_Written(stream))

    def write(self, text: str) -> int:
        return int(self.rich_proxied_file.write(shown(text)))


def figures(title: str, left: Sequence[str], right: Sequence[str], rows: Iterable[Sequence[Any]], **more: Any) -> Table:
    """A table with texts on the left and figures on the right. more: as rich's Table has it."""
    table = Table(title=title, title_justify="left", **more)
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def printed(table: blocks.Table) -> Table:
    """A report's table as a terminal shows it."""
    shown = Table(title=table.title, title_justify="left")
    for column in table.columns:
        shown.add_column(column.label, justify="right" if column.is_number else "left")
    for row in table.cells:
        shown.add_row(*(Text(cell.text, style=MOODS.get(cell.mood, "")) for cell in row))
    return shown


@contextmanager
def guarded() -> Iterator[None]:
    """Make standard output and error show control characters, and those that their encoding has not, while a command
    runs. Also a decorator."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Shown(sys.stdout), _Shown(sys.stderr)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def size(count: float) -> str:
    """Bytes for people: 9.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people: 3 min 20 s."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
