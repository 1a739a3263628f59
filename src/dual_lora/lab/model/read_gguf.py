"""GGUF files read once and quickly: transformers reads the header three times for a model and its tokenizer.

A header holds a vocabulary of 50,000 to 250,000 texts. gguf takes each through numpy's `memmap`, whose slices cost
several times those of a plain array, and unpacks weights by sixteen rows. And transformers makes the same table of
tensor names for every module, and a list of Python's numbers of every text before it is decoded.

A header may come from a stranger, and few bytes of it ask for much. It has bounds, which are looked at before any other
reader of GGUF opens the file.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dual_lora.lab.model.location import MOST_OF

_TEXT, _ARRAY = 8, 9  # of gguf's kinds of values
_AT_ONCE = 2**17  # bytes of packed rows
_ALONE = threading.RLock()  # two threads would each put back what the other had put there
# Of a header. The largest published ones have some 2,000 tensors, 1.3 million values in lists, 1000 bytes in a text of
# these. Each value becomes an object; from a vocabulary without merges transformers cuts each text at each letter.
MOST_FIELDS, MOST_LISTED, MOST_CUT = 100_000, 3_000_000, 10**10
# By the end of a number's name, the first that fits: what is built one after the other, and sizes of weights.
_MOST = (
    (re.compile(r"(block_count|_layers)$"), MOST_OF["num_hidden_layers"]),
    (re.compile(r"expert_count$"), MOST_OF["num_experts"]),
    (re.compile(r"context_length$"), MOST_OF["max_position_embeddings"]),
    (re.compile(r"(length|count|size|rank|kernel|cache)$"), MOST_OF["hidden_size"]),
)


@contextmanager
def read_once(file: str | Path) -> Iterator[None]:
    """Inside, this file's header is read once, a table of tensor names made once, and texts decoded at once.

    Raises ValueError for a header beyond the bounds, and whatever gguf raises for one that is damaged.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    quicker: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (gguf, "GGUFReader", lambda _: _reader),
        (gguf, "get_tensor_name_map", functools.cache),
        (gguf.quants, "_apply_over_grouped_rows", lambda _: _by_rows),
        (theirs, "_gguf_parse_value", lambda parse: functools.partial(_parse_value, parse)),
    ]
    with _ALONE, contextlib.ExitStack() as undo:
        _check_numbers(reader_of(file))
        for module, name, made in quicker:
            if (theirs_own := getattr(module, name, None)) is not None:
                undo.callback(setattr, module, name, theirs_own)
                setattr(module, name, made(theirs_own))
        yield


def _check_numbers(reader: Any) -> None:
    """Raise ValueError for a model with layers or sizes without an end, as for a config.json."""
    for name, field in reader.fields.items():
        most = next((most for end, most in _MOST if end.search(name)), None)
        if most is None or name.startswith(("GGUF.", "general.", "tokenizer.")) or field.types[-1] == _TEXT:
            continue
        values = [field.parts[at][0] for at in field.data]
        if beyond := [value for value in values if not value <= most]:
            raise ValueError(f"its header has {name} {beyond[0]:,}, expected at most {most:,}")


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"its header has {count:,} {what}, expected at most {most:,}")


def _by_rows(func: Callable[[Any], Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
    """gguf's way from packed rows to numbers, on some hundreds of rows at a time."""
    import numpy as np

    rows = arr.reshape(-1, arr.shape[-1])
    made = np.empty((len(rows), oshape[-1]), otype)
    step = max(1, _AT_ONCE // rows[:1].nbytes)
    for start in range(0, len(rows), step):
        made[start : start + step] = func(rows[start : start + step])
    return made.reshape(oshape)


def _parse_value(parse: Callable[[Any, Any], Any], value: Any, types: Any) -> Any:
    """A value of a header. parse: transformers' way, for what is no text."""
    kinds = types if isinstance(types, list) else [types]
    return value.tobytes().decode() if kinds[-1] == _TEXT and len(kinds) < 3 else parse(value, types)


def _reader(path: Any, mode: str = "r") -> Any:
    return reader_of(path) if mode == "r" else _quick()(path, mode)


def reader_of(path: str | Path) -> Any:
    """A GGUFReader of the file as it is now."""
    state = Path(path).stat()
    return _kept(str(path), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _kept(path: str, changed: int, size: int) -> Any:
    return _quick()(path)


@functools.cache
def _quick() -> Any:
    import numpy as np
    from gguf.constants import GGUFValueType
    from gguf.gguf_reader import GGUFReader

    class Quick(GGUFReader):  # type: ignore[misc]
        """A reader whose slices are those of a plain array on the same memory."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(type(mapped).__base__)

        def _build_fields(self, offs: int, count: int) -> int:
            self._listed = 0
            _check_count("fields", int(count), MOST_FIELDS)
            offset: int = super()._build_fields(offs, count)
            return offset

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            _check_count("tensors", int(count), MOST_FIELDS)
            return super()._build_tensor_info(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """A list of texts at once; all else in gguf's way."""
            if raw_type != _ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            self._listed += int(self._get(orig_offs + 4, np.uint64)[0])
            _check_count("values in lists", self._listed, MOST_LISTED)
            if self.byte_order != "I" or self._get(orig_offs, np.uint32)[0] != _TEXT:
                return super()._get_field_parts(orig_offs, raw_type)
            offset = orig_offs + 12
            parts = [
                self._plain[orig_offs : orig_offs + 4].view(np.uint32),
                self._plain[offset - 8 : offset].view(np.uint64),
            ]
            for _ in range(int(parts[1][0])):
                start = offset + 8
                length = self._plain[offset:start].view(np.uint64)
                offset = start + int(length[0])
                parts += (length, self._plain[start:offset])
            _check_count("squared letters in a list", sum(part.size**2 for part in parts[3::2]), MOST_CUT)
            kinds = [GGUFValueType.ARRAY, *[GGUFValueType.STRING] * (len(parts) > 2)]
            return offset - orig_offs, parts, list(range(3, len(parts), 2)), kinds

    return Quick
