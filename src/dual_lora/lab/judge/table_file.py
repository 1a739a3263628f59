"""Scores in a table: a .csv or .tsv file with a header line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.judge.scores import WHOLE, Score, Scores, number, seed_number
from dual_lora.lab.read import opened

NEEDED = ("method", "seed", "score")
OPTIONAL = ("item", "task", "model", "metric")
NAMELESS = {"task": "task", "metric": "score", "model": "", "item": WHOLE}


def read_table(file: Path) -> Scores:
    """The scores of a table. Raises UserError for unknown or missing columns, with file and line for a wrong row."""
    try:
        with opened(file) as lines:
            return Scores(list(_rows(file, lines)))
    except csv.Error as error:
        raise UserError(f"{file} is no table: {error}.") from None


def _rows(file: Path, lines: Iterator[str]) -> Iterator[Score]:
    reader = csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
    names = [name.strip() for name in next(reader, [])]
    _check_columns(file, names)
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{file}, line {reader.line_num}"
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} columns, expected {len(names)} ({', '.join(names)}).")
        row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
        for name in names:
            if not row[name] and name not in ("model", "task", "metric"):
                raise UserError(f"{where}: the {name} is empty.")
        row = NAMELESS | {name: cell for name, cell in row.items() if cell}
        value, seed = number(row["score"], where), seed_number(row["seed"], where)
        yield Score((row["model"], row["task"]), row["method"], seed, row["item"], row["metric"], value, where)


def _check_columns(file: Path, names: list[str]) -> None:
    known = (*NEEDED, *OPTIONAL)
    for name in names:
        if name not in known:
            hint = suggest(name, known)
            raise UserError(f"{file} has a column {name!r}, which means nothing here.{hint} Rename or remove it.")
        if names.count(name) > 1:
            raise UserError(f"{file} has two columns {name!r}: keep one of them.")
    if lacking := [name for name in NEEDED if name not in names]:
        raise UserError(
            f"{file} lacks the column {lacking[0]}: expected {', '.join(NEEDED)}, and as far as there are such "
            f"{', '.join(OPTIONAL)}."
        )
