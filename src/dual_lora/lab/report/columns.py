"""The columns of tables: what a row's key is called, how its values are written, and what they mean (columns.csv).

A form is "" (text), "verdict", "check" (met or missed), "B" (bytes), "g" (about four digits) or a format such as "+.4f"
or ".1%". A measure's meaning also names it where a reader chooses what a chart shows.
"""

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, TypeVar

Row = dict[str, Any]
T = TypeVar("T")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Column:
    """A column of a table; see the module for form. help: what the values mean."""

    key: str
    label: str
    form: str = ""
    help: str = ""

    @property
    def is_number(self) -> bool:
        """Whether the column holds figures."""
        return self.form not in ("", "verdict", "check")

    def text(self, row: Row) -> str:
        """The value as people read it; "" for a value that is not there."""
        value = row.get(self.key)
        if isinstance(value, bool):
            return ("✓ met" if value else "✗ missed") if self.form == "check" else str(value)
        if isinstance(value, int | float):
            return number(value, self.form if self.is_number else "g")
        return "" if value is None else str(value)


def number(value: float | None, form: str = "g") -> str:
    """A figure for people, with a true minus sign; "" for none and for what is no number."""
    if value is None or value != value:
        return ""
    sign, form = "+" * form.startswith("+"), form.removeprefix("+")
    if math.isinf(value):
        text = f"{value:{sign}}".replace("inf", "∞")
    elif form.endswith("%"):
        text = f"{100 * value:{sign}{form[:-1]}f} %"
    elif form == "B":
        power = min(4, max(0, int(math.log10(max(abs(value), 1)) // 3)))
        text = f"{value / 1000**power:.{int(power > 0)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
    elif form != "g":
        text = f"{value:{sign},{form}}"
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):{sign},}"
    elif 1e-3 <= abs(value) < 1e5:
        text = f"{value:{sign}.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"
    else:
        text = f"{value:{sign}.3g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """The items that share a key, by that key, in the order in which keys and items first appear."""
    found: dict[Key, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def columns(keys: str, **labels: str) -> list[Column]:
    """The columns of these keys, in order. labels: of keys that are called otherwise here."""
    return [replace(COLUMNS[key], label=labels.get(key, COLUMNS[key].label)) for key in keys.split()]


COLUMNS = {
    row["key"]: Column(**row)
    for row in csv.DictReader(files(__package__).joinpath("columns.csv").read_text(encoding="utf-8").splitlines())
}
