"""GGUF files read once and quickly: transformers reads the header three times for a model and its tokenizer.

A header holds a vocabulary of 50,000 to 250,000 texts. gguf takes each through numpy's `memmap`, whose slices cost
several times those of a plain array, and unpacks weights by sixteen rows. And transformers makes the same table of
tensor names for every module, and a list of Python's numbers of every text before it is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEXT, _ARRAY = 8, 9  # of gguf's kinds of values
_AT_ONCE = 2**17  # bytes of packed rows


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a GGUF file's header is read once, a table of tensor names made once, and texts decoded at once."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    quicker: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (gguf, "GGUFReader", lambda _: _reader),
        (gguf, "get_tensor_name_map", functools.cache),
        (gguf.quants, "_apply_over_grouped_rows", lambda _: _by_rows),
        (theirs, "_gguf_parse_value", lambda parse: functools.partial(_parsed, parse)),
        (
            sys.modules.get("transformers.integrations.gguf.reader"),
            "_mapped",
            lambda mapped: lambda f: _plain(mapped(f)),
        ),
    ]
    with contextlib.ExitStack() as undo:
        for module, name, made in quicker:
            if (theirs_own := getattr(module, name, None)) is not None:
                undo.callback(setattr, module, name, theirs_own)
                setattr(module, name, made(theirs_own))
        yield


def _plain(mapped: Any) -> Any:
    """The same memory as an array whose slices are no maps of a file."""
    return mapped.view(type(mapped).__base__)


def _by_rows(func: Callable[[Any], Any], arr: Any, otype: Any, oshape: tuple[int, ...]) -> Any:
    """gguf's way from packed rows to numbers, on some hundreds of rows at a time."""
    import numpy as np

    rows = arr.reshape(-1, arr.shape[-1])
    made = np.empty((len(rows), oshape[-1]), otype)
    step = max(1, _AT_ONCE // rows[:1].nbytes)
    for start in range(0, len(rows), step):
        made[start : start + step] = func(rows[start : start + step])
    return made.reshape(oshape)


def _parsed(parse: Callable[[Any, Any], Any], value: Any, types: Any) -> Any:
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
            self._plain = _plain(mapped)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """A list of texts at once; all else in gguf's way."""
            if raw_type != _ARRAY or self.byte_order != "I" or self._get(orig_offs, np.uint32)[0] != _TEXT:
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
            kinds = [GGUFValueType.ARRAY, *[GGUFValueType.STRING] * (len(parts) > 2)]
            return offset - orig_offs, parts, list(range(3, len(parts), 2)), kinds

    return Quick
