"""The value of a record's field: as it is, as text, as a list; or why it cannot be used."""

import math
import re
from typing import Any

from dual_lora.lab.data.records import Record
from dual_lora.lab.errors import UserError, suggest


def is_missing(value: Any) -> bool:
    """Null, empty, or NaN, as a table's empty cell is written."""
    return value is None or value in ("", []) or value != value


def value_of(record: Record, name: str) -> Any:
    if name in record.values and record.values[name] is None:
        raise UserError(f"{record.where}: field {record.called(name)} is null.")
    if name not in record.values:
        near = suggest(name, record.names)
        raise UserError(
            f"{record.where}: field {name!r} is missing, found {', '.join(record.names) or 'none'}."
            + (near if near.startswith(" Did") else "")
        )
    return record.values[name]


def text_in(record: Record, name: str, learned: bool = False) -> str:
    """Return a field as text. learned: an answer or a label, which may not be empty in JSON either."""
    if record.cells and not str(record.values.get(name, "x")).strip():
        way_out = (
            "Fill it, or take the line out."
            if learned
            else "Fill it, take the line out, or give records as JSON, where an empty text differs from a missing one."
        )
        raise UserError(f"{record.where}: the cell {record.called(name)} is empty. {way_out}")
    return written(value_of(record, name), f"{record.where}: field {record.called(name)}")


def written(value: Any, what: str) -> str:
    """A value as text; true and false as JSON writes them. Raises UserError for one that is no text."""
    if not isinstance(value, str | int | float):
        raise UserError(f"{what} is a {type(value).__name__}, expected text.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{what} is {value}, which is what a missing value becomes; expected text.")
    return str(value).lower() if isinstance(value, bool) else str(value)


def list_in(record: Record, name: str) -> list[Any]:
    """A list that a record may have."""
    value = record.values.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{record.where}: field {record.called(name)} is a {type(value).__name__}, expected a list.")
    return value


def as_whole(text: str) -> str:
    """A whole number without the ".0" that a table with an empty cell in its column adds; any other text as it is."""
    return text.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", text) else text
