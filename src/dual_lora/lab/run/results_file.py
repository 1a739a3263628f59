"""Results next to the records that they are of, as JSON lines or as a table."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dual_lora.lab.data.records import Record, find
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import json_text, write_atomically
from dual_lora.lab.read import delimiter_of

MOST_CELLS = 10_000_000  # of a table of results, the empty ones among them
FORMULA = re.compile(r"[ \n]*[=+\-@\t\r＝＋－＠]")  # a spreadsheet takes what begins so for one

# Markdown's and HTML's signs, and by what addresses become links of themselves.
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|!#~@&]|:(?=//)|www(?=\.)")


def as_markdown(text: str) -> str:
    """A text that stays one in Markdown, in a table as well: no link, no picture."""
    return _MARKDOWN.sub(lambda f: "www\\" if f[0] == "www" else f"\\{f[0]}", text)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError where the results cannot be written. Needs no library."""
    if out.suffix not in (".jsonl", ".csv"):
        raise UserError(f"The results are to be written to {out}, expected a .jsonl or a .csv file.")
    if out.is_dir():
        raise UserError(f"The results are to be written to {out}, which is a folder.")
    if out.exists() and not overwrite:
        raise UserError(f"The file {out} is there already: give --overwrite to replace it, or another --out.")
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} for the results.")


def partial_file(out: Path) -> Path:
    """The results so far, while they are made."""
    return out.with_name(f"{out.name}.unfinished")


def check_columns(records: Sequence[Record], ours: Iterable[str]) -> None:
    """Raise UserError for records that have a field of a name that the results need."""
    names = {*ours}
    for record in records:
        if taken := sorted(names & {str(name) for name in record.values}):
            raise UserError(
                f"{record.where}: the record has a field {taken[0]!r}, which is the name of a result: give that field "
                "another name."
            )


def check_cells(out: Path, records: Sequence[Record]) -> None:
    """Raise UserError for a table that would be nearly empty and very large, of records that share few fields."""
    names = {str(name) for record in records for name in record.values}
    cells, filled = len(records) * len(names), sum(len(record.values) for record in records)
    if out.suffix == ".csv" and cells > max(MOST_CELLS, 100 * filled):
        raise UserError(
            f"A table of {len(records):,} records with {len(names):,} different fields would be nearly empty, and very "
            "large: give a .jsonl file as --out."
        )


def write_rows(out: Path, records: Sequence[Record], rows: Sequence[dict[str, Any]], source: str = "") -> None:
    """Write every record with its result; in a .csv file the probabilities are columns p(CLASS).

    source: the records' file. The results of a table have its separator and its byte order mark, by which a spreadsheet
    knows how to read them.
    """
    together = [{**_plain(record.values), **row} for record, row in zip(records, rows, strict=True)]
    if out.suffix == ".jsonl":
        write_atomically(out, "".join(json_text(row) + "\n" for row in together))
        return
    flat = [_flat(row | {"predicted": _escape_formula(row["predicted"])}) for row in together]
    names = list(dict.fromkeys(name for row in flat for name in row))
    separator, mark = _separator_and_mark(source, len(records[0].values)) if records else (",", "")
    lines = [_line(names, separator), *(_line([row.get(name, "") for name in names], separator) for row in flat)]
    write_atomically(out, mark + "".join(lines))


def _line(cells: Sequence[Any], separator: str) -> str:
    """A line of a table. A lone carriage return ends it for a spreadsheet unless its cell is quoted; older Pythons
    quote only the signs that end their own lines."""
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def _separator_and_mark(source: str, columns: int) -> tuple[str, str]:
    """Of a .csv file; a comma and no byte order mark for records of another kind."""
    if not source.endswith(".csv") or source.startswith("hub:"):
        return ",", ""
    with find(source).open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    mark = "\ufeff" if line.startswith("\ufeff") else ""
    return delimiter_of(line.removeprefix(mark), columns), mark


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A record with texts in place of what JSON does not have: dates, times and decimal numbers of a Parquet file."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "probabilities"}
    flat |= {f"p({name})": value for name, value in row.get("probabilities", {}).items()}
    return {
        name: value if isinstance(value, str | int | float) else "" if value is None else json_text(value)
        for name, value in flat.items()
    }


def _escape_formula(value: Any) -> Any:
    """Escape a text that a spreadsheet would take for a formula; a number such as +1 is none."""
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
