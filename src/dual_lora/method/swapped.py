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
    # FSDP puts plain tensors into the instance's dictionary, where Python looks first.
    homes: dict[str, dict[str, Any]] = {
        name: module.__dict__ if name in module.__dict__ else module._parameters for name in values
    }
    before = {name: home[name] for name, home in homes.items()}
    for name, home in homes.items():
        home[name] = values[name]
    try:
        yield
    finally:
        for name, home in homes.items():
            home[name] = before[name]
