"""Read files that may come from anybody: regular ones, of a bearable size, as text, JSON or YAML."""

import contextlib
import csv
import json
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TextIO

import yaml

from dual_lora.lab import yaml_text
from dual_lora.lab.errors import KEPT_OF_AN_ERROR, UserError, being_read, described

LARGEST = 200_000_000  # bytes of a JSON file; the largest of a real study has about one million
LARGEST_YAML = 2_000_000  # bytes; the longest shipped file has 20,000
MOST_VALUES = 100_000  # in a YAML file, what its aliases repeat counted again


def expanded(path: str, kind: str) -> Path:
    """Write out the ~ of a path to a `kind` of file. Raises UserError for a home that is not known here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"There is no {kind} {path}: its home folder is not known on this machine.") from None


def regular(file: Path, largest: int = LARGEST) -> Path:
    """The file, unless reading it might never end (ValueError). Raises OSError where there is none."""
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no regular file")
    if state.st_size > largest:
        raise ValueError(f"it has {state.st_size:,} bytes, and at most {largest:,} are read")
    return file


def unlinked(file: Path) -> Path:
    """The same for a file of a folder that may come from somebody else: a link there could lead to a file of the
    user's, and show it."""
    if file.is_symlink() or has_second_name(file):
        kind = "a link" if file.is_symlink() else "a hard link"
        raise ValueError(f"it is {kind}, which is not followed out of a folder: name the file itself, or put it there")
    return regular(file)


def has_second_name(file: Path) -> bool:
    """Whether a file is a hard link, which an archive makes to a file that lay where it was unpacked."""
    return file.lstat().st_nlink > 1 and not file.is_symlink()


@contextlib.contextmanager
def opened(file: Path, largest: int = LARGEST, linked: bool = True) -> Iterator[TextIO]:
    """A text file's lines. Raises UserError for one that is too large, not UTF-8 or no regular file. linked: whether
    it may be a link, see `unlinked`."""
    try:
        whole = regular(file if linked else unlinked(file), largest)
        with being_read(file), whole.open(encoding="utf-8-sig", newline="") as lines:
            yield lines
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(file, error)) from None
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def not_utf8(file: Path, error: UnicodeDecodeError) -> str:
    """Return the message for a file in another encoding, most often a spreadsheet's."""
    return (
        f"{file} is not text in UTF-8 (byte {error.start}): save it in UTF-8 (in Excel as 'CSV UTF-8'), or convert "
        "it, for example with iconv -f WINDOWS-1252 -t UTF-8."
    )


def folded(name: str) -> str:
    """A file's name as the most careless file system compares it: case, width and invisible characters left out."""
    kept = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return "".join(kept).casefold()


def entries_named(folder: Path, *patterns: str) -> list[Path]:
    """The entries of a folder that a library may open by such a name: where case does not count, `Model.SAFETENSORS` is
    `model.safetensors`. patterns: as of `glob`, in small letters."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in entries if any(fnmatchcase(folded(path.name), pattern) for pattern in patterns))


def lines_of(text: str) -> list[str]:
    """A file's lines. They end at line feeds alone: `str.splitlines` also cuts at form feeds and at Unicode's line
    separators, which stand in texts and, unescaped, in JSON strings."""
    return text.removesuffix("\n").split("\n")


def delimiter_of(line: str, columns: int | None = None) -> str:
    """Return the delimiter of a .csv file, by its first line: comma, semicolon or tab, whichever makes most cells.

    Spreadsheets of many countries write semicolons. columns: how many cells there are, where that is known.
    """
    found = {}
    for separator in ",;\t":
        with contextlib.suppress(csv.Error):  # quotes that do not fit this separator
            found[separator] = len(next(csv.reader([line], delimiter=separator, strict=True), []))
    if columns:
        return next((separator for separator, count in found.items() if count == columns), ",")
    return max(found, key=lambda separator: found[separator], default=",")


def repeated(names: Iterable[str]) -> str | None:
    """The first of the names that was there before; None where each is there once."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def read_json(file: Path) -> Any:
    """Return the value in a JSON file. Raises OSError, or ValueError for one that is no JSON or nested too deeply."""
    with being_read(file):
        return parse_json(regular(file).read_text(encoding="utf-8"))


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The same for a text. pairs: makes an object of its names and values."""
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file's named values. Raises OSError, or ValueError for anything else."""
    value = read_json(file)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, expected named values")
    return value


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, but for a last one that is still being written. Raises ValueError for other lines."""
    text = regular(file).read_text(encoding="utf-8")
    lines = lines_of(text)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line) if line.strip() else {}
        except ValueError as error:
            if isinstance(error, json.JSONDecodeError) and number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"line {number} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds a JSON {type(row).__name__}, expected named values")
        rows.append(row)
    return [row for row in rows if row]


def read_yaml_text(file: Path) -> str:
    """The text of a YAML file. Raises UserError for one that is too large or not UTF-8."""
    with opened(file, LARGEST_YAML) as text:
        return text.read()


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text. Raises UserError for broken YAML, and for aliases that make very much out of
    little."""
    try:
        value = yaml_text.load(text)
        count = _count(value, {})
    except yaml.YAMLError as error:
        if isinstance(error, yaml.MarkedYAMLError) and "'\\t'" in (error.problem or "") and (at := error.problem_mark):
            raise UserError(f"{where} is not valid YAML: line {at.line + 1} has a tab, expected blanks.") from None
        if isinstance(error, yaml.MarkedYAMLError) and (at := error.problem_mark) and error.problem:
            reason = " ".join(": ".join(filter(None, (error.context, error.problem))).split())[:KEPT_OF_AN_ERROR]
            place = f"line {at.line + 1}, column {at.column + 1}"
            raise UserError(f"{where} is not valid YAML in {place}: {reason}.") from None
        raise UserError(f"{where} is not valid YAML: {described(error, Exception)}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply.") from None
    except ValueError as error:  # a date that does not exist, a number of too many digits
        raise UserError(f"{where} is not valid YAML: {error}") from None
    if count > MOST_VALUES:
        raise UserError(f"{where} holds more than {MOST_VALUES:,} values, what its aliases repeat counted again.")
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """Values inside, those of a repeated part as often as it stands there."""
    if not isinstance(value, dict | list | tuple | set):
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair is no text
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # what holds itself has no end
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(each, known) for each in inside)
    return known[id(value)]
