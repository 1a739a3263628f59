"""GGUF files read once and quickly: transformers reads the header three times for a model and its tokenizer.

A header holds a vocabulary of 50,000 to 250,000 texts. gguf takes each through numpy's `memmap`, whose slices cost
several times those of a plain array. And transformers makes the same table of tensor names for every module, and a list
of Python's numbers of every text before it is decoded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEXT = 8  # of gguf's kinds of values


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a GGUF file's header is read once, a table of tensor names made once, and texts decoded at once."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    parse = getattr(theirs, "_gguf_parse_value", None)
    if parse is not None:
        vars(theirs)["_gguf_parse_value"] = functools.partial(_parsed, parse)
    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update(GGUFReader=_reader, get_tensor_name_map=functools.cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(kept)
        if parse is not None:
            vars(theirs)["_gguf_parse_value"] = parse


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
    from gguf.gguf_reader import GGUFReader

    class Quick(GGUFReader):  # type: ignore[misc]
        """A reader whose slices are those of a plain array on the same memory."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(type(mapped).__base__)

    return Quick
