"""Read records, each with where it stands, so that an error can name file and line."""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from dual_lora.lab.errors import UserError, being_read, described, suggest_file
from dual_lora.lab.read import delimiter_of, expanded, lines_of, not_utf8, parse_json, regular, repeated

KINDS = (".json", ".jsonl", ".tsv", ".csv", ".parquet", ".txt")
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}  # of a .csv file


@dataclass(frozen=True)
class Record:
    """Raw values and where they stand (``train.json, record 12`` or ``dev.tsv, line 7``).

    cells: they come from a table, where nothing tells an empty text from one that is missing. theirs: the file's name
    of a field that was renamed. found: the file's own fields, where `values` has others.
    """

    values: dict[str, Any]
    where: str
    cells: bool = False
    theirs: dict[str, str] = field(default_factory=dict)
    found: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The fields that the record has in its file."""
        return [str(name) for name in self.found or self.values]

    def called(self, name: str) -> str:
        """A field as its file names it, in quotes: a message is for the one who opens that file."""
        return repr(self.theirs.get(name, name))


def column_name(column: str) -> str:
    """A column's name for a sentence; pandas and spreadsheets write columns without one."""
    return column if column.strip() else "(a column without a name)"


def data_folder() -> Path:
    """Return the folder in which relative data paths are sought after the working folder."""
    return expanded(os.environ.get("DUAL_LORA_DATA", "../shared/data"), "data folder")


def joined(source: str) -> list[str]:
    """The sources that one, written with " + ", joins."""
    return [one.strip() for one in source.split(" + ")]


def stamp(path: Path) -> tuple[Path, int, int]:
    """Return the values that change with a file: its path, its size [bytes] and its time [ns]."""
    state = path.stat()
    return path.resolve(), state.st_size, state.st_mtime_ns


def find(source: str) -> Path:
    """The file that ``source`` names. Raises UserError saying where it was sought."""
    path = expanded(source, "data file")
    candidates = [path] if path.is_absolute() else [path, data_folder() / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_absolute():
        sought = ""
    else:
        sought = f": neither here nor in {data_folder()} (set DUAL_LORA_DATA to the folder that holds it)"
    beside = {p.name for c in candidates if c.parent.is_dir() for p in c.parent.iterdir() if p.is_file()}
    if folder := next((candidate for candidate in candidates if candidate.is_dir()), None):
        raise UserError(f"{source} is a folder, expected a file: join several by ' + '.{_some_files(folder)}")
    raise UserError(f"There is no data file {source}{sought}.{suggest_file(path.name, beside)}")


def _some_files(folder: Path) -> str:
    """A sentence on the files of records in a folder; "" without any."""
    there = sorted(str(file) for file in folder.iterdir() if file.suffix in KINDS and file.is_file())
    return f" In it: {', '.join(there[:5])}{', …' if len(there) > 5 else ''}." if there else ""


def read_records(source: str, columns: list[str] | None = None) -> list[Record]:
    """All records of a file or of a hub data set (``hub:NAME[,SUBSET][:SPLIT]``).

    columns: names of the columns of a .tsv or .csv file without a header line.
    Raises UserError for missing, empty and broken files.
    """
    if source.startswith("hub:"):
        records = list(_hub(source.removeprefix("hub:")))
    else:
        path = find(source)
        readers = {".json": _json, ".jsonl": _jsonl, ".txt": _lines}
        try:
            with being_read(path):
                if path.suffix in (".tsv", ".csv"):
                    records = list(_table(path, columns))
                elif path.suffix == ".parquet":
                    from dual_lora.lab.data.parquet import rows_of

                    records = [Record(row, f"{path}, row {number}") for number, row in enumerate(rows_of(path), 1)]
                elif path.suffix in readers:
                    records = list(readers[path.suffix](path))
                else:
                    known = f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
                    raise UserError(f"{path}: unknown kind of data file, not {known}.")
        except UnicodeDecodeError as error:
            raise UserError(not_utf8(path, error)) from None
    if not records:
        raise UserError(f"{source} holds no records.")
    return records


def _json(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return
    values = _parsed(text, str(path))
    if not isinstance(values, list):
        raise UserError(f"{path} holds a JSON {type(values).__name__}, expected a list of records.")
    for number, value in enumerate(values, 1):
        yield _record(value, f"{path}, record {number}")


def _jsonl(path: Path) -> Iterator[Record]:
    for record in _lines(path):
        yield _record(_parsed(record.values["line"], record.where), record.where)


def _parsed(text: str, where: str) -> Any:
    try:
        value = parse_json(text, _unique_names)
        if "\\ud" in text.lower():  # perhaps half of a surrogate pair, which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except json.JSONDecodeError as error:
        at = f"{where}, line {error.lineno}" if where.endswith(".json") else where
        raise UserError(f"{at}: not valid JSON ({error.msg}).") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError where a name stands twice, of which the first would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"the name {repeated(name for name, _ in pairs)!r:.100} stands twice in one object")
    return value


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {type(value).__name__} found, expected a record with named fields.")
    return Record(value, where)


def _table(path: Path, columns: list[str] | None) -> Iterator[Record]:
    """A .tsv file has no quoting (as in GLUE); a .csv file has the usual one, and commas, semicolons or tabs."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows: Iterator[tuple[int, list[str]]]
        quoted = path.suffix == ".csv"
        if not quoted:
            rows = ((number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(file, 1))
        else:
            rows = _quoted(file, path, columns)
        names = columns or [_unmarked(name) for name in next(rows, (0, []))[1]]
        if names and not columns and not names[-1].strip():
            names, rows = _without_margin(names, list(rows))
        twice = repeated(name for name in names if not (columns and name == "_"))
        if twice is not None:
            owner = "data.columns names" if columns else f"{path} has"
            called = repr(twice) if twice else "without a name"
            raise UserError(f"{owner} two columns {called}: give one of them another name.")
        for number, row in rows:
            if row == columns:
                raise UserError(f"{path}, line {number} holds the names of data.columns: leave data.columns out.")
            if [_unmarked(cell).strip() for cell in row] == [name.strip() for name in names]:
                raise UserError(
                    f"{path}, line {number} holds the names of the columns once more: were several files joined? Take "
                    "that line out."
                )
            if not any(cell.strip() for cell in row) and (not quoted or len(row) != 1):
                continue  # a blank line, or a spreadsheet's empty one; a quoted table's one cell may be an empty text
            if len(row) != len(names):
                raise UserError(
                    f"{path}, line {number}: {len(row)} columns, expected {len(names)} ({', '.join(names)})."
                )
            yield Record(dict(zip(names, row, strict=True)), f"{path}, line {number}", cells=True)


def _unmarked(cell: str) -> str:
    """A column's name without byte order marks: a file that was joined from several has one before each part."""
    return cell.lstrip("\ufeff").strip('"') if cell.startswith("\ufeff") else cell


def _without_margin(
    names: list[str], rows: list[tuple[int, list[str]]]
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Names and rows without the columns at the right that have neither a name nor a cell: spreadsheets write them."""
    width = max((number for number, name in enumerate(names, 1) if name.strip()), default=0)
    if not width or any(cell.strip() for _, row in rows for cell in row[width:]):
        return names, iter(rows)
    return names[:width], ((number, row[:width] if len(row) == len(names) else row) for number, row in rows)


def _quoted(file: TextIO, path: Path, columns: list[str] | None) -> Iterator[tuple[int, list[str]]]:
    """Rows of separated values, each with the last of its lines: a cell may hold several."""
    csv.field_size_limit(10_000_000)
    separator = delimiter_of(file.readline(), len(columns) if columns else None)
    file.seek(0)
    reader = csv.reader(file, delimiter=separator, strict=True)  # else a lone quote joins records
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: {error}. A closing quote has to be followed by "
            f"{_SEPARATORS[separator]}, and a quote within quotes has to be written twice."
        ) from None


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines_of(path.read_text(encoding="utf-8-sig")), 1):
        if line.strip():
            yield Record({"line": line}, f"{path}, line {number}")


def read_joined(source: str, columns: list[str] | None = None) -> list[Record]:
    """All records of a source, or of several that are written with " + "."""
    return [record for one in joined(source) for record in read_records(one, columns)]


def whole_text(source: str) -> list[Record]:
    """A text file as one record."""
    path = find(source)
    try:
        text = regular(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return [Record({"text": text}, str(path))]


def hub_split(source: str) -> str:
    """``hub:NAME[,SUBSET][:SPLIT]`` with the split that is taken where none is named."""
    return "hub:" + ":".join(_split_of(source.removeprefix("hub:")))


def _split_of(name: str) -> tuple[str, str]:
    whole, _, split = name.partition(":")  # of train[:100], too
    return whole, split or "train"


def same_records(one: str, other: str) -> bool:
    """Whether two names, of files or of splits on a hub, are of the same records; a whole split has all its slices."""
    return one == other or one == other.partition("[")[0] or other == one.partition("[")[0]


def _hub(name: str) -> Iterator[Record]:
    import datasets

    whole, split = _split_of(name)
    repository, _, subset = whole.partition(",")
    try:
        rows = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # the hub client raises many kinds, each with a usable first line
        first = described(error, Exception, lines=1)
        raise UserError(f"The hub data set {name!r} could not be loaded: {first}") from error
    for number, row in enumerate(rows, 1):
        yield Record(dict(row), f"hub:{name}, record {number}")
