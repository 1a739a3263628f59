"""A question that transformers asks: whether a model's own code may run."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def not_asked() -> Iterator[None]:
    """Answer no to it inside, for every part of a model. What waits on standard input is no answer."""
    from transformers import dynamic_module_utils

    settings: Any = dynamic_module_utils  # the seconds that it waits for the answer: with 0 it is not asked
    before, settings.TIME_OUT_REMOTE_CODE = settings.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        settings.TIME_OUT_REMOTE_CODE = before
