"""The blocks of a page. Plain values with their sources; every text is made here, so that a page only places it."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

from dual_lora.lab.report.columns import Column, Row, number

MOST_CELLS = 2_000_000  # of a table; the largest of a real study has some 20,000
Mood = Literal["good", "bad", "same", "open"]
MOODS: dict[str, Mood] = {
    "significantly better": "good",
    "significantly worse": "bad",
    "equivalent within the margin": "same",
}


def mood(verdict: str) -> Mood:
    """Return the colour of a verdict."""
    return MOODS.get(verdict, "open")


def place(verdict: str) -> int:
    """Return a verdict's place in the order of verdicts: sure ones first."""
    return [*MOODS, verdict].index(verdict)


@dataclass(frozen=True)
class Source:
    """The source of figures: the file that was read, and what made that file."""

    file: str
    command: str | None = None
    commit: str | None = None
    device: str | None = None
    finished: str | None = None
    versions: str = ""


class Cell(NamedTuple):
    """A value as it is shown. exact: the figure in full precision, "" for a text. mood: "" for one without."""

    text: str
    exact: str
    mood: str


@dataclass
class Table:
    """Rows under columns; columns that hold nothing are left out. folded: shown closed at first (long tables)."""

    title: str
    columns: list[Column]
    rows: list[Row]
    note: str = ""
    folded: bool = False
    id: str = ""
    label: str = ""
    kind = "table"

    def __post_init__(self) -> None:
        check_cells(len(self.rows), len(self.columns))
        self.columns = [c for c in self.columns if not self.rows or any(c.text(row) for row in self.rows)]
        self.cells = [[_cell(c, row) for c in self.columns] for row in self.rows]


def check_cells(rows: int, columns: int) -> None:
    """Raise ValueError for a table that is too large to be shown: few values can ask for it, each in a row and a column
    of its own."""
    if rows * columns > MOST_CELLS:
        raise ValueError(f"a table of {rows:,} rows and {columns:,} columns, at most {MOST_CELLS:,} cells are shown")


def _cell(column: Column, row: Row) -> Cell:
    text, value = column.text(row), row.get(column.key)
    if column.form == "verdict":
        return Cell(text, "", mood(text))
    if column.form == "check" and isinstance(value, bool):
        return Cell(text, "", "good" if value else "bad")
    figure = column.is_number and isinstance(value, int | float) and text != ""
    return Cell(text, repr(value) if figure else "", "")


@dataclass(frozen=True)
class Axis:
    """An axis of a chart. log: logarithmic, if all values are positive. form: "g", "%" (shares) or "B" (bytes)."""

    label: str
    log: bool = False
    form: str = "g"

    def text(self, value: Any) -> str:
        """A value as people read it; "–" for none."""
        return number(value, {"g": ".4g", "%": ".2%"}.get(self.form, self.form)) or "–"


@dataclass
class View:
    """One picture of a chart; where a chart has several, the reader chooses.

    points: {"series", "x", "y", "low", "high", "label", "note", "front", "dots", "mood"}; low and high lie around y
    (lines) or around x (intervals). A heat's x is the column, its label the row, its y the value.
    """

    name: str
    x: Axis
    y: Axis
    points: list[Row]


@dataclass
class Chart:
    """An interactive plot.

    lines: points joined in order, with a band where they have low and high. dots: points not joined, but for those with
    "front". intervals: one row a point, x with its interval; "label" names the row. heat: cells.
    band: an interval of x that is marked, such as the margin of equivalence. zero: whether zero is shown and marked.
    """

    title: str
    form: Literal["lines", "dots", "intervals", "heat"]
    views: list[View]
    note: str = ""
    band: tuple[float, float] | None = None
    zero: bool = False
    id: str = ""
    label: str = ""
    kind = "chart"


@dataclass
class Text:
    """A paragraph."""

    text: str
    style: Literal["plain", "lead", "note", "warning"] = "plain"
    kind = "text"


@dataclass
class Cards:
    """A block of verdicts or answers, one card each.

    verdicts, sure ones first: {"verdict", "mood", "subject", "rest"}, the sentence in two parts. answers, a study's
    question in one glance: {"question", "anchor" of the section that answers it, "study", "compared" (with what),
    "verdicts": each with its mood and whom it is on}.
    """

    items: list[Row]
    kind: Literal["verdicts", "answers"]
    title = "more verdicts"
    id: str = ""
    label: str = ""


Block = Table | Chart | Text | Cards


@dataclass
class Section:
    """A part of the page under a heading. name: of what it is about, source: of all its figures. folded: closed at
    first."""

    title: str
    blocks: Sequence[Block]
    group: str
    name: str = ""
    source: Source | None = None
    folded: bool = False

    @property
    def id(self) -> str:
        """The anchor."""
        return slug(self.title)


@dataclass
class Page:
    """A whole report."""

    title: str
    sections: list[Section]
    problems: list[str] = field(default_factory=list)
    made: str = ""

    def __post_init__(self) -> None:
        """Give every table, chart and list of verdicts a name of its own, for anchors and files, and its full title."""
        used = {section.id for section in self.sections}
        for section, block in ((s, b) for s in self.sections for b in s.blocks if not isinstance(b, Text)):
            block.label = f"{section.name}: {block.title}" if section.name else block.title
            block.id = slug(unused(f"plot-{block.label}" if isinstance(block, Chart) else block.label, used))
            used.add(block.id)


def unused(name: str, anchors: Container[str]) -> str:
    """The name, with a number if another part has its anchor."""
    numbered = (f"{name} ({n})" if n > 1 else name for n in count(1))
    return next(each for each in numbered if slug(each) not in anchors)


def slug(text: str) -> str:
    """Lower-case letters, digits and dashes only, at most 80: safe in a file name and an anchor."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
    return plain if len(plain) <= 80 else f"{plain[:40].strip('-')}-{plain[-38:].strip('-')}"
