"""GGUF files read once and quickly: transformers reads the header three times for a model and its tokenizer.

A header holds a vocabulary of 50,000 to 250,000 texts. gguf takes each through numpy's `memmap`, whose slices cost
several times those of a plain array. And transformers makes the same table of tensor names for every module.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, a GGUF file's header is read once, and a table of tensor names is made once."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    vars(gguf).update(GGUFReader=_reader, get_tensor_name_map=functools.cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(kept)


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
