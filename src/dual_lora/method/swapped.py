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
    places = [_place(module, name, value) for name, value in values.items()]
    before = [home.get(key, _ABSENT) for home, key, _ in places]
    for home, key, value in places:
        home[key] = value
    try:
        yield
    finally:
        for (home, key, _), old in zip(places, before, strict=True):
            if old is _ABSENT:
                del home[key]
            else:
                home[key] = old


_ABSENT = object()


def _place(module: nn.Module, name: str, value: Any) -> tuple[dict[str, Any], str, Any]:
    """The dictionary in which Python finds `module.<name>`, the key there and what to put under it."""
    parametrizations = getattr(module, "parametrizations", {})
    if name in parametrizations:  # a property that calls this module
        return parametrizations[name].__dict__, "forward", lambda: value
    if name in module.__dict__:  # FSDP puts plain tensors there
        return module.__dict__, name, value
    return module._parameters, name, value
