"""Parquet files, read in batches and within limits: a small file may unpack to very much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, described
from dual_lora.lab.read import regular

LARGEST = 20_000_000_000  # bytes of a file
MOST_BYTES = 4_000_000_000  # unpacked, of the columns that are read
MOST_ROWS = 50_000_000
ROWS = 1024  # that are unpacked at once


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, without columns of bytes (pictures, sounds) and pandas' index.

    Raises UserError for what is no Parquet file, and for one that unpacks to more than a machine should read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        regular(path, LARGEST)
        with pyarrow.parquet.ParquetFile(path) as file:
            kept = [
                field.name for field in file.schema_arrow if not _is_bytes(field.type) and not _is_index(field.name)
            ]
            if twice := [name for i, name in enumerate(kept) if name in kept[:i]]:
                raise UserError(f"{path} has two columns {twice[0]!r}: give one of them another name.")
            if not kept:
                raise UserError(f"{path} has no column of texts or numbers.")
            said = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
            _check(path, file.metadata.num_rows, 0 if len(kept) < len(file.schema_arrow.names) else said)
            unpacked = count = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=kept):
                unpacked, count = unpacked + batch.nbytes, count + batch.num_rows
                _check(path, count, unpacked)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, (UserError, FileNotFoundError, PermissionError)):
            raise
        said_first = described(error, pyarrow.ArrowException, OSError, ValueError, lines=1).rstrip(".")
        raise UserError(f"{path} could not be read as Parquet: {said_first}.") from None


def _is_index(name: str) -> bool:
    """pandas' index, where it was saved as a column."""
    return name.startswith("__index_level_")


def _is_bytes(kind: Any) -> bool:
    """Bytes, or a value with bytes in it, as data sets keep pictures and sounds."""
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return any(_is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind))


def _check(path: Path, rows: int, unpacked: int) -> None:
    if rows > MOST_ROWS or unpacked > MOST_BYTES:
        raise UserError(
            f"{path} holds {rows:,} rows of {unpacked:,} bytes in all; at most {MOST_ROWS:,} rows and {MOST_BYTES:,} "
            "bytes are read: write a part of it into another file."
        )
