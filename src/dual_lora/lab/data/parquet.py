"""Parquet files, read in batches and within limits: a small file may unpack to very much."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError, described
from dual_lora.lab.read import regular, repeated

LARGEST = 20_000_000_000  # bytes of a file
MOST_BYTES = 4_000_000_000  # unpacked, as Python has them, of the columns that are read
# Bytes that Python takes besides a value's own: for a record, for a struct, for any value (a null in a list 8, a number
# 32, a text 49).
RECORD, STRUCT, VALUE = 500, 200, 50
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
            # Without pandas' index, where it was saved as a column.
            fields = [field for field in file.schema_arrow if not field.name.startswith("__index_level_")]
            kept = [field.name for field in fields if not _is_bytes(field.type)]
            if twice := repeated(kept):
                raise UserError(f"{path} has two columns {twice!r}: give one of them another name.")
            if not kept:
                raise UserError(f"{path} has no column of texts or numbers.")
            leaves = [file.metadata.schema.column(i) for i in range(file.metadata.num_columns)]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            rows = file.metadata.num_rows
            _check(path, rows, RECORD * rows + _declared_bytes(file.metadata, kept))
        # As dictionaries: a text that stands in many rows is in memory once, until it has been counted.
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            unpacked = count = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=kept):
                count += batch.num_rows
                unpacked += RECORD * batch.num_rows + sum(map(_unpacked_bytes, batch.columns))
                _check(path, count, unpacked)
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last: no such date in Python
        if isinstance(error, (UserError, FileNotFoundError, PermissionError)):
            raise
        said_first = described(error, pyarrow.ArrowException, OSError, ValueError, OverflowError, lines=1).rstrip(".")
        raise UserError(f"{path} could not be read as Parquet: {said_first}.") from None


def _declared_bytes(metadata: Any, kept: list[str]) -> int:
    """Bytes of the columns that are read, by what the file says, without what holds them. Before anything is unpacked:
    one row may hold much."""
    names, lengths = {*kept}, sorted({*map(len, kept)})
    paths = [metadata.schema.column(j).path for j in range(metadata.num_columns)]
    read = [j for j, at in enumerate(paths) if any(at[:n] in names and at[n : n + 1] in ("", ".") for n in lengths)]
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    columns = (group.column(j) for group in groups for j in read)
    return sum(column.total_uncompressed_size + VALUE * column.num_values for column in columns)


def _unpacked_bytes(array: Any) -> int:
    """Bytes of an array's values as Python has them, where a dictionary's texts are copied for each row."""
    import pyarrow
    import pyarrow.compute

    types, kind, held = pyarrow.types, array.type, VALUE * len(array)
    if types.is_dictionary(kind):
        lengths = pyarrow.compute.take(pyarrow.compute.binary_length(array.dictionary), array.indices)
        return held + int(pyarrow.compute.sum(lengths.cast("int64")).as_py() or 0)
    if types.is_struct(kind):
        return held + STRUCT * len(array) + sum(map(_unpacked_bytes, array.flatten()))
    if types.is_map(kind):
        return held + _unpacked_bytes(array.keys) + _unpacked_bytes(array.items)
    if types.is_nested(kind):
        return held + _unpacked_bytes(array.flatten())
    return held + int(array.nbytes)


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
