"""Call a module with another tensor in the place of one of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def swapped(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Let `module.<name>` be the given value (a composed tensor, or what indexes like one) inside the block.

    The parameters themselves, their order and whoever else holds them are not touched.
    """
    before = {name: module._parameters[name] for name in values}
    module._parameters.update(values)
    try:
        yield
    finally:
        module._parameters.update(before)
