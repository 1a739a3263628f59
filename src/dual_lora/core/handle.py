"""Handles: tensors that stand for a weight that is read by rows.

Operators take tensors, and a RowSource is none. The handle's number is a tensor, by which an operator finds the source
when it runs. A Python number would be a constant of the graph, and a model that is compiled block by block would be
compiled again for every block.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .blocked import RowSource

_openers: weakref.WeakValueDictionary[int, Callable[[], RowSource]] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Handle(NamedTuple):
    """Stands for a weight [O, I] that is read by rows."""

    number: Tensor  # int64, 0-dim, on the CPU whatever the weight's device, so that reading it waits for nothing
    shape: tuple[int, int]


def handle(opener: Callable[[], RowSource], shape: tuple[int, int]) -> Handle:
    """Make a handle for what `opener` returns; `opener` is called once for every pass over the weight's rows.

    The number keeps the opener alive, as does a graph that has saved the number for its backward.
    """
    number = torch.tensor(next(_numbers), device="cpu")
    _openers[int(number)] = opener
    number.opener = opener  # type: ignore[attr-defined]
    return Handle(number, shape)


def source_of(number: Tensor) -> RowSource:
    """Open the weight that a handle's number stands for. Raises RuntimeError if its owner is gone."""
    opener = _openers.get(int(number))
    if opener is None:
        raise RuntimeError(
            f"The weight behind handle {int(number)} is gone: its layer was deleted, or belongs to another "
            "process, and a compiled graph still uses it. Keep the model, and compile it in the process that runs it."
        )
    return opener()
