"""Whether transformers has read all of a GGUF file: it leaves out what it has no place for, and says nothing.

Header, little-endian: magic, version, number of tensors, number of fields; fields (name, type, value); tensors (name,
dimensions, type, offset).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

from dual_lora.lab.errors import UserError

_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # a field's type: struct's
_TEXT, _LIST = 8, 9
_KEPT = ("gpt-oss",)  # whose scaling of positions transformers takes over


def check_whole(file: Path, model: Any) -> None:
    """Raise UserError if the model that was read from a GGUF file lacks what stands in it.

    A language model has as many weights as the file; long-context factors of its positions (Llama 3.1 and later) are a
    tensor or a field of their own.
    """
    fields, tensors = read_header(file)
    architecture = fields.get("general.architecture")
    scaled = fields.get(f"{architecture}.rope.scaling.type", "none") != "none" and architecture not in _KEPT
    factors = [name for name in tensors if name.startswith("rope_f")]
    way_out = "transformers leaves that out, and the model would be another one: use the model's folder of safetensors."
    if scaled or factors:
        raise UserError(f"{file} scales its positions ({', '.join(factors) or 'rope.scaling.type'}); {way_out}")
    held, read = sum(tensors.values()), sum(p.numel() for p in model.parameters())
    if held != read:
        raise UserError(f"{file} holds {held:,} weights, of which the model that was read has {read:,}; {way_out}")


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The fields of a GGUF file, lists left out, and how many numbers each tensor has."""
    with file.open("rb") as data:
        _, _, tensors, fields = struct.unpack("<4sIQQ", data.read(24))
        found = {_text(data): _value(data, _number(data, "I")) for _ in range(fields)}
        sizes = {}
        for _ in range(tensors):
            name, dimensions = _text(data), _number(data, "I")
            sizes[name] = math.prod(_number(data, "Q") for _ in range(dimensions))
            data.read(12)  # type and offset
    return found, sizes


def _number(data: BinaryIO, kind: str) -> Any:
    return struct.unpack("<" + kind, data.read(struct.calcsize("<" + kind)))[0]


def _text(data: BinaryIO) -> str:
    return data.read(_number(data, "Q")).decode("utf-8", "replace")


def _value(data: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(data)
    if kind != _LIST:
        return _number(data, _NUMBERS[kind])
    kind, length = _number(data, "I"), _number(data, "Q")
    for _ in range(length):
        _value(data, kind)
    return None
