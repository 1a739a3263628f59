"""What a page is made of. Plain values with their sources; nothing here knows HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = dict[str, Any]
Mood = Literal["good", "bad", "same", "open"]


@dataclass(frozen=True)
class Source:
    """Where a figure comes from: the file that was read, and what made that file."""

    file: str
    command: str | None = None
    commit: str | None = None
    device: str | None = None
    made: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """One line: file, command, commit."""
        parts = [self.file, f"made by `{self.command}`" if self.command else "", self.commit and f"at {self.commit}"]
        return ", ".join(p for p in parts if p)


@dataclass(frozen=True)
class Column:
    """A column of a table: how its values are written, and which end of the row they stand at.

    digits: decimals of numbers, None for significant ones. kind: "verdict" and "check" are shown with a sign as well as
    a colour. help: what the figure means, shown on the heading.
    """

    key: str
    label: str
    kind: Literal["text", "number", "percent", "bytes", "verdict", "check"] = "text"
    digits: int | None = None
    signed: bool = False
    help: str = ""

    def text(self, row: Row) -> str:
        """The value as people read it; "" for a value that is not there."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if self.kind == "check" and isinstance(value, bool):
            return "✓ met" if value else "✗ missed"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return str(value)
        return number(value, self.kind, self.digits, self.signed)

    @property
    def is_number(self) -> bool:
        """Whether the column holds figures."""
        return self.kind in ("number", "percent", "bytes")


def number(value: float | None, kind: str = "number", digits: int | None = None, signed: bool = False) -> str:
    """A figure for people, with a true minus sign; "" for none."""
    if value is None:
        return ""
    sign = "+" if signed else ""
    if math.isinf(value):
        text = f"{value:{sign}}".replace("inf", "∞")
    elif kind == "percent":
        text = f"{100 * value:{sign}.{1 if digits is None else digits}f} %"
    elif kind == "bytes":
        text = _bytes(value)
    elif digits is not None:
        text = f"{value:{sign},.{digits}f}"
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):{sign},}"
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{value:{sign}.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:{sign}.3g}"
    return text.replace("-", "−") if text.startswith("-") else text


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


@dataclass
class Table:
    """Rows under columns. folded: shown closed at first (long tables)."""

    title: str
    columns: list[Column]
    rows: list[Row]
    source: Source | None = None
    note: str = ""
    folded: bool = False

    @property
    def slug(self) -> str:
        """A name for files and anchors."""
        return slug(self.title)

    def without_empty_columns(self) -> Table:
        """The same without columns that hold nothing."""
        kept = [c for c in self.columns if any(c.text(row) for row in self.rows)]
        return Table(self.title, kept, self.rows, self.source, self.note, self.folded)


@dataclass(frozen=True)
class Axis:
    """An axis of a chart. log: logarithmic, if all values are positive."""

    label: str
    log: bool = False
    percent: bool = False
    bytes: bool = False


@dataclass
class View:
    """One picture of a chart; where a chart has several, the reader chooses.

    series: [{"name", "points": [{"x", "y", "low", "high", "label", "note", "front", "dots"}]}], low and high around y
    (lines) or around x (intervals); for heat, one series {"rows", "columns", "cells"}.
    """

    name: str
    x: Axis
    y: Axis
    series: list[Row]
    note: str = ""


@dataclass
class Chart:
    """An interactive plot.

    lines: points joined in order, with a band where they have low and high. dots: points not joined, but for those with
    "front". intervals: one row a point, x with its interval; "label" names the row. heat: cells.
    band: an interval of x that is marked, such as the margin of equivalence. zero: whether the zero of the figures'
    axis is always shown and marked.
    """

    title: str
    kind: Literal["lines", "dots", "intervals", "heat"]
    views: list[View]
    source: Source | None = None
    note: str = ""
    band: tuple[float, float] | None = None
    band_label: str = ""
    zero: bool = False


@dataclass
class Text:
    """A paragraph; kind "verdict" stands out."""

    text: str
    kind: Literal["plain", "lead", "note", "warning"] = "plain"


@dataclass
class Verdict:
    """One judgement: the words, the figure, and how it is coloured. subject: what its sentence begins with."""

    verdict: str
    subject: str
    sentence: str
    mood: Mood


@dataclass
class Answer:
    """A study's question in one glance. anchor: of the section that answers it. verdicts: each with its mood and whom
    it was passed on."""

    question: str
    anchor: str
    about: str
    verdicts: list[tuple[str, Mood, list[str]]]


Block = Table | Chart | Text | list[Verdict] | list[Answer]


@dataclass
class Section:
    """A part of the page under a heading. folded: shown closed at first."""

    title: str
    blocks: Sequence[Any]
    group: str = ""
    folded: bool = False

    @property
    def slug(self) -> str:
        """The anchor."""
        return slug(self.title)


@dataclass
class Page:
    """A whole report."""

    title: str
    sections: list[Section]
    sources: list[Source]
    problems: list[str] = field(default_factory=list)
    made: str = ""

    def tables(self) -> list[Table]:
        """All tables of the page."""
        return [b for s in self.sections for b in s.blocks if isinstance(b, Table)]


def slug(text: str) -> str:
    """Lower-case letters, digits and dashes only, at most 80: safe in a file name and an anchor."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
    return plain if len(plain) <= 80 else f"{plain[:40].strip('-')}-{plain[-38:].strip('-')}"
